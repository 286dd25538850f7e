"""A worker that drains, at a scale-down or rolling update, finishes its answer and keeps its holds until then."""

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from forecache.cluster.cli.integrity import check_integrity
from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import APPLICATION, NAMESPACE, running
from forecache.cluster.tiers import find_tiers
from forecache.workers.engine.worker import DecodeWorker
from forecache.workers.memory.format.hold_id import worker_of

pytestmark = pytest.mark.cluster

PROMPT, ANSWER = 1500, 800
SLOT_BYTES = 9 << 10
WITHIN_S = 180.0


def wait_until(condition: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {within_s:g} s"
        time.sleep(0.05)


def counting(directory: Path) -> type[DecodeWorker]:
    """Workers that write the number of their prefilled tokens to a file when they end."""

    class CountingWorker(DecodeWorker):
        def __del__(self) -> None:
            (directory / self._worker_id).write_text(f"{self._engine.stats().prefilled_tokens}", encoding="utf-8")
            super().__del__()

    return CountingWorker


class Answer(threading.Thread):
    """A streamed answer that is read as it arrives."""

    def __init__(self, url: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {
            "model": "bytes", "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True, "stream": True,
            "temperature": 0, "stream_options": {"include_usage": True}, "forecache": {"keep_ratio": 0.1},
        }  # fmt: skip
        self.events = 0
        self.errors: list[str] = []
        self.usage: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=600) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                self.events += 1
                self.errors += [event["error"]["message"]] if "error" in event else []
                self.usage = event.get("usage") or self.usage

    def begun(self) -> bool:
        return self.events > 20 or not self.is_alive()


def replicas(state: str) -> int:
    return int(serve.status().applications[APPLICATION].deployments["DecodeWorker"].replica_states.get(state, 0))


@pytest.mark.usefixtures("by_value")
def test_a_worker_that_drains_keeps_what_its_answer_holds(
    byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that Serve can be told to have one worker less, as its autoscaler does
    monkeypatch.setattr(serve, "RunTarget", partial(serve.RunTarget, external_scaler_enabled=True))
    counts, arena_dir = tmp_path / "counts", tmp_path / "arena"
    counts.mkdir()
    arena_dir.mkdir()
    config = ServeConfig.model_validate({
        "port": 0, "workers": 2, "stop_deadline_s": WITHIN_S,
        "engine": {
            "model": str(byte_model), "device": "cpu", "chunk_tokens": 16, "threads": 1, "hot_bytes": 48 * SLOT_BYTES,
            "window_steps": 16,
        },
        # little more than both answers may need: what others compute takes each slot that is given back
        "memory": {"arena_dir": arena_dir, "cold_bytes": (2 << 20) + 430 * SLOT_BYTES, "heartbeat_s": 0.5},
        "indexer": {"manifest": "none"},
    })  # fmt: skip
    with running(config, lambda text: None, worker_class=counting(counts)) as served:
        tiers = find_tiers(NAMESPACE)

        def holding() -> set[str]:
            return {worker_of(holder) for told in tiers.ask("holders").values() for holder in told}

        answers = [Answer(served.url, letter * PROMPT) for letter in "ab"]
        wait_until(lambda: all(answer.begun() for answer in answers), "both answers begin")
        both = holding()
        assert len(both) == 2 and all(answer.is_alive() for answer in answers)
        controller: Any = _get_global_client()._controller
        ray.get(controller.update_deployment_replicas.remote(DeploymentID("DecodeWorker", APPLICATION), 1))
        wait_until(lambda: replicas("STOPPING") == 1, "a worker drains")
        assert all(answer.is_alive() for answer in answers), "the answers were over too early to show anything"

        number = 0
        while replicas("STOPPING"):
            # fresh prompts: what was given back would be taken
            body = {"model": "bytes", "prompt": f"{number:03}" + "x" * 1000, "max_tokens": 1}
            assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=120).status_code in (200, 503)
            number += 1
            draining = both - {path.name for path in counts.iterdir()}
            if all(answer.is_alive() for answer in answers) and len(draining) == 2:
                assert both <= holding(), "what a draining worker's answer holds was taken from it"
        for answer in answers:
            answer.join(WITHIN_S)
            assert not answer.errors and answer.usage["completion_tokens"] == ANSWER
        [ended] = counts.iterdir()
        assert int(ended.read_text(encoding="utf-8")) == answers[0].usage["prompt_tokens"] == PROMPT

        wait_until(lambda: not holding(), "all holds are given back")
        assert check_integrity(tiers, settle_s=30) == []

        # a hold without an owner is reported, and then released
        [living] = both - {ended.name}
        [tier] = tiers.actors().values()
        ray.get(tier.reserve_quota.remote(f"{living}/ghost#{10**9}", 3))
        [said] = [sentence for sentence in check_integrity(tiers, settle_s=0) if "ghost" in sentence]
        assert said.endswith("has ended, but still holds slots")
        wait_until(lambda: not holding(), "the orphan is swept")
        assert check_integrity(tiers, settle_s=30) == []
