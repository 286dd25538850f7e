"""A restarted sequence, or one whose chunks others share, gives the answer of an undisturbed one."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_llm import open_llm

from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.core.residency import FIRST_BOUNDARY, PendingSet
from forecache.workers.core.sequence import State
from forecache.workers.core.step_plan import Captured
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation

MOST_STEPS = 1500


def add(llm: LLM, name: str, prompt: Sequence[int], tokens: int, **cache: Any) -> Any:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, CacheOptions(**cache)))
    return llm.engine._sequences[name]


def step(llm: LLM, tokens: list[int]) -> None:
    """Run one step, and check that the tokens of each request come in order."""
    for event in llm.engine.step():
        assert not event.token_ids or event.position == len(tokens)
        tokens += event.token_ids
        assert event.finish_reason in (None, "length")


def finish(llm: LLM, tokens: list[int]) -> list[int]:
    for _ in range(MOST_STEPS):
        if llm.engine.idle:
            return tokens
        step(llm, tokens)
    raise AssertionError("no progress")


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_token_of_a_step_before_a_restart_is_void(
    tiny_model: Path, prompts: list[list[int]], reference: Any, restarts: int
) -> None:
    """With overlapping steps, a step is in flight when chunks are found lost. Its token is void, and drawn again."""
    with open_llm(tiny_model, overlap_steps=True) as llm:
        tokens: list[int] = []
        seq = add(llm, "a", prompts[1], 24)
        for number in range(restarts):
            while len(tokens) < 4 * (number + 1) or llm.engine._in_flight is None or seq.state is not State.DECODE:
                step(llm, tokens)
            assert seq.awaited_tokens == 1
            llm.engine._restart(seq, "they are, for this test")
        assert finish(llm, tokens) == reference(prompts[1], 24)


def test_a_prediction_of_an_earlier_try_is_not_used(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries captured before a restart belong to lost chunks, even for the same boundary."""
    with open_llm(tiny_model, keep_ratio=0.2, overlap_steps=True) as llm:
        windows, captured = llm.engine.windows, llm.engine.windows.captured
        early: list[Captured] = []
        ignored: list[int] = []

        def late(news: Captured) -> None:
            if not early:
                early.append(news)
                return
            if news.request.restarts == 1 and not ignored:
                assert seq.residency.boundary == early[0].request.boundary == FIRST_BOUNDARY
                assert seq.residency.pending is None and seq.state is State.DECODE
                captured(early[0])
                assert seq.residency.pending is None, "a prediction was asked for with it"
                ignored.append(seq.residency.decode_steps)
            captured(news)

        monkeypatch.setattr(windows, "captured", late)
        tokens: list[int] = []
        seq = add(llm, "a", prompts[2], 30)
        while not early:
            step(llm, tokens)
        llm.engine._restart(seq, "they are, for this test")
        assert len(finish(llm, tokens)) == 30 and ignored


def test_a_hot_chunk_that_another_one_writes_back_stays_until_it_is_written_back_for_this_one_too(
    tiny_model: Path, prompts: list[list[int]], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hot chunk must stay hot until cold memory holds it for the second sequence.

    The first sequence has stored it and left, so until then the second one could not read it anywhere else.
    """
    reserve, second_may = ArenaStore.reserve_slots, threading.Event()

    def second_later(self: ArenaStore, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        if "second" in holder:
            assert second_may.wait(30)
        return reserve(self, holder, keys)

    first_may, hold = threading.Event(), ArenaStore.commit

    def first_later(self: ArenaStore, holder: str, written: Any) -> None:
        if "first" in holder:
            assert first_may.wait(30)
        hold(self, holder, written)

    monkeypatch.setattr(ArenaStore, "reserve_slots", second_later)
    monkeypatch.setattr(ArenaStore, "commit", first_later)
    prompt = prompts[1]
    with open_llm(tiny_model, max_step_tokens=512) as llm:
        pool = llm.engine.pool
        add(llm, "first", prompt, 1)
        while "first" in llm.engine._sequences:
            llm.engine.step()
        seq = add(llm, "second", prompt, 20)
        tokens: list[int] = []
        while not seq.chunks:
            step(llm, tokens)
        slots = [pool.lookup(chunk.key) for chunk in seq.chunks]
        assert len(slots) == 8 and all(slot is not None and pool._dirty[slot] == 2 for slot in slots)
        first_may.set()
        while any(pool._dirty[slot] != 1 for slot in slots if slot is not None):
            llm.engine._receive()
        assert pool.evict_all() == 0
        second_may.set()
        assert finish(llm, tokens) == reference(prompt, 20)


@pytest.mark.parametrize("left", [0, 1])
def test_a_set_waits_for_slots_that_others_chunks_are_in(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """No chunk of the set is recalled before there is room for all of it."""
    with open_llm(tiny_model, keep_ratio=0.2, late_policy="wait") as llm:
        windows, pool, bring_in = llm.engine.windows, llm.engine.pool, llm.engine.windows._bring_in
        waited: list[int] = []

        def crowded(seq: Any, turn: PendingSet) -> None:
            cold = [number for number in turn.wanted if pool.lookup(seq.chunks[number].key) is None]
            if len(cold) > 1 and len(waited) < 5:
                taken = []
                while pool.available > left:
                    taken.append(pool.allocate())
                wanted = list(turn.wanted)
                bring_in(seq, turn)
                assert turn.wanted == wanted and not turn.incoming and turn.ticket is None and pool.available == left
                waited.append(len(cold))
                for slot in taken:
                    assert slot is not None
                    pool.release(slot)
            bring_in(seq, turn)

        tokens: list[int] = []
        seq = add(llm, "a", prompts[2], 1)
        assert len(finish(llm, tokens)) == 1
        llm.engine.flush()
        pool.evict_all()
        monkeypatch.setattr(windows, "_bring_in", crowded)
        seq = add(llm, "b", prompts[2], 30, policy="random")
        assert len(finish(llm, [])) == 30 and waited
        assert seq.counters.recalled_chunks >= sum(waited[:1])
