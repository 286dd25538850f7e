"""The window cycle alone: when it requests predictions, and what it does with their results.

The pool, the arena and the copy thread are real. The indexer answers what a test says, when it says it.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from forecache.indexer.records.scores import EVENT_SHARE
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Prediction, PredictRequest, StepState
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import GenerateRequest, Policy, SamplingParams
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Capture, Captured
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.hot.completions import Recalled, WrittenBack
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import PROBE_TOKENS, WindowCycle, make_capture

CHUNK = 16
LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=CHUNK, dtype=torch.float32)
CHUNKS = 40
BUDGET = 8
"""Of 40 chunks a fifth may be resident: the first, the last two, and five by their scores."""
WINDOW = 16

Scores = npt.NDArray[np.float32]


class Scripted:
    """An indexer that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[PredictRequest] = []
        self.answers: list[Future[Prediction]] = []

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        self.asked.append(request)
        self.answers.append(Future())
        return self.answers[-1]

    def close(self) -> None: ...


class Spare(Reservations):
    """Budgets with as many spare slots as the test says."""

    spare_slots = 0


class Bench:
    """A window cycle with the parts of an engine that it needs."""

    def __init__(self, directory: str, slots: int, history_steps: int | None, settings: dict[str, Any]) -> None:
        self.arena = Arena.create(
            Path(directory),
            "window",
            layout=LAYOUT,
            index_nbytes=8,
            index_fingerprint="index",
            capacity_bytes=(2 << 20) + 200 * LAYOUT.nbytes,
        )
        self.pool = HotPool(LAYOUT, slots, torch.device("cpu"))
        self.prefetcher = Prefetcher(self.pool, ArenaStore(self.arena), lambda slot: self.pool.memory[slot, :8])
        self.indexer = Scripted()
        self.reservations = Spare(slots)
        self.high = 0.1
        more = {} if history_steps is None else {"history_steps": history_steps}
        defaults = {"keep_ratio": 0.2, "chunk_tokens": CHUNK, "window_steps": WINDOW, "lead_steps": 4}
        self.windows = WindowCycle(
            EngineConfig(**(defaults | settings)),
            SelectionConfig(min_chunks=4),
            self.pool,
            self.arena,
            self.prefetcher,
            self.indexer,
            self.reservations,
            **more,
        )
        self.sequences: list[TokenSequence] = []

    def add(
        self,
        name: str = "a",
        *,
        tail: int = 5,
        policy: Policy = "lookahead",
        keep: float = 0.2,
        seed: int = 0,
        show_chunks: bool = False,
    ) -> TokenSequence:
        """A prefilled sequence: its chunks are in cold memory, and ``tail`` tokens follow."""
        prompt = tuple((number * 7 + ord(name[0])) % 250 for number in range(CHUNKS * CHUNK + tail))
        sampling = SamplingParams(max_tokens=160, seed=seed)
        seq = TokenSequence(
            GenerateRequest(name, prompt, sampling, show_chunks=show_chunks),
            holder=name,
            root=root_key(name),
            chunk_tokens=CHUNK,
            keep_ratio=keep,
            policy=policy,
        )
        self.sequences.append(seq)
        seq.residency.reserved_slots = self.windows.budgets.slots(seq, 1)
        for _ in range(CHUNKS):
            slot = self.pool.allocate()
            assert slot is not None
            self.pool.memory[slot] = len(seq.chunks) + 1
            seq.num_computed += CHUNK
            self._complete(seq, slot)
            self.pool.release(slot)
        self.store()
        self.pool.evict_all()
        seq.num_computed += tail
        seq.open_slots[CHUNKS] = self.slot()
        seq.token_ids.append(5)
        seq.state = State.RECALLING
        return seq

    def slot(self) -> int:
        slot = self.pool.allocate()
        assert slot is not None
        return slot

    def _complete(self, seq: TokenSequence, slot: int) -> None:
        chunk = seq.complete_chunk()
        self.pool.complete(slot, chunk.key, dirty=True)
        self.prefetcher.write_back(seq.holder, chunk.key, slot)

    def store(self) -> list[Recalled]:
        """Wait for the copies, and pass completed recalls on."""
        self.prefetcher.flush()
        recalls = []
        for done in self.prefetcher.drain():
            if isinstance(done, WrittenBack):
                assert done.ref is not None
                self.pool.mark_clean(done.slot)
                seq = next(seq for seq in self.sequences if seq.holder == done.holder)
                seq.stored_at(seq.chunk_of[done.key], done.ref)
            elif isinstance(done, Recalled):
                recalls.append(done)
                assert self.windows.recalled(done) is None
        return recalls

    def begin(self, seq: TokenSequence, *best: int, retrieval_heads: bool = False, share: float = 0.1) -> None:
        """Begin: the first set takes over, with the chunks ``best`` and the always resident ones."""
        self.windows.begin(seq, scores_of(len(seq.chunks), *best, high=share), retrieval_heads=retrieval_heads)
        self.store()
        assert self.windows.poll(seq) == ()

    def step(self, seq: TokenSequence, *, answered: bool = True) -> Capture | None:
        """Run a decode step; its queries go to the indexer unless ``answered`` is false."""
        capture = self.windows.capture(3, seq)
        seq.num_computed += 1
        if seq.tail_tokens == CHUNK:
            number = len(seq.chunks)
            seq.residency.slots[number] = seq.open_slots.pop(number)
            self._complete(seq, seq.residency.slots[number])
            seq.open_slots[number + 1] = self.slot()
            seq.residency.version += 1
        self.windows.stepped(seq)
        seq.token_ids.append(5)
        if capture is not None and answered:
            self.windows.captured(captured(capture))
        self.store()
        return capture

    def steps_until_asked(self, seq: TokenSequence) -> int:
        """The decode steps at which a prediction was requested."""
        asked = len(self.indexer.asked)
        for _ in range(200):
            self.step(seq)
            if len(self.indexer.asked) > asked:
                return seq.residency.decode_steps
            assert self.windows.poll(seq) == ()
        raise AssertionError("none was asked for")

    def answer(
        self, seq: TokenSequence, *best: int, events: dict[int, float] | None = None, missing: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Answer the last prediction with the highest scores so far for ``best``, and wait for the copies.

        ``events``: the event mass of some chunks.
        """
        chunks = len(self.indexer.asked[-1].index_slots)
        self.high += 0.1
        mass = None if events is None else masses(chunks, events)
        prediction = Prediction(seq.request_id, scores_of(chunks, *best, high=self.high), missing, mass)
        self.indexer.answers[-1].set_result(prediction)
        missing = self.windows.poll(seq)
        self.store()
        return missing

    def turn(self, seq: TokenSequence, *best: int) -> int:
        """Run one window; returns the number of steps until it ended."""
        self.steps_until_asked(seq)
        self.answer(seq, *best)
        return self.until_swapped(seq)

    def until_swapped(self, seq: TokenSequence) -> int:
        for _ in range(200):
            if self.windows.poll(seq) == () and not self.waiting_turn(seq):
                return seq.residency.decode_steps
            self.step(seq)
        raise AssertionError("it never took over")

    def waiting_turn(self, seq: TokenSequence) -> bool:
        return seq.residency.pending is not None

    def close(self) -> None:
        self.prefetcher.flush()
        self.store()
        for seq in self.sequences:
            self.windows.forget(seq)
            for slot in [*seq.residency.slots.values(), *seq.open_slots.values()]:
                self.pool.release(slot)
            residency = seq.residency
            assert residency.pending is residency.awaited_boundary is residency.waiting_since_s is None
            assert residency.early_scores is None
        self.pool.check_integrity()
        assert self.pool.referenced == 0
        assert not self.windows._recalling
        self.prefetcher.close()
        self.arena.close()


@contextmanager
def opened(slots: int = 90, history_steps: int | None = None, **settings: Any) -> Iterator[Bench]:
    with TemporaryDirectory(prefix="window-test-", dir="/dev/shm") as directory:
        bench = Bench(directory, slots, history_steps, settings)
        yield bench
        bench.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with opened() as bench:
        yield bench


def scores_of(chunks: int, *best: int, high: float = 0.1) -> Scores:
    """Scores that decrease over ``best``, and are zero for other chunks."""
    scores = np.zeros(chunks, dtype=np.float32)
    for rank, number in enumerate(best):
        scores[number] = high * (1 - rank / 1000)
    return scores


def masses(chunks: int, events: dict[int, float]) -> Scores:
    mass = np.zeros(chunks, dtype=np.float32)
    mass[list(events)] = list(events.values())
    return mass


def captured(capture: Capture, **more: Any) -> Captured:
    queries = np.full((2, 8), capture.position, dtype=np.float32)
    lse = np.full(2, 0.5, dtype=np.float32)
    return Captured(capture, queries, lse, np.zeros((len(capture.local_slots), 8), dtype=np.uint8), **more)


def kept(*best: int, chunks: int = CHUNKS) -> list[int]:
    """The set that scores with ``best`` choose."""
    return sorted([0, *best, chunks - 2, chunks - 1])


FIRST, SECOND, THIRD = (3, 5, 7, 9, 11), (13, 15, 17, 19, 21), (23, 25, 27, 29, 31)


def test_the_first_set_is_of_the_chunks_with_the_largest_mass(bench: Bench) -> None:
    seq = bench.add()
    bench.windows.begin(seq, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
    assert bench.windows.blocked(seq) is True and seq.residency.copying is True
    assert len(seq.residency.incoming_slots) == BUDGET and seq.residency.slots == {}
    (recall,) = bench.store()
    assert recall.recalled_chunks == BUDGET
    assert seq.residency.copying is False
    version = seq.residency.version
    assert bench.windows.poll(seq) == ()
    assert sorted(seq.residency.slots) == kept(*FIRST)
    for number, slot in seq.residency.slots.items():
        assert (bench.pool.memory[slot] == number + 1).all()
    assert seq.state is State.DECODE and seq.residency.version == version + 1
    assert seq.residency.incoming_slots == [] and bench.windows.blocked(seq) is False
    assert seq.residency.copying is False and bench.windows.poll(seq) == ()
    assert (seq.counters.windows, seq.counters.recalled_chunks) == (0, BUDGET)


def test_what_is_hot_already_is_not_recalled(bench: Bench) -> None:
    first = bench.add()
    bench.begin(first, *FIRST)
    again = bench.add("a2")
    again.chunks, again.chunk_of = first.chunks, first.chunk_of  # a common prefix
    bench.windows.begin(again, scores_of(CHUNKS, *FIRST[:4], 13), retrieval_heads=False)
    assert again.residency.copying
    (recall,) = bench.store()
    bench.windows.poll(again)
    assert recall.recalled_chunks == again.counters.recalled_chunks == 1
    shared = [slot for number, slot in again.residency.slots.items() if number != 13]
    assert len(shared) == 7 and all(bench.pool.references(slot) == 2 for slot in shared)
    third = bench.add("a3")
    third.chunks = first.chunks
    bench.windows.begin(third, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
    assert not third.residency.copying  # nothing to copy
    assert sorted(third.residency.slots) == []
    bench.windows.poll(third)
    assert sorted(third.residency.slots) == kept(*FIRST) and third.state is State.DECODE


def test_a_set_waits_until_the_pool_has_slots_for_all_of_it(bench: Bench) -> None:
    seq = bench.add()
    taken = [bench.slot() for _ in range(bench.pool.available)]
    bench.windows.begin(seq, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
    for slot in taken[:BUDGET]:
        assert bench.windows.poll(seq) == ()
        assert not seq.residency.copying and seq.residency.incoming_slots == [] and seq.residency.slots == {}
        assert bench.windows.blocked(seq) is True
        bench.pool.release(slot)
    bench.windows.poll(seq)
    assert seq.residency.copying and bench.pool.available == 0
    bench.store()
    bench.windows.poll(seq)
    assert sorted(seq.residency.slots) == kept(*FIRST)
    for slot in taken[BUDGET:]:
        bench.pool.release(slot)


def test_a_lost_chunk_is_named_and_its_slot_is_not_to_be_found(bench: Bench) -> None:
    seq = bench.add()
    bench.windows.begin(seq, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
    turn = seq.residency.pending
    assert turn is not None
    lost = turn.copying[0]
    bench.prefetcher.flush()
    (done,) = [done for done in bench.prefetcher.drain() if isinstance(done, Recalled)]
    assert bench.windows.recalled(Recalled(done.ticket + 1, (), 0, 0.0, 0)) is None  # somebody else's
    assert seq.residency.copying
    assert bench.windows.recalled(Recalled(done.ticket, (lost,), 0, 0.0, 0)) is seq
    assert not seq.residency.copying
    assert bench.pool.lookup(lost.key) is None
    assert all(bench.pool.lookup(item.key) == item.slot for item in turn.copying[1:])
    assert bench.pool.dirty == 0
    bench.windows.forget(seq)
    bench.pool.check_integrity()
    assert bench.windows.recalled(done) is None


def test_predictions_are_asked_for_ahead_of_boundaries_that_double(bench: Bench) -> None:
    """Boundaries 2, 4, 8 and 16, the window: each prediction starts after the boundary before, at most four steps
    ahead."""
    seq = bench.add()
    bench.begin(seq, *FIRST)
    asked, swapped = [], []
    for best in (SECOND, THIRD, FIRST, SECOND):
        asked.append(bench.steps_until_asked(seq))
        bench.answer(seq, *best)
        swapped.append(bench.until_swapped(seq))
    assert asked == [1, 3, 5, 12]
    assert swapped == [2, 4, 8, 16]
    assert (seq.counters.windows, seq.counters.late_windows) == (4, 0)
    assert set(kept(*SECOND)[:-2]) <= set(seq.residency.slots)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_later_boundaries_are_a_window_apart_and_staggered(name: str) -> None:
    """By up to half a window, once, depending on the prompt."""
    with opened() as bench:
        seq = bench.add(name)
        bench.begin(seq, *FIRST)
        ends = [bench.turn(seq, *best) for best in (SECOND, THIRD, FIRST, SECOND, THIRD, FIRST, SECOND)]
        part = zlib.crc32(np.array(seq.request.prompt_token_ids, dtype="<i4").tobytes()) % (WINDOW // 2)
        assert part > 0
        assert ends == [2, 4, 8, 16, 32 - part, 48 - part, 64 - part]


def test_a_window_that_is_no_power_of_two_ends_the_doubling() -> None:
    with opened(window_steps=12) as bench:
        seq = bench.add("a")
        bench.begin(seq, *FIRST)
        ends = [bench.turn(seq, *best) for best in (SECOND, THIRD, FIRST, SECOND, THIRD)]
        part = zlib.crc32(np.array(seq.request.prompt_token_ids, dtype="<i4").tobytes()) % 6
        assert part > 0
        assert ends == [2, 4, 8, 20 - part, 32 - part]


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_windows_of_two_steps_are_not_staggered(name: str) -> None:
    with opened(window_steps=2) as bench:
        seq = bench.add(name)
        bench.begin(seq, *FIRST)
        assert [bench.turn(seq, *best) for best in (SECOND, THIRD, FIRST)] == [2, 4, 6]


def test_a_prediction_is_asked_with_what_its_step_captured(bench: Bench) -> None:
    seq = bench.add()
    bench.begin(seq, *FIRST)
    capture = bench.windows.capture(3, seq)
    assert capture is not None
    assert (capture.row, capture.boundary, capture.position, capture.chunks) == (3, 2, CHUNKS * CHUNK + 5, CHUNKS)
    bench.windows.stepped(seq)
    state, weights = StepState(7, 1, np.zeros((1, 2), np.float16)), np.ones(2, np.float32)
    done = captured(capture, state=state, weights=weights)
    bench.windows.captured(done)
    (request,) = bench.indexer.asked
    assert (request.sequence_id, request.arena_path) == ("a", str(bench.arena.path))
    assert request.index_slots is capture.ref_slots and request.generations is capture.generations
    assert request.queries is done.queries and request.local_lse is done.tail_lse
    assert request.local_records is done.records and request.state is state and request.weights is weights
    bench.prefetcher.drain()
    assert not bench.prefetcher.wait(0)
    bench.indexer.answers[0].set_result(Prediction("a", scores_of(CHUNKS, *SECOND)))
    assert bench.prefetcher.wait(0)  # a thread that waits for completions is woken


def test_the_history_that_an_indexer_wants_is_captured() -> None:
    with opened(history_steps=PROBE_TOKENS + 8) as bench:
        assert bench.windows.fresh_tokens == PROBE_TOKENS + 8
        seq = bench.add()
        bench.begin(seq, *FIRST)
        capture = bench.step(seq)
        assert capture is not None and len(capture.recent_slots) == 3
    with opened() as bench:
        assert bench.windows.fresh_tokens == PROBE_TOKENS
        seq = bench.add()
        bench.begin(seq, *FIRST)
        capture = bench.step(seq)
        assert capture is not None and capture.recent_slots == (seq.open_slots[CHUNKS],)


def test_what_a_step_captured_for_another_time_is_dropped(bench: Bench) -> None:
    seq = bench.add()
    bench.begin(seq, *FIRST)
    capture = bench.step(seq, answered=False)
    assert capture is not None
    done = captured(capture)
    for change in ("state", "streamed", "restarts"):
        owner: object = seq.residency if change == "streamed" else seq
        before = getattr(owner, change)
        setattr(owner, change, {"state": State.RECALLING, "streamed": True, "restarts": 1}[change])
        bench.windows.captured(done)
        assert bench.indexer.asked == []
        setattr(owner, change, before)
    seq.residency.boundary = 4
    bench.windows.captured(done)
    assert bench.indexer.asked == []
    seq.residency.boundary = 2
    bench.windows.captured(done)
    bench.windows.captured(done)  # the turn is there
    assert len(bench.indexer.asked) == 1


def test_an_answer_is_chosen_from_and_takes_over_at_its_boundary(bench: Bench) -> None:
    seq = bench.add(tail=2)
    bench.begin(seq, *FIRST)
    for best in (SECOND, THIRD, FIRST):
        bench.turn(seq, *best)
    assert bench.steps_until_asked(seq) == 12
    assert sorted(seq.residency.slots) == kept(*FIRST)
    version, recalled = seq.residency.version, seq.counters.recalled_chunks
    assert bench.windows.poll(seq) == ()
    assert bench.answer(seq, *SECOND, missing=(4, 6)) == (4, 6)
    assert len(seq.residency.incoming_slots) == 5
    while seq.residency.decode_steps < 15:
        bench.step(seq)
        assert bench.windows.poll(seq) == ()
        assert set(kept(*FIRST)) <= set(seq.residency.slots)
    assert CHUNKS in seq.residency.slots and seq.residency.version == version + 1  # completed since
    bench.step(seq)
    assert bench.windows.poll(seq) == ()
    assert sorted(seq.residency.slots) == [*kept(*SECOND), CHUNKS]
    assert seq.residency.version == version + 2
    assert seq.counters.recalled_chunks == recalled  # the second set was hot still


@pytest.mark.parametrize("wrong", [RuntimeError("no indexer"), float("nan"), float("inf")])
def test_without_a_prediction_the_old_set_stays(bench: Bench, wrong: Exception | float) -> None:
    seq = bench.add()
    bench.begin(seq, *FIRST)
    bench.steps_until_asked(seq)
    if isinstance(wrong, Exception):
        bench.indexer.answers[-1].set_exception(wrong)
    else:
        scores = scores_of(CHUNKS, *SECOND)
        scores[8] = wrong
        bench.indexer.answers[-1].set_result(Prediction("a", scores, missing=(3,)))
    assert bench.windows.poll(seq) == ()
    assert seq.counters.failed_predictions == 1
    assert seq.residency.incoming_slots == []
    assert bench.until_swapped(seq) == 2
    assert sorted(seq.residency.slots) == kept(*FIRST)
    assert seq.counters.windows == 1 and seq.counters.recalled_chunks == BUDGET


def test_an_answer_that_is_late_takes_over_when_it_is_there(bench: Bench) -> None:
    """The next boundary does not move."""
    seq = bench.add()
    bench.begin(seq, *FIRST)
    bench.steps_until_asked(seq)
    while seq.residency.decode_steps < 7:
        assert bench.windows.capture(0, seq) is None  # one at a time
        bench.step(seq)
        assert bench.windows.poll(seq) == ()
    bench.answer(seq, *SECOND)
    assert bench.until_swapped(seq) == 7
    assert sorted(seq.residency.slots) == kept(*SECOND)
    assert (seq.counters.windows, seq.counters.late_windows) == (1, 1)
    capture = bench.windows.capture(0, seq)
    assert capture is not None and capture.boundary == 8


@pytest.mark.parametrize("lead, asked", [(0, [2, 4, 8, 16]), (12, [1, 3, 5, 9])])
def test_a_prediction_has_its_lead(lead: int, asked: list[int]) -> None:
    with opened(lead_steps=lead) as bench:
        seq = bench.add()
        bench.begin(seq, *FIRST)
        steps = []
        for best in (SECOND, THIRD, FIRST, SECOND):
            steps.append(bench.steps_until_asked(seq))
            bench.answer(seq, *best)
            bench.until_swapped(seq)
        assert steps == asked


@pytest.mark.parametrize("remote, lead", [(0, 4), (1, 12)])
def test_chunks_of_other_nodes_are_asked_for_earlier(remote: int, lead: int) -> None:
    with opened(remote_lead_steps=12) as bench:
        seq = bench.add()
        bench.begin(seq, *FIRST)
        for best in (SECOND, THIRD, FIRST, SECOND, THIRD):
            end = bench.turn(seq, *best)
        seq.remote_chunks = remote
        assert bench.steps_until_asked(seq) == end + WINDOW - lead
        bench.windows.poll(seq)


def test_a_boundary_is_not_asked_after_before_the_one_in_front_of_it() -> None:
    """This also holds after a set that took over early."""
    with opened(fallback=True, lead_steps=12) as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add()
        bench.begin(seq, *FIRST)
        bench.turn(seq, *SECOND)
        bench.turn(seq, *THIRD)
        assert bench.steps_until_asked(seq) == 5
        bench.answer(seq, *FIRST, events={13: 5.0})
        assert bench.until_swapped(seq) == 5  # urgent, instead of at 8
        assert bench.steps_until_asked(seq) == 8
        bench.answer(seq, *SECOND)
        assert bench.until_swapped(seq) == 16


@pytest.mark.parametrize("policy", ["recency", "random"])
def test_policies_without_predictions_choose_at_the_same_steps(bench: Bench, policy: Policy) -> None:
    seq = bench.add(policy=policy)
    bench.windows.begin(seq, None, retrieval_heads=True)
    bench.store()
    bench.windows.poll(seq)
    assert seq.state is State.DECODE and len(seq.residency.slots) == BUDGET
    first = set(seq.residency.slots)
    assert bench.step(seq) is None
    assert bench.waiting_turn(seq)
    bench.windows.poll(seq)
    assert set(seq.residency.slots) == first
    bench.step(seq)
    bench.windows.poll(seq)
    assert seq.counters.windows == 1 and seq.residency.decode_steps == 2
    assert (set(seq.residency.slots) == first) == (policy == "recency")
    assert bench.step(seq) is None
    assert bench.waiting_turn(seq)
    assert bench.indexer.asked == []


@pytest.mark.parametrize("seed", [5, -3])
def test_random_sets_follow_from_the_seeds_and_the_step(seed: int) -> None:
    with opened(seed=seed) as bench:
        seq = bench.add(policy="random", seed=seed)
        seq.residency.decode_steps = 7
        bench.windows.begin(seq, None, retrieval_heads=False)
        bench.store()
        bench.windows.poll(seq)
        rng = np.random.default_rng([seed % 4294967296, seed % 4294967296, 7])
        drawn = rng.choice(np.arange(1, CHUNKS - 2), 5, replace=False).tolist()
        assert sorted(seq.residency.slots) == kept(*drawn)


def test_full_attention_keeps_everything_and_turns_no_more(bench: Bench) -> None:
    seq = bench.add(policy="full")
    bench.windows.begin(seq, None, retrieval_heads=True)
    bench.store()
    bench.windows.poll(seq)
    assert sorted(seq.residency.slots) == list(range(CHUNKS))
    for _ in range(3):
        assert bench.step(seq) is None
        assert not bench.waiting_turn(seq)
    everything = bench.add("all", keep=1.0)  # its policy would ask
    seq.policy = "lookahead"
    bench.windows.forget(seq)
    for slot in seq.residency.slots.values():
        bench.pool.release(slot)
    seq.residency.slots.clear()
    bench.begin(everything, *FIRST)
    assert bench.step(everything) is None and not bench.waiting_turn(everything)
    everything.keep_ratio, everything.residency.streamed = 0.2, True
    assert bench.step(everything) is None and not bench.waiting_turn(everything)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("forecache.workers.residency.window.time.perf_counter", lambda: self.now_s)


def test_a_late_set_is_waited_for_a_little_in_the_first_window(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(early_wait_s=0.5) as bench:
        seq = bench.add()
        bench.windows.begin(seq, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
        for _ in range(2):
            assert bench.windows.blocked(seq) is True  # without a first set it can't begin
            clock.now_s += 1000
        bench.store()
        bench.windows.poll(seq)
        for number, boundary in enumerate((2, 4, 8, 16)):
            assert bench.windows.blocked(seq) is False
            bench.steps_until_asked(seq)
            while seq.residency.decode_steps < boundary:
                assert bench.windows.blocked(seq) is False
                bench.step(seq)
            assert bench.windows.blocked(seq) is True
            clock.now_s += 0.25
            assert bench.windows.blocked(seq) is True
            if number % 2:
                clock.now_s += 0.25
                assert bench.windows.blocked(seq) is False
            bench.answer(seq, *SECOND)
            bench.windows.poll(seq)
            clock.now_s += 0.25
        bench.steps_until_asked(seq)
        while seq.residency.decode_steps < 40:
            bench.step(seq)
            assert bench.windows.blocked(seq) is False  # later it does not wait


def test_waiting_policy_waits_at_every_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(late_policy="wait") as bench:
        seq = bench.add()
        bench.begin(seq, *FIRST)
        for best in (SECOND, THIRD, FIRST, SECOND, THIRD):
            while bench.step(seq, answered=False) is None:
                assert bench.windows.blocked(seq) is False
            boundary = seq.residency.boundary
            while seq.residency.decode_steps < boundary:
                assert bench.windows.blocked(seq) is False
                capture = make_capture(0, seq, boundary, bench.pool, 1)
                bench.step(seq, answered=False)
            for _ in range(2):
                assert bench.windows.blocked(seq) is True  # its queries are not there yet
                clock.now_s += 1000
            capture = make_capture(0, seq, boundary, bench.pool, 1)
            bench.windows.captured(captured(capture))
            assert bench.windows.blocked(seq) is True
            bench.answer(seq, *best)
            bench.windows.poll(seq)
            assert bench.windows.blocked(seq) is False


@pytest.mark.parametrize("fallback", [False, True])
def test_what_may_be_urgent_is_waited_for_from_when_it_was_asked(fallback: bool) -> None:
    """With reproducible runs. After the first window nothing is urgent."""
    with opened(late_policy="wait", fallback=fallback) as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add()
        bench.begin(seq, *FIRST)
        for best in (SECOND, THIRD, FIRST):
            bench.turn(seq, *best)
        while (capture := bench.step(seq, answered=False)) is None:
            assert bench.windows.blocked(seq) is False
        assert seq.residency.decode_steps == 12
        assert bench.windows.blocked(seq) is fallback
        bench.windows.captured(captured(capture))
        assert bench.windows.blocked(seq) is fallback
        bench.answer(seq, *SECOND)
        assert bench.windows.blocked(seq) is False
        bench.until_swapped(seq)
        bench.steps_until_asked(seq)
        assert bench.windows.blocked(seq) is False
        bench.windows.poll(seq)


def test_without_reproducible_runs_nothing_is_waited_for_ahead() -> None:
    with opened(fallback=True) as bench:
        seq = bench.add()
        bench.begin(seq, *FIRST)
        for best in (SECOND, THIRD, FIRST):
            bench.turn(seq, *best)
        assert bench.steps_until_asked(seq) == 12
        assert bench.windows.blocked(seq) is False


def test_one_that_starts_over_is_waited_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(early_wait_s=0.5) as bench:
        seq = bench.add()
        for _ in range(2):
            bench.begin(seq, *FIRST)
            for _ in range(2):
                bench.step(seq, answered=False)
            assert bench.windows.blocked(seq) is True
            clock.now_s += 10
            assert bench.windows.blocked(seq) is False
            bench.windows.forget(seq)
            assert bench.windows.blocked(seq) is False
            for slot in seq.residency.slots.values():
                bench.pool.release(slot)
            seq.residency.slots.clear()
            seq.residency.decode_steps, seq.state = 0, State.RECALLING


def test_a_late_set_that_is_hot_takes_over_at_once(bench: Bench) -> None:
    seq = bench.add()
    bench.begin(seq, *FIRST)
    bench.steps_until_asked(seq)
    bench.step(seq)
    bench.answer(seq, *FIRST)
    assert not bench.waiting_turn(seq) and seq.counters.windows == 1


def test_who_leaves_gives_everything_back(bench: Bench) -> None:
    """Slots of the pending set, the awaited prediction, and early scores."""
    seq = bench.add()
    bench.begin(seq, *FIRST)
    bench.turn(seq, *SECOND)
    bench.steps_until_asked(seq)
    bench.windows.forget(seq)
    assert bench.indexer.answers[-1].cancelled()
    assert not bench.waiting_turn(seq) and seq.residency.incoming_slots == []
    other = bench.add("b")
    before = bench.pool.referenced
    bench.windows.begin(other, scores_of(CHUNKS, *THIRD), retrieval_heads=False)
    bench.store()
    assert bench.pool.referenced == before + BUDGET
    bench.windows.forget(other)
    assert bench.pool.referenced == before
    bench.windows.forget(other)  # twice does no harm


def test_where_its_chunks_are_is_shown_to_those_who_watch(bench: Bench) -> None:
    seq, unwatched = bench.add(show_chunks=True), bench.add("b")
    bench.begin(seq, *FIRST)
    view = bench.windows.view(seq)
    assert view is not None and view.states.count("h") == BUDGET + 1
    assert bench.windows.view(seq) is None  # no news
    bench.steps_until_asked(seq)
    bench.answer(seq, *SECOND)
    view = bench.windows.view(seq)
    assert view is not None and view.states.count("p") == 5
    assert bench.windows.view(unwatched) is None


@pytest.mark.parametrize("reserved, spare, incoming", [(4, 0, 3), (4, 2, 5), (1, 0, 0), (0, 0, 0)])
def test_a_first_set_is_as_large_as_there_are_slots_for(bench: Bench, reserved: int, spare: int, incoming: int) -> None:
    """The open chunk has a slot; the chunks with the highest scores come first."""
    seq = bench.add()
    seq.residency.reserved_slots, bench.reservations.spare_slots = reserved, spare
    bench.begin(seq, 11, 3, 9, 5, 7)
    assert set(seq.residency.slots) == {11, 3, 9, 5, 7} & set([11, 3, 9, 5, 7][:incoming])


@pytest.mark.parametrize("tail, filling", [(0, 1), (14, 1), (15, 1)])
def test_a_first_set_leaves_slots_for_the_tokens_of_the_coming_step(bench: Bench, tail: int, filling: int) -> None:
    seq = bench.add(tail=tail)
    seq.residency.reserved_slots = 4
    bench.begin(seq, 11, 3, 9, 5, 7)
    assert len(seq.residency.slots) == 4 - filling


@pytest.mark.parametrize("tail, filling", [(13, 1), (14, 2)])
def test_a_set_leaves_slots_for_the_tokens_up_to_its_boundary(bench: Bench, tail: int, filling: int) -> None:
    """The boundary is one step away, and the step after it needs one more slot."""
    seq = bench.add(tail=tail, policy="random")
    bench.windows.begin(seq, None, retrieval_heads=False)
    bench.store()
    bench.windows.poll(seq)
    seq.residency.reserved_slots = BUDGET + 3
    bench.step(seq)
    assert len(seq.residency.incoming_slots) == 3 - filling


def test_chunks_that_others_may_not_find_are_taken_where_they_are(bench: Bench) -> None:
    seq = bench.add()
    slot = bench.slot()
    seq.held_back[7] = slot
    bench.begin(seq, *FIRST)
    assert seq.residency.slots[7] == slot and bench.pool.references(slot) == 2
    assert seq.counters.recalled_chunks == BUDGET - 1
    bench.pool.release(slot)


def test_hot_chunks_that_a_set_takes_are_no_room_for_others(bench: Bench) -> None:
    again, seq = bench.add("a2"), bench.add()
    again.chunks = seq.chunks
    bench.begin(seq, *FIRST)
    for slot in seq.residency.slots.values():
        bench.pool.release(slot)  # cached: available, unless wanted
    seq.residency.slots.clear()
    taken = [bench.slot() for _ in range(bench.pool.available - BUDGET)]
    assert bench.pool.available == BUDGET
    taken += [bench.slot()]  # evicts one of the set
    bench.windows.begin(again, scores_of(CHUNKS, *FIRST), retrieval_heads=False)
    assert again.residency.incoming_slots == [] and bench.pool.available == BUDGET - 1
    bench.pool.release(taken.pop())
    bench.windows.poll(again)
    assert len(again.residency.incoming_slots) == BUDGET
    bench.store()
    bench.windows.poll(again)
    assert sorted(again.residency.slots) == kept(*FIRST) and again.counters.recalled_chunks == 1
    for slot in taken:
        bench.pool.release(slot)


LOOKED_AT = tuple(range(3, 23))
"""So many chunks that a first budget holds few of them."""


@pytest.mark.parametrize(
    "share, heads, widening", [(EVENT_SHARE, True, 2), (EVENT_SHARE - 0.01, True, 1), (EVENT_SHARE, False, 1)]
)
def test_a_first_set_that_is_too_small_for_its_events_is_doubled(share: float, heads: bool, widening: int) -> None:
    with opened(fallback=True) as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add()
        mass = np.zeros(CHUNKS + 1, dtype=np.float32)  # of the open chunk too
        mass[list(LOOKED_AT)] = share
        bench.windows.begin(seq, mass, retrieval_heads=heads)
        bench.store()
        bench.windows.poll(seq)
        assert seq.residency.widening == widening and len(seq.residency.slots) == BUDGET * widening
        assert seq.counters.fallbacks == widening - 1 and seq.counters.refused_fallbacks == 0


@pytest.mark.parametrize("slots, spare, refused", [(90, 0, 1), (50, 60, 0), (90, 60, 0)])
def test_a_first_set_is_doubled_as_often_as_there_is_room(slots: int, spare: int, refused: int) -> None:
    """But not beyond the pool, and not into reserved slots of others."""
    with opened(slots, fallback=True, coverage_floor=1.0, keep_ratio=0.2) as bench:
        bench.reservations.spare_slots = spare
        seq = bench.add()
        reserved = seq.residency.reserved_slots
        if slots < 90:
            seq.keep_ratio = 0.45
        chosen = bench.windows.budgets.first(seq, CHUNKS)
        seq.residency.reserved_slots = bench.windows.budgets.slots(seq, 1)
        assert bench.windows.budgets.streams(seq) == (slots < 90)
        bench.begin(seq, *range(2, 38), retrieval_heads=True, share=0.9)
        assert seq.counters.refused_fallbacks == refused
        widened = slots == 90 and spare == 60
        assert (seq.residency.widening > 1, len(seq.residency.slots) > chosen) == (widened, widened)
        assert not seq.residency.streamed and (seq.residency.reserved_slots > reserved or not widened)


def urgent(bench: Bench, seq: TokenSequence, turns: int) -> None:
    """``turns`` sets without events, then one with an event on a chunk that is not resident."""
    bench.begin(seq, *FIRST)
    for best in (SECOND, THIRD, FIRST, SECOND, THIRD)[:turns]:
        bench.turn(seq, *best)
    bench.steps_until_asked(seq)
    bench.answer(seq, 10, 12, 14, 16, 18, events={10: 5.0})


@pytest.mark.parametrize("turns, is_urgent", [(0, True), (3, True), (4, False)])
def test_low_coverage_doubles_the_budget_and_is_urgent_in_the_first_window(turns: int, is_urgent: bool) -> None:
    with opened(fallback=True) as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add()
        urgent(bench, seq, turns)
        assert (seq.residency.widening, seq.counters.fallbacks, seq.counters.event_misses) == (2, 1, 1)
        asked = seq.residency.decode_steps
        assert bench.windows.blocked(seq) is is_urgent
        swapped = bench.until_swapped(seq)
        assert (swapped == asked) == is_urgent
        assert {10, 12, 14, 16, 18} <= set(seq.residency.slots) and len(seq.residency.slots) >= 2 * BUDGET


def test_an_urgent_set_is_waited_for_before_its_boundary() -> None:
    with opened(fallback=True, late_policy="wait") as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add()
        bench.begin(seq, *FIRST)
        bench.pool.evict_all()
        bench.steps_until_asked(seq)
        prediction = Prediction("a", scores_of(CHUNKS, 10), event_mass=masses(CHUNKS, {10: 5.0}))
        bench.indexer.answers[-1].set_result(prediction)
        bench.windows.poll(seq)
        assert seq.residency.copying and seq.residency.decode_steps == 1
        assert bench.windows.blocked(seq) is True
        bench.store()
        bench.windows.poll(seq)
        assert 10 in seq.residency.slots and bench.windows.blocked(seq) is False


def test_the_last_step_is_to_stream_everything() -> None:
    with opened(50, fallback=True) as bench:
        bench.reservations.spare_slots = 60
        seq = bench.add(keep=0.45)
        bench.begin(seq, *FIRST)
        held, version = len(seq.residency.slots), seq.residency.version
        assert bench.windows.budgets.streams(seq)
        bench.steps_until_asked(seq)
        referenced = bench.pool.referenced
        assert bench.answer(seq, *SECOND, events={2: 5.0}, missing=(9,)) == (9,)
        assert seq.residency.streamed and seq.counters.fallbacks == 1 and seq.residency.widening == 1
        assert seq.residency.slots == {} and seq.residency.version == version + 1
        assert bench.pool.referenced == referenced - held == 1
        assert seq.residency.reserved_slots == 2
        assert not bench.waiting_turn(seq) and bench.windows.poll(seq) == ()
        assert bench.windows.blocked(seq) is False


HALF, REST = (10, 12, 14, 16, 18), (23, 25, 27, 29, 31)


def widened(bench: Bench) -> TokenSequence:
    """A sequence with twice its first budget: the chunks ``HALF``, with higher scores, and ``REST``."""
    bench.reservations.spare_slots = 60
    seq = bench.add()
    urgent(bench, seq, 0)
    bench.until_swapped(seq)
    bench.steps_until_asked(seq)
    bench.answer(seq, *HALF, *REST, events={})
    bench.until_swapped(seq)
    assert seq.residency.widening == 2 and seq.residency.steady_boundaries == 1
    seq.residency.steady_boundaries = 0
    return seq


@pytest.mark.parametrize("looked_at, narrowed", [(HALF[-1], True), (REST[0], False)])
def test_a_budget_halves_when_half_of_it_would_do(looked_at: int, narrowed: bool) -> None:
    """It halves when, twice in a row, all events fell on the better half of the set."""
    with opened(fallback=True) as bench:
        seq = widened(bench)
        reserved = seq.residency.reserved_slots
        for _ in range(2):
            assert seq.residency.widening == 2
            bench.steps_until_asked(seq)
            bench.answer(seq, *HALF, *REST, events={looked_at: 5.0})
            bench.until_swapped(seq)
        assert seq.residency.widening == (1 if narrowed else 2)
        assert seq.counters.fallbacks == 1  # what was halved wrongly would be doubled again
        assert (seq.residency.reserved_slots < reserved) == narrowed
        if narrowed:
            assert seq.residency.reserved_slots == bench.windows.budgets.slots(seq, 1)
