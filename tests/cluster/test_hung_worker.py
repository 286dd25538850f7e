"""A worker whose step hangs: its clients hear an error, Ray Serve replaces it, and the new one answers."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from forecache.cluster.config import ResumeConfig, ServeConfig
from forecache.cluster.launch.cluster import running
from forecache.workers.core.config import EngineConfig, WorkerSettings
from forecache.workers.engine.worker import DecodeWorker
from forecache.workers.memory.config import MemoryConfig

pytestmark = pytest.mark.cluster

HANGS = "hang here"
STEP_DEADLINE_S = 4.0
REPLACED_S = 180.0


class HangingWorker(DecodeWorker):
    """A worker whose step hangs when a prompt of a certain length is in it."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        runner: Any = self._engine._engine._runner
        launch = runner.launch

        def hang(plan: Any, *rest: Any) -> Any:
            if any(bytes_of(part.sequence).endswith(HANGS) for part in plan.streams):
                threading.Event().wait()
            return launch(plan, *rest)

        runner.launch = hang


def bytes_of(seq: Any) -> str:
    """A prompt for the small model, whose tokens are bytes in the order of its tokenizer's alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "".join(alphabet[token - 1] for token in seq.token_ids[: seq.prompt_len]).replace("Ġ", " ")


@pytest.fixture(scope="module")
def url(by_value: None, byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(
        engine=EngineConfig(
            model=str(byte_model), chunk_tokens=16, hot_bytes=8 << 20, threads=1, step_deadline_s=STEP_DEADLINE_S
        ),
        memory=MemoryConfig(cold_bytes=128 << 20, arena_dir=tmp_path_factory.mktemp("arena")),
        resume=ResumeConfig(max_silent_workers=1),
        port=0,
    )
    with running(config, lambda _: None, worker_class=HangingWorker) as cluster:
        yield cluster.url


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "bytes", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, **fields}


def test_a_worker_whose_step_hangs_is_replaced_and_its_clients_hear_an_error(url: str) -> None:
    with httpx.Client(base_url=url, timeout=REPLACED_S) as http:
        assert http.post("/v1/completions", json=body("hello")).status_code == 200
        heard: dict[str, Any] = {}

        def other() -> None:
            """Another request on the same worker, which must not be blamed."""
            heard["other"] = http.post("/v1/completions", json=body("hello", max_tokens=2000))

        waits = threading.Thread(target=other)
        waits.start()
        with http.stream("POST", "/v1/completions", json=body(HANGS, stream=True)) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        waits.join()
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["code"] == "worker_lost" and "hangs" in error["message"], error
        assert heard["other"].status_code in (200, 503)
        if heard["other"].status_code == 503:
            assert heard["other"].json()["error"]["code"] == "worker_lost"
        end_s = time.monotonic() + REPLACED_S
        while (answer := http.post("/v1/completions", json=body("hello"))).status_code != 200:
            assert answer.json()["error"]["code"] == "worker_lost", answer.text
            assert time.monotonic() < end_s, answer.text
            time.sleep(1)
        ready = http.get("/ready").json()
        assert ready["status"] == "ready" and ready["workers"] == 1
