"""A tiny DeepSeek-V4 in a whole cluster: its answers equal the engine's, across turns and workers."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from byte_model import write_byte_tokenizer

from forecache.workers.llm import LLM

pytestmark = pytest.mark.cluster

MODEL = "deepseek"
CHUNK_TOKENS, SNAPSHOT_TOKENS = 128, 512
SETTINGS: dict[str, Any] = {
    "chunk_tokens": CHUNK_TOKENS,
    "snapshot_tokens": SNAPSHOT_TOKENS,
    "keep_ratio": 0.5,
    "min_resident_tokens": 0,
    "late_policy": "wait",
    "window_steps": 16,
    "dtype": "float32",
    "threads": 1,
}
STEPS = 100


def prompt_of(seed: int, tokens: int = 1300) -> list[int]:
    return random.Random(seed).choices(range(1, 250), k=tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_deepseek_v4: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("models") / MODEL
    make_deepseek_v4(path, vocab_size=write_byte_tokenizer(path), eos_token_id=0)
    return path


@pytest.fixture(scope="module")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine in this process, with the server's settings."""
    sizes = {"cold_bytes": 64 << 20, "hot_bytes": 8 << 20}
    with LLM(str(model), arena_dir=tmp_path_factory.mktemp("arena"), **SETTINGS, **sizes) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(model: Path, start_server: Any) -> Any:
    flags = (text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value)))
    return start_server("--model", str(model), "--workers", "2", *flags)


def body(prompt: list[int], max_tokens: int = STEPS, **fields: Any) -> dict[str, Any]:
    greedy = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {"model": MODEL, "prompt": prompt, **greedy, **fields}


def ask(server: Any, prompt: list[int], max_tokens: int = STEPS, **context: Any) -> tuple[str, Any]:
    """The text and the usage of an answer."""
    answer = server.post("/v1/completions", body(prompt, max_tokens, forecache=context))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.json()["usage"]


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_an_answer_is_the_engines_own(server: Any, llm: LLM, keep_ratio: float) -> None:
    [expected] = llm.generate([prompt_of(0)], max_tokens=STEPS, ignore_eos=True, keep_ratio=keep_ratio)
    text, usage = ask(server, prompt_of(0), keep_ratio=keep_ratio)
    assert text == expected.text and len(set(expected.token_ids)) > 30
    assert usage["forecache"]["context_chunks"] == (1300 + STEPS) // CHUNK_TOKENS + 1
    assert usage["forecache"]["keep_ratio"] == pytest.approx(expected.stats.keep_ratio)
    assert (usage["forecache"]["keep_ratio"] == 1) == (keep_ratio == 1.0)


def test_a_second_turn_goes_on_behind_the_first_and_sessions_are_told_in_chunks(server: Any, llm: LLM) -> None:
    """The prompt ends where no shared snapshot is stored, so only the session's snapshot can be found."""
    prompt, path = prompt_of(1, 1400), "/v1/sessions/talk"
    [first] = llm.generate([prompt], max_tokens=STEPS, ignore_eos=True, session_id="talk")
    assert ask(server, prompt, session_id="talk")[0] == first.text
    chunks = (1400 + STEPS - 1) // CHUNK_TOKENS
    session = server.stored_session("talk", chunks)
    assert (session["chunks"], session["tokens"]) == (chunks, chunks * CHUNK_TOKENS)
    assert list(session["tiers"].values()) == [chunks] and session["state_pieces"] >= 1
    server.post(path, {"ttl_s": 60})
    server.wait_for_metric("forecache_memory_tier_pinned_slots", chunks + session["state_pieces"], within_s=10)
    turn = prompt + first.token_ids + prompt_of(2, 60)
    [second] = llm.generate([turn], max_tokens=STEPS, ignore_eos=True, session_id="talk")
    text, usage = ask(server, turn, session_id="talk")
    assert text == second.text
    assert usage["prompt_tokens_details"]["cached_tokens"] == second.stats.cached_tokens == chunks * CHUNK_TOKENS
    assert server.http.delete(path).json()["deleted"] is True


def test_a_worker_that_is_killed_costs_a_pause(server: Any, llm: LLM) -> None:
    """Must run last: it ends the server."""
    prompts = [prompt_of(3), prompt_of(4)]
    tokens = 8 * STEPS  # seconds, so that both still run when the worker is killed
    whole = [answer.text for answer in llm.generate(prompts, max_tokens=tokens, ignore_eos=True)]
    with ExitStack() as streams:
        lines = []
        for prompt in prompts:
            answer = streams.enter_context(server.stream("/v1/completions", body(prompt, tokens, stream=True)))
            lines.append(line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        began = ["".join(map(text_of, islice(events, 20))) for events in lines]
        server.kill_worker(of=2)
        assert [start + "".join(map(text_of, events)) for start, events in zip(began, lines, strict=True)] == whole
    assert server.metric("forecache_resumed_answers_total") == 1, "each worker had one, and no answer was over"


def text_of(event: str) -> str:
    if event == "[DONE]":
        return ""
    return "".join(choice["text"] for choice in json.loads(event)["choices"])
