"""The letters that show clients where each chunk is."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.core.residency import PendingSet
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.llm import LLM
from forecache.workers.memory.format.keys import root_key
from forecache.workers.residency.chunk_view import chunk_view

CHUNK = 16


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    settings: dict[str, Any] = {"chunk_tokens": CHUNK, "cold_bytes": 1 << 22, "late_policy": "wait", "window_steps": 16}
    settings["min_resident_tokens"] = 0
    # 18 slots: fewer than the prompt has chunks
    with LLM(str(tiny_model), skip_tokenizer=True, hot_bytes=18 * 3 * 2 * 2 * CHUNK * 16 * 4, **settings) as llm:
        yield llm


def watched(llm: LLM, prompt: list[int], policy: Any, *, show: bool = True) -> list[TokenEvent]:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    request = GenerateRequest("r", tuple(prompt), sampling, CacheOptions(policy, 0.1), show_chunks=show)
    llm.engine.add_request(request)
    events: list[TokenEvent] = []
    while not llm.engine.idle:
        events += llm.engine.step()
    return events


def test_a_whole_request(llm: LLM, prompts: list[list[int]]) -> None:
    prompt = prompts[2]
    views = [(event, event.view) for event in watched(llm, prompt, "random") if event.view is not None]
    prefill = [view for event, view in views if not event.token_ids]
    decode = [view for event, view in views if event.token_ids]
    for view in prefill:
        assert len(view.states) == -(-len(prompt) // CHUNK) and set(view.states) <= set("hc.")
    assert all(a.states.count(".") >= b.states.count(".") for a, b in pairwise(prefill))
    for view in decode:
        assert set(view.states) <= set("ahfpc")
        if "f" not in view.states and "p" not in view.states:
            assert view.keep_ratio == pytest.approx(sum(s in "ah" for s in view.states) / len(view.states))
    seen = set("".join(view.states for view in decode))
    assert {"h", "c"} <= seen and seen & {"f", "p"}
    assert len(decode[-1].states) == (len(prompt) + 60 - 1) // CHUNK + 1
    assert len({view.states for view in decode}) > 4
    # told when something changed, not with every token
    assert len(decode) < 50


def test_nobody_watches(llm: LLM, prompts: list[list[int]]) -> None:
    assert all(event.view is None for event in watched(llm, prompts[2], "random", show=False))


def sequence(chunks: int) -> TokenSequence:
    request = GenerateRequest("r", tuple([5] * (chunks * CHUNK + 3)), SamplingParams(max_tokens=9), show_chunks=True)
    seq = TokenSequence(request, holder="r", root=root_key("x"), chunk_tokens=CHUNK, keep_ratio=0.5, policy="lookahead")
    for _ in range(chunks):
        seq.complete_chunk()
    seq.state = State.DECODE
    return seq


def test_each_letter(llm: LLM) -> None:
    seq = sequence(6)
    seq.residency.slots, seq.residency.attended = {0: 7, 2: 8, 5: 9}, frozenset({2, 3})

    def states(pending: PendingSet | None) -> str | None:
        seq.residency.pending = pending
        view = chunk_view(seq, llm.engine.pool)
        return None if view is None else view.states

    pending = PendingSet(boundary=8, chunks=6)
    assert states(pending) == "hcacchh"
    assert states(pending) is None, "nothing has changed"
    pending.selected, pending.wanted = frozenset({0, 1, 4}), [1, 4]
    assert states(pending) == "hfacfhh"
    pending.wanted = []
    assert states(pending) == "hpacphh"
    seq.residency.streamed = True
    seq.residency.version += 1
    assert states(None) == "hhhhhhh"


@pytest.mark.parametrize(
    "change", [lambda s: setattr(s.residency, "attended", frozenset({1})), lambda s: s.complete_chunk()]
)
def test_what_changes_is_told(llm: LLM, change: Callable[[TokenSequence], Any]) -> None:
    seq = sequence(3)
    seq.residency.slots = {1: 4}
    assert chunk_view(seq, llm.engine.pool) is not None
    change(seq)
    assert chunk_view(seq, llm.engine.pool) is not None
