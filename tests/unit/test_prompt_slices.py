"""Which prompts advance in a step: within budget, slots and target, always some, in order, and none starves."""

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.workers.engine.prompt_slices import LONG_SHARE, WORTH, Prompt, StepLimits, slices_of_step
from forecache.workers.engine.step_cost import StepCost, StepWork

CHUNK = 16
LIMITS = StepLimits(max_tokens=512, target_s=0.25, long_tokens=512, max_long=1, chunk_tokens=CHUNK)


def prompt(left: int, *, past: int = 0, priority: int = 0, arrival: int = 0, slots: int = 10_000) -> Prompt:
    return Prompt(left, past, priority, arrival, slots, past % CHUNK, left)


def learned(constant_s: float, token_s: float, attention_s: float = 0.0) -> StepCost:
    cost = StepCost(token_s / attention_s if attention_s else 1e9)
    for number in range(120):
        tokens, past = 16 << number % 5, 1000 * (number % 3)
        work = StepWork().with_slice(tokens, past)
        cost.observe(work, constant_s + token_s * work.tokens + attention_s * work.attention)
    return cost


FAST = learned(0.001, 1e-6)
SLOW = learned(0.1, 0.002)


def taken(
    prompts: list[Prompt], limits: StepLimits = LIMITS, cost: StepCost = FAST, **more: int
) -> list[tuple[int, int]]:
    return [(part.prompt, part.tokens) for part in slices_of_step(prompts, limits, cost, **more)]


def test_whole_prompts_are_packed() -> None:
    assert taken([prompt(200, arrival=at) for at in range(4)]) == [(0, 200), (1, 200), (2, 112)]


def test_lower_priorities_first_then_arrival() -> None:
    prompts = [prompt(100, priority=1, arrival=1), prompt(100, arrival=3), prompt(100, arrival=2)]
    assert taken(prompts) == [(2, 100), (1, 100), (0, 100)]


def test_decode_rows_are_part_of_the_budget_but_leave_some() -> None:
    assert taken([prompt(5000)], rows=12) == [(0, 500)]
    assert taken([prompt(5000)], rows=512) == [(0, 16)]


def test_a_step_with_decode_rows_takes_its_target() -> None:
    ((_, tokens),) = taken([prompt(5000)], replace(LIMITS, target_s=0.5), SLOW, rows=1)
    assert 195 <= tokens <= 200
    assert taken([prompt(5000)], cost=SLOW) == [(0, 512)]  # none waits for it


def test_the_worth_of_a_step_exceeds_its_target() -> None:
    """Else throughput would be a small part of what it is alone: with a constant of 0.1 s and a target of 0.11 s, 5
    tokens a step."""
    ((_, tokens),) = taken([prompt(5000)], replace(LIMITS, target_s=0.11), SLOW, rows=1)
    assert abs(tokens - WORTH * 0.1 / 0.002) <= 2


def test_the_target_holds_for_packed_prompts_together() -> None:
    prompts = [prompt(60, arrival=1), prompt(60, arrival=2), prompt(300, arrival=3)]
    parts = taken(prompts, replace(LIMITS, target_s=0.5), SLOW, rows=1)
    assert parts[:2] == [(0, 60), (1, 60)]
    assert parts[2][0] == 2 and 75 <= parts[2][1] <= 80


def test_short_prompts_pass_a_long_one() -> None:
    prompts = [prompt(11_600, past=4000, arrival=1), prompt(50, arrival=2)]
    assert taken(prompts, long_yields=True) == [(1, 50)]
    # in the next step the long one goes on, in a slice that hardly delays the other's first token
    parts = taken(prompts, replace(LIMITS, target_s=0.5), SLOW)
    assert parts[0] == (1, 50)
    assert parts[1][0] == 0 and 145 <= parts[1][1] <= 150


