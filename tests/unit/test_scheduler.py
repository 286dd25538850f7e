"""Admission and steps: what is promised fits, first come is first served, prefill leaves room for running streams."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.decode.mass_probe import PROBE_TOKENS
from forecache.workers.decode.messages import GenerateRequest, Policy, SamplingParams
from forecache.workers.decode.scheduler import STREAMED_SHARE, PrefillRate, Scheduler
from forecache.workers.decode.sequence import Sequence, State
from forecache.workers.llm import LLM
from forecache.workers.memory.keys import root_key

CHUNK = 16
CHUNK_BYTES = 3 * 2 * 2 * CHUNK * 16 * 4
SLOTS = 64


@contextmanager
def opened(model: Path, tmp_path: Path, **settings: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {
        "keep_ratio": 0.25,
        "chunk_tokens": CHUNK,
        "cold_bytes": 4 << 20,
        "window_steps": 32,
        "hot_bytes": SLOTS * CHUNK_BYTES,
        "max_batch_size": 4,
        "prefill_chunk_tokens": 128,
    }
    with LLM(str(model), skip_tokenizer=True, arena_dir=tmp_path, **(defaults | settings)) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """For its pool and its window cycle; it runs nothing, so that every test finds the pool empty."""
    with opened(tiny_model, tmp_path_factory.mktemp("arena")) as llm:
        yield llm


class Bench:
    """A scheduler of its own over the pool of ``llm``, with what an engine does to sequences between plans."""

    def __init__(self, llm: LLM, *, cold_slots: int = 1000) -> None:
        self.pool = llm.engine.pool
        self.scheduler = Scheduler(
            llm.engine.config, self.pool, llm.engine.windows, cold_slots=cold_slots, linear_equal=100.0
        )
        self.located: list[str] = []

    def add(
        self, name: str, prompt: int, *, answer: int = 16, policy: Policy = "lookahead", keep: float = 0.25
    ) -> Sequence:
        request = GenerateRequest(name, tuple([5] * prompt), SamplingParams(max_tokens=answer))
        seq = Sequence(request, holder=name, root=root_key("x"), chunk_tokens=CHUNK, keep_ratio=keep, policy=policy)
        self.scheduler.add(seq)
        return seq

    def admit(self) -> list[str]:
        def locate(seq: Sequence) -> None:
            assert seq.state is State.LOCATING
            seq.state = State.PREFILL
            self.located.append(seq.request_id)

        self.scheduler.admit(locate)
        return [seq.request_id for seq in self.scheduler.running]

    def pool_is_promised_to_others(self, seq: Sequence) -> None:
        """Nothing is left for ``seq`` beyond its own reservation."""
        other = self.add("other", 1)
        self.admit()
        other.state = State.RECALLING
        other.reserved_slots = self.pool.num_slots - seq.reserved_slots

    def leave(self, seq: Sequence) -> None:
        self.scheduler.remove(seq)
        for slot in seq.open_slots.values():
            self.pool.release(slot)
        seq.open_slots.clear()

    def reserved(self) -> int:
        return sum(seq.reserved_slots for seq in self.scheduler.running)

    def close(self) -> None:
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            self.leave(seq)
        self.pool.check_integrity()
        assert self.pool.referenced == 0


@pytest.fixture
def bench(llm: LLM) -> Iterator[Bench]:
    bench = Bench(llm)
    yield bench
    bench.close()


def finish_prefill(seq: Sequence) -> None:
    """All of the prompt is computed, and the first token of the answer is known."""
    seq.num_computed = seq.prompt_len
    while seq.tail_tokens >= CHUNK:
        seq.complete_chunk()
    seq.token_ids.append(5)
    seq.state = State.DECODE


@given(
    linear=st.floats(1, 1e5),
    past=st.integers(0, 200_000),
    tokens=st.integers(1, 8192),
    duration_s=st.floats(1e-3, 1e3),
)
def test_what_took_a_time_fits_in_that_time(linear: float, past: int, tokens: int, duration_s: float) -> None:
    rate = PrefillRate(linear)
    rate.observe(tokens, past, duration_s)
    fitting = rate.tokens_in(duration_s, past)
    assert fitting is not None
    assert abs(fitting - tokens) <= 1
    further = rate.tokens_in(duration_s, past + 1000)
    assert further is not None
    assert further <= fitting


def test_nothing_is_known_of_the_rate_before_a_step() -> None:
    assert PrefillRate(10.0).tokens_in(1.0, 0) is None


def test_the_rate_follows_what_is_seen() -> None:
    rate = PrefillRate(1000.0)
    rate.observe(100, 0, 1.0)
    first = rate.work_per_s
    assert first == 100 * 1050
    for _ in range(20):
        rate.observe(100, 0, 2.0)
    assert rate.work_per_s == pytest.approx(first / 2, rel=1e-3)
    rate.observe(100, 0, 0.0)  # a clock that did not move is no reason to divide by zero
    assert rate.work_per_s is not None


def test_a_budget_is_reserved_with_room_for_a_turn(bench: Bench) -> None:
    seq = bench.add("a", 640, answer=16, keep=0.25)
    bench.admit()
    assert seq.max_chunks == 41
    budget = 11  # ⌈41 / 4⌉
    assert seq.reserved_slots == budget + 6 + 32 // CHUNK + 2
    assert not seq.streamed


def test_full_attention_reserves_everything(bench: Bench) -> None:
    seq = bench.add("a", 640, policy="full")
    bench.admit()
    assert seq.reserved_slots == seq.max_chunks + 1
    assert not seq.streamed


def test_full_attention_over_more_than_the_pool_is_streamed(bench: Bench) -> None:
    seq = bench.add("a", SLOTS * CHUNK, policy="full")
    assert bench.admit() == ["a"]
    assert seq.streamed
    assert seq.reserved_slots == 128 // CHUNK + 1


def test_a_budget_larger_than_the_pool_is_streamed(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_model, tmp_path, hot_bytes=6 * CHUNK_BYTES) as llm:
        bench = Bench(llm)
        seq = bench.add("a", 1000)
        assert bench.admit() == ["a"]
        assert seq.streamed
        assert seq.reserved_slots <= 6
        bench.close()


def test_first_come_first_served(bench: Bench) -> None:
    first = bench.add("a", 16 * 40, policy="full")
    bench.add("b", 16 * 40, policy="full")  # does not fit beside the first
    bench.add("c", 16)  # would, but it came later
    assert bench.admit() == ["a"]
    assert bench.admit() == ["a"]
    bench.leave(first)
    assert bench.admit() == ["b", "c"]
    assert bench.located == ["a", "b", "c"]


def test_one_that_starts_over_goes_first(bench: Bench) -> None:
    bench.add("a", 16)
    again = bench.add("b", 16)
    bench.scheduler.remove(again)
    bench.scheduler.add(again, first=True)
    assert bench.admit() == ["b", "a"]


def test_a_batch_has_a_size(bench: Bench) -> None:
    for name in "abcde":
        bench.add(name, 16)
    assert bench.admit() == ["a", "b", "c", "d"]
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["e"]


def test_cold_memory_has_a_size(llm: LLM) -> None:
    bench = Bench(llm, cold_slots=10)
    first = bench.add("a", 16 * 4)
    bench.add("b", 16 * 4)
    bench.add("c", 16)
    assert (first.max_chunks, bench.admit()) == (5, ["a", "b"])
    bench.leave(first)
    assert bench.admit() == ["b", "c"]
    bench.close()


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 1500), st.integers(1, 300), st.sampled_from(["full", "lookahead"])), max_size=9
    ),
    leaving=st.lists(st.integers(0, 8), max_size=9),
)
def test_promises_never_exceed_the_pool_and_nobody_starves(
    llm: LLM, prompts: list[tuple[int, int, Policy]], leaving: list[int]
) -> None:
    bench = Bench(llm, cold_slots=200)
    for number, (prompt, answer, policy) in enumerate(prompts):
        bench.add(str(number), prompt, answer=answer, policy=policy)
    for index in [*leaving, *range(len(prompts))]:
        running = bench.admit()
        assert bench.reserved() <= SLOTS
        assert sum(seq.max_chunks for seq in bench.scheduler.running) <= 200
        assert len(running) <= 4
        assert running or not bench.scheduler.waiting
        if running:
            bench.leave(bench.scheduler.running[index % len(running)])
    assert bench.located == [str(number) for number in range(len(prompts))]
    bench.close()


def test_a_prompt_alone_is_prefilled_in_large_steps(bench: Bench) -> None:
    seq = bench.add("a", 300)
    bench.admit()
    steps = []
    while seq.num_computed < seq.prompt_len:
        (part,) = bench.scheduler.next_plan().streams
        assert set(seq.open_slots) >= set(
            range(seq.num_computed // CHUNK, -(-(seq.num_computed + part.tokens) // CHUNK))
        )
        steps.append((part.tokens, part.probe))
        seq.num_computed += part.tokens
        while seq.tail_tokens >= CHUNK:
            bench.pool.release(seq.open_slots.pop(len(seq.chunks)))
            seq.complete_chunk()
    # the first set is chosen by the attention of the last tokens
    assert steps == [(128, 0), (128, 0), (44, PROBE_TOKENS)]


@given(tokens=st.integers(1, 400))
def test_the_first_set_is_chosen_by_the_last_tokens_of_a_prompt_however_it_is_cut(llm: LLM, tokens: int) -> None:
    bench = Bench(llm)
    seq = bench.add("a", tokens)
    bench.admit()
    looked_at: list[int] = []
    while seq.num_computed < tokens:
        (part,) = bench.scheduler.next_plan().streams
        seq.num_computed += part.tokens
        looked_at += range(seq.num_computed - part.probe, seq.num_computed)
        while seq.tail_tokens >= CHUNK:
            seq.complete_chunk()
    bench.leave(seq)
    bench.close()
    assert looked_at == list(range(max(tokens - PROBE_TOKENS, 0), tokens))


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(bench: Bench) -> None:
    """Nor does a long one starve beside short ones that keep coming: it has at least every other step."""
    long = bench.add("long", 3000)
    bench.admit()
    bench.scheduler.next_plan()
    short = bench.add("short", 100)
    bench.admit()
    steps = 0
    while short.num_computed < short.prompt_len:
        for part in bench.scheduler.next_plan().streams:
            part.sequence.num_computed += part.tokens
        steps += 1
        assert steps <= 2
    turns = []
    for number in range(12):
        if short.num_computed >= short.prompt_len:
            bench.leave(short)
            short = bench.add(f"short {number}", 100)
            bench.admit()
        streams = bench.scheduler.next_plan().streams
        turns.append(streams[0].sequence)
        streams[0].sequence.num_computed += streams[0].tokens
    assert turns.count(long) == 6 and long not in [b for a, b in itertools.pairwise(turns) if a is long]


def test_a_step_of_prefill_stays_within_the_reservation(bench: Bench) -> None:
    seq = bench.add("a", 20, answer=1)
    bench.admit()
    seq.reserved_slots = 1
    bench.pool_is_promised_to_others(seq)
    (part,) = bench.scheduler.next_plan().streams
    assert part.tokens == CHUNK


def test_prefill_beside_a_stream_takes_its_share_of_time(bench: Bench, llm: LLM) -> None:
    running, coming = bench.add("a", 40), bench.add("b", 600)
    bench.admit()
    finish_prefill(running)
    plan = bench.scheduler.next_plan()
    assert plan.decode == (running,)
    assert [part.tokens for part in plan.streams] == [16]  # the least, while the rate is unknown
    bench.scheduler.rate.observe(50, 0, llm.engine.config.prefill_slice_s)
    plan = bench.scheduler.next_plan()
    assert [(part.sequence, part.tokens) for part in plan.streams] == [(coming, 50)]
    bench.scheduler.rate.work_per_s = 1.0  # a very slow machine goes on nevertheless
    assert [part.tokens for part in bench.scheduler.next_plan().streams] == [16]


def test_a_streamed_sequence_takes_a_share_of_the_steps(bench: Bench) -> None:
    row, streamed = bench.add("a", 40), bench.add("b", 700, policy="full")
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.streamed = True
    plans = [bench.scheduler.next_plan() for _ in range(3 * STREAMED_SHARE)]
    assert all(plan.decode == (row,) for plan in plans)
    assert sum(len(plan.streams) for plan in plans) == 3
    assert all(part.sequence is streamed and part.tokens == 1 for plan in plans for part in plan.streams)
    bench.leave(row)
    assert all(len(bench.scheduler.next_plan().streams) == 1 for _ in range(STREAMED_SHARE))


def test_streamed_sequences_take_turns(bench: Bench) -> None:
    row, *streamed = (bench.add(name, 40) for name in "abc")
    bench.admit()
    for seq in (row, *streamed):
        finish_prefill(seq)
    for seq in streamed:
        seq.streamed = True
    plans = [bench.scheduler.next_plan() for _ in range(4 * STREAMED_SHARE)]
    assert all(plan.decode == (row,) for plan in plans)
    lane = [part.sequence for plan in plans for part in plan.streams]
    assert len(lane) == 4
    assert [lane.count(seq) for seq in streamed] == [2, 2]
    bench.leave(row)
    assert {part.sequence for part in bench.scheduler.next_plan().streams} == set(streamed)


def test_a_lane_step_that_took_long_is_paid_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("forecache.workers.decode.scheduler.time.perf_counter", lambda: now_s)
    row, streamed = bench.add("a", 40), bench.add("b", 40)
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.streamed = True

    def until_the_lane_opens(step_s: float) -> int:
        nonlocal now_s
        for others in range(1000):
            expected = bench.scheduler.streams_next
            plan = bench.scheduler.next_plan()
            assert plan.decode == (row,)
            assert expected == bool(plan.streams)
            if plan.streams:
                now_s += 2.0
                bench.scheduler.observe(plan, 2.0)
                return others
            now_s += step_s
        raise AssertionError("the lane never opened")

    assert until_the_lane_opens(0.1) == STREAMED_SHARE - 1
    # two seconds for the streamed sequence, then at least six for the others
    assert until_the_lane_opens(0.1) >= (STREAMED_SHARE - 1) * 2.0 / 0.1
    assert until_the_lane_opens(10.0) == STREAMED_SHARE - 1


def test_without_a_free_slot_the_step_is_empty_and_says_so(bench: Bench) -> None:
    seq = bench.add("a", 300)
    bench.admit()
    taken = [slot for _ in range(SLOTS - 2) if (slot := bench.pool.allocate()) is not None]
    assert bench.scheduler.next_plan().tokens == 2 * CHUNK  # as far as the slots go
    assert bench.scheduler.stalled
    seq.num_computed = 2 * CHUNK
    seq.complete_chunk()
    seq.complete_chunk()
    assert bench.scheduler.next_plan().tokens == 0
    assert bench.scheduler.stalled
    bench.pool.release(taken.pop())
    assert bench.scheduler.next_plan().tokens == CHUNK
    for slot in taken:
        bench.pool.release(slot)
    assert bench.scheduler.next_plan().tokens == 128
    assert not bench.scheduler.stalled


def test_nothing_to_do_is_an_empty_plan(bench: Bench) -> None:
    assert bench.scheduler.next_plan().tokens == 0
    seq = bench.add("a", 16)
    bench.admit()
    seq.state = State.RECALLING
    assert bench.scheduler.next_plan().tokens == 0
