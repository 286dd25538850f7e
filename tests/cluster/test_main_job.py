"""The main job through one real cluster: what `make test` runs of this folder.

A prompt three times the size of the hot pool is prefilled, evicted to CPU memory and answered from recalled chunks; a
second turn of its session prefills the new tokens only; the answer streams; the metrics count it all; the end leaves
nothing. `make test-cluster` runs the other modules.
"""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

MODEL, SESSION = "bytes", "a long talk"
HOT_BYTES = 1 << 20
CHUNK_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 6000, 100


@pytest.fixture(scope="module")
def server(start_server: Any) -> Iterator[Any]:
    """One cluster for the module. Its end is tested too."""
    running = start_server("--hot-bytes", str(HOT_BYTES), "--keep-ratio", "0.2")
    yield running
    running.end()


@pytest.fixture(scope="module")
def document() -> str:
    return "".join(random.Random(2).choices("abcdefgh ", k=PROMPT_TOKENS))


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    greedy = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"model": MODEL, "prompt": prompt, "forecache": {"session_id": SESSION}, **greedy, **fields}


@pytest.fixture(scope="module")
def first(server: Any, document: str) -> dict[str, Any]:
    """The answer to the first turn, after all its chunks were stored in CPU memory."""
    answer = server.post("/v1/completions", body(document))
    assert answer.status_code == 200, answer.text
    server.stored_session(SESSION, (PROMPT_TOKENS + ANSWER_TOKENS - 1) // CHUNK_TOKENS)
    told: dict[str, Any] = answer.json()
    return told


def test_it_is_ready_and_names_its_model(server: Any) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready", "workers": 1, "scorer": "bounds"}
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [MODEL]


def test_a_prompt_larger_than_the_pool_is_evicted_and_answered(server: Any, first: dict[str, Any]) -> None:
    usage = first["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, ANSWER_TOKENS)
    context = usage["forecache"]
    assert context["context_chunks"] == -(-(PROMPT_TOKENS + ANSWER_TOKENS) // CHUNK_TOKENS)
    assert context["context_bytes"] > 2 * HOT_BYTES, "it can't be in the pool at once"
    assert context["resident_bytes"] <= HOT_BYTES and context["keep_ratio"] < 0.4
    assert server.metric("forecache_written_back_chunks_total") >= PROMPT_TOKENS // CHUNK_TOKENS
    assert server.metric("forecache_recalled_chunks_total") > 0, "evicted chunks are read from CPU memory"


def test_a_second_turn_prefills_the_new_tokens_only(server: Any, document: str, first: dict[str, Any]) -> None:
    usage = server.post("/v1/completions", body(document + " and then?" * 4)).json()["usage"]
    assert usage["prompt_tokens"] == PROMPT_TOKENS + 40
    assert usage["prompt_tokens_details"]["cached_tokens"] == PROMPT_TOKENS


def test_a_streamed_answer_is_the_same(server: Any, document: str, first: dict[str, Any]) -> None:
    with server.stream("/v1/completions", body(document, stream=True, forecache={"cache_salt": "again"})) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert any(re.fullmatch(rf": prefill \d+/{PROMPT_TOKENS}", line) for line in lines)
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in map(json.loads, events) for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == first["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == "length"


def test_metrics_count_what_the_client_counts(server: Any) -> None:
    names = ("forecache_prompt_tokens_total", "forecache_generation_tokens_total", "forecache_requests_finished_total")
    before = [server.metric(name) for name in names]
    usage = server.post("/v1/completions", body("count me", max_tokens=9)).json()["usage"]
    grown = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [usage["prompt_tokens"], 9, 1]
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=10)
    server.wait_for_metric("forecache_memory_tier_held_perc", 0, within_s=10)
