"""What a step costs is learned from the steps: on fast and slow machines, beside outliers, and after a change."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.engine.step_cost import UNLIMITED_TOKENS, StepCost, StepWork

NOISE = 0.1
PROBES = ((64, 0), (400, 4000), (400, 12_000))
"""(tokens, past) within what :func:`run` shows."""


class Machine:
    """Steps take the sum of a constant and terms for rows, tokens, attention and past tokens, with noise."""

    def __init__(self, constant_s: float, row_s: float, token_s: float, attention_s: float, past_s: float) -> None:
        self.terms = (constant_s, row_s, token_s, attention_s, past_s)
        self.random = random.Random(1)

    def true_s(self, work: StepWork) -> float:
        parts = zip(self.terms, (1.0, work.rows, work.tokens, work.attention, work.past), strict=True)
        return sum(cost * amount for cost, amount in parts)

    def step(self, cost: StepCost, work: StepWork) -> None:
        cost.observe(work, self.true_s(work) * self.random.uniform(1 - NOISE, 1 + NOISE))

    def run(self, cost: StepCost, steps: int) -> None:
        """Prompts of different lengths, in slices of different sizes."""
        for _ in range(steps):
            tokens = self.random.choice([16, 64, 200, 512])
            self.step(cost, StepWork(rows=self.random.randint(0, 4)).with_slice(tokens, self.random.randint(0, 16_000)))

    def errors(self, cost: StepCost) -> list[float]:
        works = [StepWork(rows=2).with_slice(tokens, past) for tokens, past in PROBES]
        return [abs(cost.duration_s(work) / self.true_s(work) - 1) for work in works]


LARGE_CONSTANT = (0.1, 0.0005, 25e-6, 1e-9, 2e-6)
SMALL_CONSTANT = (0.001, 0.0005, 25e-6, 1e-9, 1e-6)
CPU = (0.08, 0.005, 1.6e-3, 3.5e-7, 18e-6)
MACHINES = (LARGE_CONSTANT, SMALL_CONSTANT, CPU)


@pytest.mark.parametrize("terms", MACHINES)
def test_it_converges(terms: Sequence[float]) -> None:
    machine, cost = Machine(*terms), StepCost(5000.0)
    machine.run(cost, 60)
    assert max(machine.errors(cost)) < 0.2


@pytest.mark.parametrize("terms", MACHINES)
@pytest.mark.parametrize("factor", [1 / 3, 3.0, 50.0])
def test_it_follows_a_change(terms: Sequence[float], factor: float) -> None:
    machine, cost = Machine(*terms), StepCost(5000.0)
    machine.run(cost, 60)
    changed = Machine(*(factor * term for term in terms))
    changed.run(cost, 60)
    assert max(changed.errors(cost)) < 0.25


@pytest.mark.parametrize("terms", MACHINES)
def test_one_slow_step_changes_little(terms: Sequence[float]) -> None:
    machine, cost = Machine(*terms), StepCost(5000.0)
    machine.run(cost, 60)
    before = [cost.duration_s(StepWork(rows=2).with_slice(*probe)) for probe in PROBES]
    cost.observe(StepWork(rows=2).with_slice(400, 4000), 60.0)
    after = [cost.duration_s(StepWork(rows=2).with_slice(*probe)) for probe in PROBES]
    assert all(new < 1.4 * old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("terms", MACHINES)
def test_a_first_step_that_compiled_is_forgotten_at_once(terms: Sequence[float]) -> None:
    machine, cost = Machine(*terms), StepCost(5000.0)
    cost.observe(StepWork().with_slice(100, 0), 60.0)
    machine.step(cost, StepWork().with_slice(100, 0))
    work = StepWork().with_slice(100, 0)
    assert cost.duration_s(work) == pytest.approx(machine.true_s(work), rel=2 * NOISE)


def test_before_any_other_step_attention_costs_what_the_model_says() -> None:
    cost = StepCost(1000.0)
    assert not cost.known
    cost.observe(StepWork().with_slice(100, 0), 4.0)
    assert cost.known
    assert cost.duration_s(StepWork().with_slice(100, 0)) == pytest.approx(4.0)
    assert cost.duration_s(StepWork()) == pytest.approx(1.0)  # a quarter
    more_s = cost.duration_s(StepWork().with_slice(100, 1000)) - 4.0
    assert more_s == pytest.approx(3.0 / 1.05)  # at a past of 1000, attention doubles the cost of 100 tokens


def test_steps_of_one_size_tell_no_constant() -> None:
    cost = StepCost(1000.0)
    for _ in range(30):
        cost.observe(StepWork(1).with_slice(100, 0), 0.2)
        assert not cost.tells_constant
    cost.observe(StepWork(1).with_slice(50, 0), 0.15)
    assert cost.tells_constant
    assert cost.duration_s(StepWork(1)) < 0.15


def test_work_adds_up() -> None:
    work = StepWork(rows=3).with_slice(10, 100).with_slice(4, 0)
    assert work == StepWork(rows=3, tokens=14, attention=10 * 105 + 4 * 2, past=100)


@given(
    constant_s=st.floats(0.001, 1),
    token_s=st.floats(1e-6, 1e-2),
    past=st.integers(0, 500_000),
    share_s=st.floats(0, 10),
)
def test_tokens_within_a_time_take_that_time(constant_s: float, token_s: float, past: int, share_s: float) -> None:
    machine, cost = Machine(constant_s, 0.0, token_s, token_s / 5000, 0.0), StepCost(5000.0)
    for tokens in (16, 64, 256):
        machine.step(cost, StepWork().with_slice(tokens, 0))
    tokens = cost.tokens_within(share_s, past)
    empty_s = cost.duration_s(StepWork().with_slice(0, past))
    assert cost.duration_s(StepWork().with_slice(tokens, past)) - empty_s <= share_s + 1e-9
    if tokens < UNLIMITED_TOKENS:
        assert cost.duration_s(StepWork().with_slice(tokens + 1, past)) - empty_s >= share_s * (1 - 1e-6)


def test_no_time_is_no_tokens() -> None:
    cost = StepCost(5000.0)
    cost.observe(StepWork().with_slice(100, 0), 0.1)
    assert cost.tokens_within(0.0, 0) == 0
    assert cost.tokens_within(-1.0, 0) == 0
    cost.observe(StepWork().with_slice(100, 0), 0.0)  # a clock that did not move
    assert cost.duration_s(StepWork().with_slice(100, 0)) > 0
