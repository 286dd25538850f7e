"""Admission and step plans: reservations fit the pool, requests start in order, decode goes on during prefill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from forecache.workers.core.grammar import Matcher
from forecache.workers.core.prompt_logprobs import MAX_STEP_TOKENS
from forecache.workers.core.requests import GenerateRequest, Policy, SamplingParams
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.engine.scheduler import STREAMED_SHARE, Scheduler
from forecache.workers.engine.step_cost import StepWork
from forecache.workers.llm import LLM
from forecache.workers.memory.format.keys import root_key
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import PROBE_TOKENS

CHUNK = 16
CHUNK_BYTES = 3 * 2 * 2 * CHUNK * 16 * 4
SLOTS = 64


@contextmanager
def opened(model: Path, tmp_path: Path, **settings: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {
        "keep_ratio": 0.25,
        "min_resident_tokens": 0,
        "chunk_tokens": CHUNK,
        "cold_bytes": 4 << 20,
        "window_steps": 32,
        "hot_bytes": SLOTS * CHUNK_BYTES,
        "max_batch_size": 4,
        "max_step_tokens": 128,
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

    def __init__(self, llm: LLM, *, cold_slots: int = 1000, **settings: Any) -> None:
        self.pool = llm.engine.pool
        self.windows = llm.engine.windows
        self.scheduler = Scheduler(
            llm.engine.config.model_copy(update=settings),
            self.pool,
            self.windows,
            Reservations(self.pool.num_slots),
            cold_slots=cold_slots,
            linear_equal=100.0,
        )
        self.located: list[str] = []

    def add(
        self,
        name: str,
        prompt: int,
        *,
        answer: int = 16,
        policy: Policy = "lookahead",
        keep: float = 0.25,
        resumed: int = 0,
        prompt_logprobs: bool = False,
        matcher: Matcher | None = None,
        priority: int = 0,
    ) -> TokenSequence:
        sampling = SamplingParams(max_tokens=answer, prompt_logprobs=prompt_logprobs)
        request = GenerateRequest(name, (5,) * prompt, sampling, resume_token_ids=(5,) * resumed, priority=priority)
        seq = TokenSequence(
            request,
            holder=name,
            root=root_key("x"),
            chunk_tokens=CHUNK,
            keep_ratio=keep,
            policy=policy,
            matcher=matcher,
        )
        self.scheduler.add(seq)
        return seq

    def admit(self, releasing_slots: int = 0) -> list[str]:
        admitted = self.scheduler.admit(releasing_slots) if releasing_slots else self.scheduler.admit()
        for seq in admitted:
            assert seq.state is State.LOCATING
            seq.state = State.PREFILL
            self.located.append(seq.request_id)
        return [seq.request_id for seq in self.scheduler.running]

    def compute(self, plan: Plan) -> None:
        """What ``plan`` prefills is computed, and its chunks are in cold memory."""
        for part in plan.streams:
            seq = part.sequence
            seq.num_computed += part.tokens
            while seq.tail_tokens >= CHUNK:
                self.pool.release(seq.open_slots.pop(len(seq.chunks)))
                seq.complete_chunk()

    def pool_is_promised_to_others(self, seq: TokenSequence) -> None:
        """Nothing is left for ``seq`` beyond its own reservation."""
        other = self.add("other", 1)
        self.admit()
        other.state = State.RECALLING
        other.residency.reserved_slots = self.pool.num_slots - seq.residency.reserved_slots

    def leave(self, seq: TokenSequence) -> None:
        self.scheduler.remove(seq)
        for slot in seq.open_slots.values():
            self.pool.release(slot)
        seq.open_slots.clear()

    def reserved(self) -> int:
        return sum(seq.residency.reserved_slots for seq in self.scheduler.running)

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


def finish_prefill(seq: TokenSequence) -> None:
    """All of the prompt is computed, and the first token of the answer is known."""
    seq.num_computed = seq.prompt_len
    while seq.tail_tokens >= CHUNK:
        seq.complete_chunk()
    seq.token_ids.append(5)
    seq.state = State.DECODE


def test_a_budget_is_reserved_with_room_for_a_turn(bench: Bench) -> None:
    seq = bench.add("a", 640, answer=16, keep=0.25)
    bench.admit()
    assert seq.max_chunks == 41
    budget = 11  # ⌈41 / 4⌉
    assert seq.residency.reserved_slots == budget + 6 + 32 // CHUNK + 2
    assert not seq.residency.streamed


def test_full_attention_reserves_everything(bench: Bench) -> None:
    seq = bench.add("a", 640, policy="full")
    bench.admit()
    assert seq.residency.reserved_slots == seq.max_chunks + 1
    assert not seq.residency.streamed


def test_full_attention_over_more_than_the_pool_is_streamed(bench: Bench) -> None:
    seq = bench.add("a", SLOTS * CHUNK, policy="full")
    assert bench.admit() == ["a"]
    assert seq.residency.streamed
    assert seq.residency.reserved_slots == 128 // CHUNK + 1


def test_a_budget_larger_than_the_pool_is_streamed(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_model, tmp_path, hot_bytes=6 * CHUNK_BYTES) as llm:
        bench = Bench(llm)
        seq = bench.add("a", 1000)
        assert bench.admit() == ["a"]
        assert seq.residency.streamed
        assert seq.residency.reserved_slots <= 6
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


def test_lower_priorities_go_first(llm: LLM) -> None:
    bench = Bench(llm, max_batch_size=3)
    for name, priority in (("a", 5), ("b", 0), ("c", -3), ("d", 5), ("e", 0), ("f", -3)):
        bench.add(name, 16, priority=priority)
    assert bench.admit() == ["c", "f", "b"]
    late = bench.add("late", 16, priority=-9)
    assert bench.admit() == ["c", "f", "b"]  # what runs keeps its place
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["late", "e", "a", "d"]
    bench.leave(bench.scheduler.running[1])
    assert bench.admit() == ["c", "b", "late"]
    assert [part[0] for part in parts(bench.scheduler.next_plan())] == ["late", "c", "b"]
    bench.leave(late)
    bench.close()


def test_one_that_starts_over_goes_first_of_its_priority(bench: Bench) -> None:
    for name, priority in (("first", 0), ("a", 1), ("b", 1), ("c", 1)):
        bench.add(name, 16, priority=priority)
    for again in (bench.scheduler.waiting[2], bench.scheduler.waiting[3]):
        bench.scheduler.remove(again)
        bench.scheduler.add(again, first=True)
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["first", "c", "b", "a"]


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
    """Nor does a long one starve when short ones keep coming: it has a part of every other step."""
    long = bench.add("long", 3000)
    bench.admit()
    assert parts(bench.scheduler.next_plan()) == [("long", 128)]
    steps = []
    for number in range(6):
        short = bench.add(f"short {number}", 100)
        bench.admit()
        plan = bench.scheduler.next_plan()
        steps.append(parts(plan))
        bench.compute(plan)
        if short.num_computed < short.prompt_len:
            plan = bench.scheduler.next_plan()
            steps.append(parts(plan))
            bench.compute(plan)
        assert short.num_computed == short.prompt_len
        bench.leave(short)
    assert steps[:4] == [
        [("short 0", 100)],
        [("short 1", 96), ("long", 32)],
        [("short 1", 4)],
        [("short 2", 96), ("long", 32)],
    ]
    assert sum(name == "long" for step in steps for name, _ in step) == 5
    assert long.num_computed == 5 * 32


def test_a_step_of_prefill_stays_within_the_reservation(bench: Bench) -> None:
    seq = bench.add("a", 20, answer=1)
    bench.admit()
    seq.residency.reserved_slots = 1
    bench.pool_is_promised_to_others(seq)
    (part,) = bench.scheduler.next_plan().streams
    assert part.tokens == CHUNK


def test_a_step_with_a_decode_row_takes_the_target(bench: Bench, llm: LLM) -> None:
    running, coming = bench.add("a", 40), bench.add("b", 600)
    bench.admit()
    finish_prefill(running)
    plan = bench.scheduler.next_plan()
    assert plan.decode == (running,)
    assert parts(plan) == [("b", 16)]  # the least, while no duration is known
    target_s = llm.engine.config.inter_token_target_s
    assert target_s is not None
    cost = bench.scheduler.cost
    for tokens in (20, 40, 80, 100) * 10:
        cost.observe(StepWork(1).with_slice(tokens, 0), target_s * (0.2 + tokens / 100))
    plan = bench.scheduler.next_plan()
    assert plan.decode == (running,)
    ((name, tokens),) = parts(plan)
    assert name == "b" and 70 <= tokens <= 80
    assert cost.duration_s(StepWork(1).with_slice(tokens, 0)) <= target_s
    for tokens in (10, 20, 40, 60) * 20:  # a slow machine goes on nevertheless, in slices that are worth their steps
        cost.observe(StepWork(1).with_slice(tokens, 0), target_s * (10 + tokens / 2))
    ((_, tokens),) = parts(bench.scheduler.next_plan())
    assert 26 <= tokens <= 34  # 1.5 times 10 targets
    assert coming.num_computed == 0


def test_a_streamed_sequence_takes_a_share_of_the_steps(bench: Bench) -> None:
    row, streamed = bench.add("a", 40), bench.add("b", 700, policy="full")
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.residency.streamed = True
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
        seq.residency.streamed = True
    plans = [bench.scheduler.next_plan() for _ in range(4 * STREAMED_SHARE)]
    assert all(plan.decode == (row,) for plan in plans)
    lane = [part.sequence for plan in plans for part in plan.streams]
    assert len(lane) == 4
    assert [lane.count(seq) for seq in streamed] == [2, 2]
    bench.leave(row)
    assert {part.sequence for part in bench.scheduler.next_plan().streams} == set(streamed)


def test_a_lane_step_that_took_long_is_paid_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("forecache.workers.engine.scheduler.time.perf_counter", lambda: now_s)
    row, streamed = bench.add("a", 40), bench.add("b", 40)
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.residency.streamed = True

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


def known_as_fast(bench: Bench) -> None:
    """Every prompt fits in any time."""
    for tokens in (100, 1000):
        bench.scheduler.cost.observe(StepWork(1).with_slice(tokens, 0), tokens * 1e-9)


def parts(plan: Plan) -> list[tuple[str, int]]:
    return [(part.sequence.request_id, part.tokens) for part in plan.streams]


@pytest.mark.parametrize(
    "late_policy, policy, keep, prompt, replayed",
    [
        ("wait", "lookahead", 0.25, 640, True),
        ("keep", "lookahead", 0.25, 640, False),
        ("wait", "full", 1.0, 640, False),  # it attends to everything: prefill gives the same
        ("wait", "lookahead", 0.5, 1420, False),  # and so does what is streamed
    ],
)
def test_an_answer_over_partial_sets_is_decoded_again_where_runs_are_reproducible(
    llm: LLM, late_policy: str, policy: Policy, keep: float, prompt: int, replayed: bool
) -> None:
    bench = Bench(llm, late_policy=late_policy)
    seq = bench.add("a", prompt, policy=policy, keep=keep, resumed=7)
    assert seq.residency.streamed == (prompt > SLOTS * CHUNK)
    assert (seq.prefill_target, seq.replayed_tokens) == ((prompt, 7) if replayed else (prompt + 7, 0))
    bench.close()


def test_what_fills_the_pool_to_its_last_slot_fits(bench: Bench) -> None:
    seq = bench.add("a", (SLOTS - 1) * CHUNK - 16, policy="full")
    assert seq.residency.reserved_slots == SLOTS and not seq.residency.streamed
    other = bench.add("b", 16)
    seq.residency.reserved_slots = SLOTS - other.residency.reserved_slots
    assert bench.admit() == ["a", "b"]
    assert bench.scheduler._reservations.spare_slots == 0


def test_a_streamed_prompt_is_promised_the_whole_pool_where_its_steps_are_large(llm: LLM) -> None:
    bench = Bench(llm, max_step_tokens=2 * SLOTS * CHUNK)
    seq = bench.add("a", SLOTS * CHUNK - 16, policy="full")
    assert (seq.max_chunks, seq.residency.streamed, seq.residency.reserved_slots) == (SLOTS, True, SLOTS)
    bench.close()


def test_what_leaves_holds_its_cold_slots_until_they_are_given_back(llm: LLM) -> None:
    bench = Bench(llm, cold_slots=10)
    bench.add("a", 16 * 4)
    bench.add("b", 16 * 4)
    assert bench.admit(releasing_slots=6) == []
    assert bench.admit(releasing_slots=1) == ["a"]
    assert bench.admit() == ["a", "b"]
    bench.close()


def test_what_was_prefilled_is_counted_from_nothing(bench: Bench) -> None:
    """Decode rows and streamed steps are no prefill; a prompt counts when its last token is computed."""
    scheduler = bench.scheduler
    assert (scheduler.prefilled_tokens, scheduler.prefilled_prompts, scheduler.prefill_s) == (0, 0, 0.0)
    assert not scheduler.stalled
    long, short, answer = bench.add("long", 100), bench.add("short", 20), bench.add("answer", 20)
    bench.admit()
    finish_prefill(answer)
    scheduler.observe(Plan((answer,), (StreamPart(long, 60), StreamPart(short, 20))), 2.0)
    assert (scheduler.prefilled_tokens, scheduler.prefilled_prompts, scheduler.prefill_s) == (80, 1, 2.0)
    scheduler.observe(Plan((), (StreamPart(answer, 1), StreamPart(long, 50))), 0.5)
    assert (scheduler.prefilled_tokens, scheduler.prefilled_prompts, scheduler.prefill_s) == (130, 1, 2.5)
    scheduler.observe(Plan((answer,), (StreamPart(answer, 1),)), 4.0)
    assert (scheduler.prefilled_tokens, scheduler.prefilled_prompts, scheduler.prefill_s) == (130, 1, 2.5)


def test_costs_are_learned_from_steps_of_decode_rows_and_prompts_alone(bench: Bench) -> None:
    first, second = bench.add("a", 100), bench.add("b", 100)
    row = bench.add("row", 20)
    bench.admit()
    finish_prefill(row)
    first.num_computed = 32
    scheduler = bench.scheduler
    for plan in (Plan((), ()), Plan((row,), ()), Plan((), (StreamPart(row, 1), StreamPart(first, 50)))):
        scheduler.observe(plan, 1.0)
        assert not scheduler.cost.known
    scheduler.observe(Plan((row,), (StreamPart(first, 50), StreamPart(second, 30))), 0.5)
    work = StepWork(rows=1, tokens=80, attention=50 * (32 + 25) + 30 * 15, past=32)
    assert scheduler.cost.duration_s(work) == pytest.approx(0.5)


def test_a_streamed_sequence_has_every_fourth_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("forecache.workers.engine.scheduler.time.perf_counter", lambda: now_s)
    row, streamed = bench.add("a", 32), bench.add("b", 40)
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.residency.streamed = True

    def lane(steps: int) -> list[bool]:
        return [bool(bench.scheduler.next_plan().streams) for _ in range(steps)]

    assert lane(8) == [False, False, False, True] * 2
    plan = Plan((row,), (StreamPart(streamed, 1),))
    bench.scheduler.observe(plan, 2.0)  # three times as long for the others
    now_s = 5.9
    assert lane(4) == [False] * 4
    now_s = 6.0
    assert lane(4) == [False, False, False, True]
    bench.scheduler.observe(Plan((row,), (StreamPart(row, 1),)), 0.1)
    bench.scheduler.observe(Plan((row,), ()), 1000.0)  # no streamed step: it closes nothing
    now_s = 7.0
    assert lane(4) == [False, False, False, True]
    coming = bench.add("c", 40)
    bench.admit()
    bench.leave(row)
    assert coming.state is State.PREFILL  # it is another that waits, as is a decode row
    assert [len([part for part in bench.scheduler.next_plan().streams if part.tokens == 1]) for _ in range(4)] == [
        0,
        0,
        0,
        1,
    ]


def test_prefill_keeps_no_lane_shut(bench: Bench) -> None:
    row, streamed, coming = bench.add("a", 32), bench.add("b", 40), bench.add("c", 40)
    bench.admit()
    finish_prefill(row)
    finish_prefill(streamed)
    streamed.residency.streamed = True
    bench.scheduler.observe(Plan((row,), (StreamPart(coming, 16),)), 1e9)
    bench.leave(coming)
    assert any(bench.scheduler.next_plan().streams for _ in range(4))


def test_it_is_known_ahead_whether_a_step_is_of_decode_rows_alone(bench: Bench) -> None:
    row, coming = bench.add("a", 32), bench.add("b", 40)
    bench.admit()
    finish_prefill(row)
    assert bench.scheduler.streams_next is True
    bench.leave(coming)
    assert bench.scheduler.streams_next is False
    row.residency.streamed = True
    assert bench.scheduler.streams_next is True


def test_a_step_opens_the_slots_that_it_writes_and_no_others(bench: Bench) -> None:
    row, streamed = bench.add("a", 2 * CHUNK, answer=64), bench.add("b", CHUNK + 15)
    bench.admit()
    for seq in (row, streamed):
        finish_prefill(seq)
    streamed.residency.streamed = True
    for _ in range(4):
        plan = bench.scheduler.next_plan()
    assert plan.decode == (row,) and parts(plan) == [("b", 1)]
    assert plan.captures == ()
    assert (list(row.open_slots), list(streamed.open_slots)) == ([2], [1])
    row.num_computed = 3 * CHUNK - 1
    assert bench.scheduler.next_plan().decode == (row,)
    assert list(row.open_slots) == [2]
    bench.leave(row)
    coming = bench.add("c", 40)
    bench.admit()
    bench.leave(streamed)
    assert parts(bench.scheduler.next_plan()) == [("c", 40)]
    assert list(coming.open_slots) == [0, 1, 2]
    taken = bench.pool.available
    assert taken == SLOTS - 3


def test_prompts_share_a_step_as_far_as_it_goes(bench: Bench) -> None:
    first, second, third = bench.add("a", 100), bench.add("b", 120), bench.add("c", 30)
    bench.admit()
    plan = bench.scheduler.next_plan()
    assert parts(plan) == [("a", 100), ("b", 28)]
    bench.compute(plan)
    bench.leave(first)
    second.prefill_target = second.num_computed + 10
    plan = bench.scheduler.next_plan()
    assert parts(plan) == [("b", 10), ("c", 30)]
    bench.compute(plan)
    bench.leave(second)
    bench.leave(third)
    for number in range(4):
        bench.add(f"{number}", 7 + number)
    bench.admit()
    assert parts(bench.scheduler.next_plan()) == [("0", 7), ("1", 8), ("2", 9), ("3", 10)]


def test_one_long_prompt_advances_after_the_other(bench: Bench, llm: LLM) -> None:
    bench.add("long", 300)
    bench.add("longer", 400)
    bench.admit()
    steps = []
    for _ in range(6):
        plan = bench.scheduler.next_plan()
        steps.append(parts(plan))
        bench.compute(plan)
        for part in plan.streams:
            if part.sequence.num_computed >= part.sequence.prompt_len:
                bench.leave(part.sequence)
    assert steps == [
        [("long", 128)],
        [("long", 128)],
        [("long", 44)],
        *[[("longer", 128)]] * 3,
    ]
    both = Bench(llm, max_long_partial_prefills=2, long_prefill_token_threshold=20, max_step_tokens=64)
    for name, prompt in (("a", 40), ("b", 30), ("c", 25)):
        both.add(name, prompt)
    both.admit()
    assert parts(both.scheduler.next_plan()) == [("a", 40)]  # nothing is known of how long "b" would delay it
    known_as_fast(both)
    assert parts(both.scheduler.next_plan()) == [("a", 40), ("b", 24)]
    both.close()


def test_the_last_token_of_a_step_is_another_prompts(bench: Bench) -> None:
    for name, prompt in (("a", 127), ("b", 100)):
        bench.add(name, prompt)
    bench.admit()
    assert parts(bench.scheduler.next_plan()) == [("a", 127), ("b", 1)]


def test_prompts_are_packed_into_a_step_with_a_decode_row(bench: Bench) -> None:
    known_as_fast(bench)
    row, *_ = (bench.add(name, 32) for name in "abcd")
    bench.admit()
    finish_prefill(row)
    plan = bench.scheduler.next_plan()
    assert plan.decode == (row,)
    assert parts(plan) == [("b", 32), ("c", 32), ("d", 32)]
    bench.scheduler.remove(row)
    bench.add("e", 32)
    bench.admit()
    assert parts(bench.scheduler.next_plan()) == [(name, 32) for name in "bcde"]
    bench.scheduler.running.append(row)
    assert parts(bench.scheduler.next_plan())[-1] == ("e", 31)  # the decode row is one of the step's 128 tokens


def test_the_first_of_two_prompts_may_use_the_spare_slots(bench: Bench) -> None:
    first, second = bench.add("a", 100), bench.add("b", 100)
    bench.admit()
    first.residency.reserved_slots, second.residency.reserved_slots = 1, 1
    other = bench.add("other", 1)
    bench.admit()
    other.state = State.RECALLING
    other.residency.reserved_slots = SLOTS - 2 - 3
    assert parts(bench.scheduler.next_plan()) == [("a", 4 * CHUNK), ("b", CHUNK)]


def test_a_step_of_prefill_counts_the_chunk_that_is_half_full(bench: Bench) -> None:
    seq = bench.add("a", 100)
    bench.admit()
    seq.num_computed = CHUNK + 5
    seq.complete_chunk()
    seq.residency.reserved_slots = 2
    bench.pool_is_promised_to_others(seq)
    assert parts(bench.scheduler.next_plan()) == [("a", 2 * CHUNK - 5)]


def test_a_sequence_that_waits_for_its_set_does_not_decode(bench: Bench) -> None:
    row, waiting = bench.add("a", 16), bench.add("b", 500, policy="full")
    bench.admit()
    finish_prefill(row)
    finish_prefill(waiting)
    assert bench.scheduler.next_plan().decode == (row, waiting)
    taken = [slot for _ in range(bench.pool.available) if (slot := bench.pool.allocate()) is not None]
    bench.windows.begin(waiting, None, retrieval_heads=False)  # finds no slots: its first set does not come
    assert bench.scheduler.next_plan().decode == (row,)
    bench.windows.forget(waiting)
    for slot in taken:
        bench.pool.release(slot)
    assert bench.scheduler.next_plan().decode == (row, waiting)


def test_an_answer_with_a_grammar_waits_for_the_token_on_its_way(bench: Bench) -> None:
    grammar = LLMatcher.grammar_from_regex("a*")
    free = bench.add("a", 16)
    bound = bench.add("b", 16, matcher=Matcher(LLMatcher(LLTokenizer("byte"), grammar, log_level=0)))
    bench.admit()
    for seq in (free, bound):
        finish_prefill(seq)
    assert bench.scheduler.next_plan().decode == (free, bound)
    for seq in (free, bound):
        seq.num_computed += 1  # launched, its token not read
    assert bench.scheduler.next_plan().decode == (free,)
    bound.token_ids.append(5)
    assert bench.scheduler.next_plan().decode == (free, bound)


def test_no_token_is_computed_behind_the_last_one(bench: Bench) -> None:
    seq = bench.add("a", 16, answer=2)
    bench.admit()
    finish_prefill(seq)
    assert bench.scheduler.next_plan().decode == (seq,)
    seq.num_computed += 1  # the second token is on its way
    assert bench.scheduler.next_plan().decode == ()


@pytest.mark.parametrize("policy, streamed", [("full", False), ("lookahead", True), ("random", False)])
def test_only_a_set_that_attention_chooses_is_asked_for(bench: Bench, policy: Policy, streamed: bool) -> None:
    seq = bench.add("a", 100, policy=policy)
    bench.admit()
    seq.residency.streamed = streamed
    assert [part.probe for part in bench.scheduler.next_plan().streams] == [0]


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """With a pool for large steps of prefill."""
    with opened(tiny_model, tmp_path_factory.mktemp("arena"), hot_bytes=400 * CHUNK_BYTES) as llm:
        yield llm


def test_large_steps_of_prefill_are_of_round_size(wide: LLM) -> None:
    bench = Bench(wide, max_step_tokens=2500)
    seq = bench.add("a", 5000, keep=0.1)
    bench.admit()
    steps = []
    while seq.num_computed < seq.prefill_target:
        plan = bench.scheduler.next_plan()
        steps += [part.tokens for part in plan.streams]
        bench.compute(plan)
    assert steps == [2048, 2048, 904]
    bench.leave(seq)
    seq = bench.add("b", 3500, keep=0.1)
    bench.admit()
    bench.compute(bench.scheduler.next_plan())
    assert parts(bench.scheduler.next_plan()) == [("b", 3500 - 2048)]  # a last one is as large as it is
    bench.leave(seq)
    small = Bench(wide, max_step_tokens=1000)
    small.add("c", 5000, keep=0.1)
    small.admit()
    assert parts(small.scheduler.next_plan()) == [("c", 1000)]
    small.close()
    bench.close()


def test_prompts_that_are_scored_go_in_small_steps(wide: LLM) -> None:
    bench = Bench(wide, max_step_tokens=512)
    seq = bench.add("a", 600, keep=0.1, prompt_logprobs=True)
    bench.admit()
    assert parts(bench.scheduler.next_plan()) == [("a", MAX_STEP_TOKENS)]
    seq.scores_prompt = False
    assert parts(bench.scheduler.next_plan()) == [("a", 512)]
    bench.close()


def test_a_step_beside_streams_has_a_thirty_second_of_a_whole_one_at_least(wide: LLM) -> None:
    bench = Bench(wide, max_step_tokens=2048)
    row = bench.add("a", 16)
    bench.add("b", 1000, keep=0.1)
    bench.admit()
    finish_prefill(row)
    assert parts(bench.scheduler.next_plan()) == [("b", 64)]
    bench.close()
