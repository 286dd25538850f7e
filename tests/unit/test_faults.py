"""Faults around the engine (full or missing cold memory, failed predictions, races) end one request at most."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_llm import CHUNK_BYTES, open_llm

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Prediction, PredictRequest
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams, TokenEvent
from forecache.workers.errors import ChunkLostError, ForecacheError, InvalidRequestError, OverloadedError
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation
from forecache.workers.memory.hot import prefix_search as locator
from forecache.workers.memory.hot.completions import RecallItem
from forecache.workers.memory.hot.prefetcher import Prefetcher

MOST_STEPS = 1500


def add(llm: LLM, name: str, prompt: Sequence[int], tokens: int, policy: Policy = "lookahead") -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, CacheOptions(policy)))


def finish(llm: LLM, names: set[str]) -> dict[str, TokenEvent]:
    """Step until all of ``names`` have ended; returns their last events."""
    last: dict[str, TokenEvent] = {}
    for _ in range(MOST_STEPS):
        for event in llm.engine.step():
            if event.finish_reason is not None:
                assert event.request_id not in last, "it ended twice"
                last[event.request_id] = event
        llm.engine.check_integrity()
        if names <= set(last):
            return last
    raise AssertionError(f"no progress: only {sorted(last)} of {sorted(names)} ended")


def test_a_set_that_turns_over_leaves_room_for_the_tail(tiny_model: Path, prompts: list[list[int]]) -> None:
    # 124 chunks at most, a budget of 31: reserved are 31 + 16 + 3 slots, and the pool has no more
    few_recent = SelectionConfig(recency_fraction=0.1)
    with open_llm(tiny_model, hot_chunks=50, keep_ratio=0.25, cold_bytes=8 << 20, selection=few_recent) as llm:
        for tail in range(16):
            prompt = (prompts[2] * 6)[: 1920 + tail]
            add(llm, str(tail), prompt, 48, "random")
            assert finish(llm, {str(tail)})[str(tail)].finish_reason == "length"


def test_a_full_cold_memory_ends_who_could_not_store_and_not_who_shares_the_prefix(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, gates, stored = ArenaStore.reserve_slots, [threading.Event() for _ in range(3)], []

    def full_for_the_first(self: ArenaStore, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        assert gates[0].wait(30)
        if not stored:
            stored.extend(keys)
        elif "first" in holder:
            assert gates[1].wait(30)
            raise OverloadedError("full")
        else:
            assert gates[2].wait(30)
        return reserve(self, holder, keys)

    monkeypatch.setattr(ArenaStore, "reserve_slots", full_for_the_first)
    with open_llm(tiny_model, max_step_tokens=32) as llm:
        add(llm, "first", prompts[2], 8)
        while llm.engine.pool.dirty < 5:
            llm.engine.step()
        add(llm, "second", prompts[2], 8)
        llm.engine.step()
        gates[0].set()
        while not any(seq.request_id == "second" and seq.chunks for seq in llm.engine._scheduler.running):
            llm.engine.step()
        gates[1].set()
        first = finish(llm, {"first"})["first"]
        for _ in range(3):
            llm.engine.step()
        gates[2].set()
        assert finish(llm, {"second"})["second"].finish_reason == "length"
    assert first.finish_reason == "error" and "full" in str(first.error)


def test_news_of_a_request_that_has_left_is_no_news(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is cancelled during a recall; only later does a write-back of it fail."""
    reserve, entered, gate = ArenaStore.reserve_slots, threading.Event(), threading.Event()

    def fails_late(self: ArenaStore, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        if "late" not in holder:
            return reserve(self, holder, keys)
        entered.set()
        assert gate.wait(30)
        raise OverloadedError("full")

    recall = Prefetcher.recall

    def recalls_once_it_stores(self: Prefetcher, items: Sequence[RecallItem], holder: str) -> int:
        assert entered.wait(30)
        return recall(self, items, holder)

    monkeypatch.setattr(ArenaStore, "reserve_slots", fails_late)
    monkeypatch.setattr(Prefetcher, "recall", recalls_once_it_stores)
    with open_llm(tiny_model) as llm:
        add(llm, "before", prompts[2], 1)
        finish(llm, {"before"})
        llm.engine.flush()
        llm.engine.pool.evict_all()
        # one more chunk than is stored: it is on its way to cold memory when the stored ones are recalled
        add(llm, "late", prompts[2] + prompts[0][:40], 30)
        while not any(seq.residency.pending for seq in llm.engine._sequences.values()):
            llm.engine.step()
        llm.engine.cancel("late")
        events = llm.engine.step()
        gate.set()
        llm.engine.flush()
        for _ in range(5):
            events += llm.engine.step()
    assert [event.finish_reason for event in events if event.finish_reason] == ["cancelled"]


def predict_nothing(self: LocalIndexer, request: PredictRequest) -> Future[Prediction]:
    answer: Future[Prediction] = Future()
    answer.set_exception(RuntimeError("no indexer"))
    return answer


def predict_nan(self: LocalIndexer, request: PredictRequest) -> Future[Prediction]:
    answer: Future[Prediction] = Future()
    answer.set_result(Prediction(request.sequence_id, np.full(len(request.index_slots), np.nan, np.float32)))
    return answer


@pytest.mark.parametrize("predict", [predict_nothing, predict_nan])
def test_without_predictions_a_sequence_goes_on_within_its_budget(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, predict: Any
) -> None:
    monkeypatch.setattr(LocalIndexer, "predict", predict)
    with open_llm(tiny_model, hot_chunks=16, keep_ratio=0.1) as llm:
        add(llm, "long", prompts[1], 300)
        end = finish(llm, {"long"})["long"]
    assert end.finish_reason == "length" and end.stats is not None
    assert end.stats.resident_chunks <= 8 + 16 // 16 + 3
    assert llm.engine.stats().counters.failed_predictions > 300 // 16


def test_a_damaged_prefix_while_its_owner_is_away(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: ArenaStore, *_: object) -> None:
        raise ChunkLostError("no answer")

    with open_llm(tiny_model) as llm:
        add(llm, "one", prompts[2], 2)
        finish(llm, {"one"})
        llm.engine.flush()
        llm.engine.pool.evict_all()
        llm.memory.arena.chunks[:, ::1000] ^= 1
        monkeypatch.setattr(ArenaStore, "drop", away)
        add(llm, "two", prompts[2], 2)
        assert finish(llm, {"two"})["two"].finish_reason == "length"


def test_a_prompt_that_is_refused_leaves_nothing_of_its_batch(tiny_model: Path, prompts: list[list[int]]) -> None:
    with open_llm(tiny_model) as llm:
        with pytest.raises(InvalidRequestError):
            llm.generate([prompts[0], []], max_tokens=4)
        llm.engine.step()
        assert llm.engine.idle


def test_a_start_that_fails_leaves_no_arena(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ForecacheError, match="hot-bytes"):
        LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, cold_bytes=4 << 20, hot_bytes=1, arena_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_chunks_given_away_under_a_streamed_sequence_are_noticed(
    tiny_model: Path, prompts: list[list[int]], reference: Any
) -> None:
    """A restarted tier knows no holds, and gives the slots to others."""
    prompt = prompts[2]
    with open_llm(tiny_model, hot_chunks=4, max_step_tokens=16) as llm:
        add(llm, "a", prompt, 30, "full")
        tokens: list[int] = []
        stolen = False
        last = None
        for _ in range(MOST_STEPS):
            for event in llm.engine.step():
                tokens += event.token_ids
                last = event
            if len(tokens) >= 5 and not stolen:
                stolen = True
                llm.engine.flush()
                holder = llm.memory.holders()[0]
                llm.memory.release(holder)
                places = llm.memory.reserve_slots("thief", [bytes([n]) * 16 for n in range(llm.memory.arena.slots)])
                for place in places:
                    llm.memory.arena.chunks[place.ref.slot] = 1
                llm.memory.release("thief")
            if last is not None and last.finish_reason:
                break
        assert stolen
        assert last is not None and last.finish_reason == "length"
        assert tokens == reference(prompt, 30)


def test_sequences_with_an_equal_beginning_part(tiny_model: Path, prompts: list[list[int]]) -> None:
    with open_llm(tiny_model, keep_ratio=0.1, max_batch_size=8) as llm:
        for end in range(140, 148):
            add(llm, str(end), prompts[2][:end], 40)
        while any(seq.residency.decode_steps < 20 for seq in llm.engine._sequences.values()):
            llm.engine.step()
        boundaries = {seq.residency.boundary for seq in llm.engine._sequences.values()}
        assert len(boundaries) > 1
        finish(llm, set(llm.engine._sequences))


def test_a_request_that_the_memory_of_its_node_has_no_room_for_is_refused_and_says_why(
    tiny_model: Path, prompts: list[list[int]]
) -> None:
    """Another worker has reserved the room. Running requests continue, and later there is room again."""
    with open_llm(tiny_model) as llm:
        add(llm, "runs", prompts[1], 40)
        while not any(event.token_ids for event in llm.engine.step()):
            pass
        llm.memory.reserve_quota("another worker/0", llm.memory.stats().slots - 20)
        add(llm, "new", prompts[2], 40)
        ends = finish(llm, {"runs", "new"})
        assert ends["runs"].finish_reason == "length"
        assert ends["new"].finish_reason == "error" and ends["new"].overloaded
        assert "reserved for others" in str(ends["new"].error)
        llm.memory.release("another worker/0")
        add(llm, "again", prompts[2], 4)
        assert finish(llm, {"again"})["again"].finish_reason == "length"


def test_a_request_waits_for_the_memory_of_one_that_has_left(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished request is released after its write-backs; the next request must wait, not fail, until then."""
    release = ArenaStore.release
    released: list[str] = []

    def late(self: ArenaStore, holder: str) -> None:
        time.sleep(0.3)  # the next one, which is not told to wait for room, asks meanwhile
        released.append(holder)
        release(self, holder)

    monkeypatch.setattr(locator, "QUOTA_WAIT_S", 0.0)
    monkeypatch.setattr(ArenaStore, "release", late)
    longest = max(prompts, key=len)
    with open_llm(tiny_model, cold_bytes=(2 << 20) + 35 * CHUNK_BYTES) as llm:
        chunks = -(-(len(longest) + 8) // 16)
        assert chunks < llm.memory.arena.slots < 2 * chunks
        for prompt in (longest, longest[::-1]):
            (answer,) = llm.generate([prompt], max_tokens=8, ignore_eos=True)
            assert len(answer.token_ids) == 8
        llm.engine.flush()
        assert len(released) == 2