def test_a_long_prompt_keeps_a_share_beside_short_ones() -> None:
    prompts = [prompt(5000, arrival=1), *(prompt(100, arrival=at) for at in range(2, 12))]
    assert taken(prompts)[-1] == (0, 512 // LONG_SHARE)
    slow = taken(prompts, cost=SLOW, rows=1)
    assert slow[-1][0] == 0 and slow[-1][1] >= 16


def test_a_long_prompt_does_not_yield_to_lower_priorities() -> None:
    prompts = [prompt(5000, priority=0, arrival=1), prompt(50, priority=1, arrival=2)]
    assert taken(prompts, long_yields=True) == [(0, 512)]


def test_few_long_prompts_advance_at_once() -> None:
    prompts = [prompt(5000, arrival=3), prompt(600, arrival=1), prompt(5000, arrival=2)]
    assert taken(prompts) == [(1, 512)]
    prompts[1] = prompt(88, past=512, arrival=1)  # not long any more
    assert taken(prompts) == [(1, 88), (2, 512 - 88)]
    assert [at for at, _ in taken(prompts, replace(LIMITS, long_tokens=50))] == [1]


def test_hot_slots_limit_a_slice_and_spare_ones_are_lent_once() -> None:
    prompts = [prompt(100, arrival=1, slots=1), prompt(100, arrival=2, slots=1), prompt(100, arrival=3, slots=2)]
    assert taken(prompts) == [(0, CHUNK), (1, CHUNK), (2, 2 * CHUNK)]
    assert taken(prompts, spare_slots=4) == [(0, 5 * CHUNK), (1, CHUNK), (2, 2 * CHUNK)]
    assert taken(prompts, spare_slots=7) == [(0, 100), (1, 2 * CHUNK), (2, 2 * CHUNK)]
    half_full = [prompt(100, past=CHUNK + 5, arrival=1, slots=2)]
    assert taken(half_full) == [(0, 2 * CHUNK - 5)]


def test_nothing_to_prefill_is_an_empty_step() -> None:
    assert taken([], rows=3) == []


@dataclass
class Arriving:
    prompt: Prompt
    step: int


@st.composite
def workloads(draw: st.DrawFn) -> list[Arriving]:
    made = []
    for arrival in range(draw(st.integers(1, 12))):
        length = draw(st.one_of(st.integers(1, 100), st.integers(100, 2500)))
        slots = draw(st.sampled_from([1, 3, 40, 10_000]))
        made.append(
            Arriving(
                prompt(length, priority=draw(st.integers(-1, 1)), arrival=arrival, slots=slots),
                draw(st.integers(0, 40)),
            )
        )
    return made


@settings(deadline=None)
@given(
    workload=workloads(),
    rows=st.integers(0, 40),
    max_tokens=st.sampled_from([16, 64, 512, 8192]),
    long_tokens=st.sampled_from([1, 64, 512]),
    max_long=st.integers(1, 3),
    target_s=st.sampled_from([0.001, 0.1, 1.0]),
    constant_s=st.sampled_from([0.0001, 0.1]),
    token_s=st.sampled_from([1e-6, 1e-3]),
    spare_slots=st.integers(0, 20),
)
def test_everything_finishes_in_order_and_within_its_limits(
    workload: list[Arriving],
    rows: int,
    max_tokens: int,
    long_tokens: int,
    max_long: int,
    target_s: float,
    constant_s: float,
    token_s: float,
    spare_slots: int,
) -> None:
    limits = StepLimits(max_tokens, target_s, long_tokens, max_long, CHUNK)
    cost = StepCost(1000.0)
    arrived: dict[int, int] = {}  # by arrival
    waiting: list[Prompt] = []
    finished: dict[int, int] = {}
    yielded, step = False, 0
    while len(finished) < len(workload):
        for coming in workload:
            if coming.prompt.arrival not in arrived and coming.step <= step:
                waiting.append(coming.prompt)
                arrived[coming.prompt.arrival] = step
        before = list(waiting)
        slices = slices_of_step(before, limits, cost, rows=rows, spare_slots=spare_slots, long_yields=not yielded)
        long = {at for at, one in enumerate(before) if one.left > long_tokens}
        yielded = bool(long) and not any(part.prompt in long for part in slices)
        # always progress, within budget and slots, no prompt twice
        assert bool(slices) == bool(before)
        assert len({part.prompt for part in slices}) == len(slices)
        tokens = sum(part.tokens for part in slices)
        assert rows + tokens <= max(max_tokens, rows + limits.least_tokens)
        used = [-(-(before[part.prompt].tail + part.tokens) // CHUNK) for part in slices]
        borrowed = sum(max(mine - before[part.prompt].slots, 0) for mine, part in zip(used, slices, strict=True))
        assert borrowed <= spare_slots
        assert sum(part.prompt in long for part in slices) <= max_long
        work = StepWork(rows)
        for part in slices:
            one = before[part.prompt]
            assert 1 <= part.tokens <= one.left
            work = work.with_slice(part.tokens, one.past)
            past = one.past + part.tokens
            waiting[waiting.index(one)] = replace(one, left=one.left - part.tokens, past=past, tail=past % CHUNK)
        # none of a lower priority advances where one of a higher has nothing, except that it may wait as a long one
        most_urgent = min((one.priority for one in before), default=0)
        assert not slices or any(before[part.prompt].priority == most_urgent for part in slices)
        for one in [one for one in waiting if not one.left]:
            finished[one.arrival] = step
            waiting.remove(one)
        if slices:
            cost.observe(work, constant_s + token_s * (work.tokens + work.attention / 1000))
        step += 1
        assert step <= 41 + sum(one.prompt.left for one in workload)  # the bound is progress: a token a step
    if max_long > 1:
        return
    # within a priority, of two that were there together the earlier is first, unless it is longer or short of slots
    for first in workload:
        for second in workload:
            a, b = first.prompt, second.prompt
            together = arrived[a.arrival] <= arrived[b.arrival] and a.arrival < b.arrival
            ample = min(a.slots, b.slots) == 10_000
            passes = a.left > long_tokens >= b.left
            if together and ample and a.priority == b.priority and not passes:
                assert finished[a.arrival] <= finished[b.arrival]


@settings(deadline=None)
@given(length=st.integers(600, 6000), shorts=st.integers(1, 30), rows=st.integers(0, 8))
def test_a_long_prompt_ends_although_short_ones_never_stop_coming(length: int, shorts: int, rows: int) -> None:
    """It takes part in every other step at least, with a share of the step's tokens or of its time."""
    cost = learned(0.08, 0.0016, 3.5e-7)
    long, yielded, steps = prompt(length), False, 0
    while long.left:
        coming = [prompt(300, arrival=steps * 100 + at) for at in range(1, shorts + 1)]
        parts = slices_of_step([long, *coming], LIMITS, cost, rows=rows, long_yields=not yielded)
        mine = next((part.tokens for part in parts if part.prompt == 0), 0)
        assert mine or not yielded
        yielded = not mine
        long = replace(long, left=long.left - mine, past=long.past + mine, tail=(long.past + mine) % CHUNK)
        steps += 1
    assert steps <= 2 * (length // 16 + 1)
