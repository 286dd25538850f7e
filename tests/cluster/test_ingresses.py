"""Several ingresses on two nodes: the death of one ends only its streams, and limits hold for all together."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from processes import processes_below
from prometheus_client.parser import text_string_to_metric_families

from forecache.cluster.tenants import new_key

pytestmark = pytest.mark.cluster

KEYS = {name: new_key() for name in ("many", "few")}
TOKENS = 4000


def wait_until(condition: Callable[[], bool], within_s: float = 60) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"it did not come about in {within_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(two_nodes: Any, start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    few = ", max_concurrent: 2"
    lines = [
        f"- {{key_sha256: {digest}, tenant: {{name: {name}{few if name == 'few' else ''}}}}}"
        for name, (_, digest) in KEYS.items()
    ]
    file.write_text("\n".join(lines))
    return start_server(
        *("--address", two_nodes.address, "--ingresses", "2", "--api-keys-file", str(file)),
        *("--max-batch-size", "16", "--drain-deadline-s", "120"),
    )


def headers(tenant: str = "many") -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant][0]}"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "bytes", "prompt": "a" * 100, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, **fields}


def first_tokens(server: Any) -> Counter[str]:
    """Ingress → the streams that have begun there."""
    return Counter({
        labels["process"]: int(sample.value)
        for labels, page in server.pages()
        if labels["component"] == "ingress"
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "forecache_time_to_first_token_seconds_count"
    })  # fmt: skip


class Stream(threading.Thread):
    """Reads a streamed answer, and records whether it reached its ``end``."""

    def __init__(self, server: Any) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.finish_reason = None
        self.end = False
        self.begun = threading.Event()

    def run(self) -> None:
        try:
            with self.server.stream("/v1/completions", body(stream=True), headers=headers()) as answer:
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        self.end = True
                    elif line.startswith("data: ") and (choices := json.loads(data).get("choices")):
                        self.finish_reason = choices[0]["finish_reason"]
                        self.begun.set()
        except httpx.TransportError:
            pass  # it ends where its ingress did: `end` stays false


def begun_streams(server: Any, count: int) -> list[Stream]:
    """Wait until all streams have a first token."""
    streams = [Stream(server) for _ in range(count)]
    for stream in streams:
        stream.start()
    assert all(stream.begun.wait(60) for stream in streams)
    return streams


def ingresses() -> list[int]:
    """The processes of the ingresses."""
    names = processes_below(os.getpid())
    return [pid for pid, name in names.items() if "ServeReplica:forecache:Ingress" in name]


def test_both_are_listed_and_each_on_a_node_of_its_own(server: Any) -> None:
    listed = [group["labels"] for group in server.get("/metrics/targets").json()]
    here = [labels for labels in listed if labels["component"] == "ingress"]
    assert len(here) == 2 and len({labels["node"] for labels in here}) == 2
    assert len(ingresses()) == 2


def begun_stream(server: Any, streams: ExitStack) -> httpx.Response:
    """Start a stream of a tenant with a low limit.

    Retry while it is refused: an ingress may not know yet that the other ingress' request has ended.
    """
    end_s = time.monotonic() + 30
    while True:
        answer = server.stream("/v1/completions", body(stream=True), headers=headers("few"))
        response: httpx.Response = streams.enter_context(answer)
        if response.status_code == 200:
            return response
        assert response.status_code == 429 and time.monotonic() < end_s, response.status_code
        time.sleep(0.2)


def test_a_tenant_s_limit_is_that_of_both_together(server: Any) -> None:
    lines: list[Iterator[str]] = []
    with ExitStack() as streams:
        for _ in range(2):
            answer = begun_stream(server, streams)
            lines.append(answer.iter_lines())  # kept: a stream whose lines are not read on any more is closed
            assert next(lines[-1])
        time.sleep(2)  # the time in which ingresses hear of each other's requests
        refused = [server.post("/v1/completions", body(max_tokens=1), headers=headers("few")) for _ in range(10)]
        assert [answer.status_code for answer in refused] == [429] * 10
        assert "your key has 2 requests under way and may have 2" in refused[0].json()["error"]["message"]
        assert server.post("/v1/completions", body(max_tokens=1), headers=headers()).status_code == 200
    wait_until(lambda: server.post("/v1/completions", body(max_tokens=1), headers=headers("few")).is_success)


def test_an_ingress_that_dies_takes_its_own_streams_along_and_no_others(server: Any) -> None:
    before, streams, counts = first_tokens(server), list[Stream](), Counter[str]()
    while len(counts) < 2 or counts.total() < len(streams):
        assert len(streams) < 20, "all streams go through one ingress"
        if counts.total() == len(streams):
            streams += begun_streams(server, 5)
        counts = first_tokens(server) - before
    assert not any(stream.end for stream in streams)
    [victim, _] = ingresses()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: answers(server), within_s=15)
    for stream in streams:
        stream.join(300)
    ended = sum(stream.end for stream in streams)
    assert sorted([ended, len(streams) - ended]) == sorted(counts.values())
    assert [stream.finish_reason for stream in streams if stream.end] == ["length"] * ended
    assert all(stream.finish_reason is None for stream in streams if not stream.end)
    # another takes its place
    wait_until(lambda: len(ingresses()) == 2 and victim not in ingresses())
    wait_until(lambda: str(server.get("/metrics/targets").text).count('"ingress"') == 2)
    assert all(answers(server) for _ in range(10))


def answers(server: Any) -> bool:
    try:
        return bool(server.post("/v1/completions", body(max_tokens=1), headers=headers(), timeout=30).is_success)
    except httpx.TransportError:
        return False


def test_what_one_has_under_way_is_waited_for_at_the_end(server: Any) -> None:
    streams = begun_streams(server, 6)
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        stream.join(120)
    assert [stream.end for stream in streams] == [True] * 6
    assert server.process.wait(60) == 0
