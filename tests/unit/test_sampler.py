"""Sampling: the right distribution, no tokens outside of it, and the same token for the same seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.core.requests import SamplingParams
from forecache.workers.models.step.sampler import sample, uniform

INF = math.inf
DRAWS = 4000


def one(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Sample one row with finite logits."""
    tokens, best = sample(logits.unsqueeze(0), [params], [position])
    assert math.isfinite(best)
    return int(tokens)


def draw(logits: torch.Tensor, *, draws: int = DRAWS, **params: float) -> np.ndarray:
    """The counts of each token at positions 0 … ``draws``: int64 [vocab]."""
    settings = SamplingParams(**({"temperature": 1.0} | params))  # type: ignore[arg-type]
    tokens = [one(logits, settings, position) for position in range(draws)]
    return np.bincount(tokens, minlength=len(logits))


def chi_squared(counts: np.ndarray, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over the possible tokens; impossible ones must not occur."""
    expected = probabilities.double().numpy() * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.fixture
def logits() -> torch.Tensor:
    """Logits, float32 [12], shuffled; the likeliest token has 0.33, the next ones 0.22, 0.15, …"""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    return (torch.arange(12) * 0.4)[order]


def test_greedy_takes_the_largest(logits: torch.Tensor) -> None:
    for position in (0, 1, 10**6):
        assert one(logits, SamplingParams(temperature=0, top_k=3, top_p=0.1), position) == int(logits.argmax())


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(1000)
    logits[[700, 41, 999]] = 5.0
    assert one(logits, SamplingParams(), 0) == 41


# 99.9 % of samples from the right distribution stay below these, by degrees of freedom
CHI_SQUARED_999 = {2: 13.8, 4: 18.5, 11: 31.3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    counts = draw(logits, temperature=temperature)
    assert chi_squared(counts, (logits / temperature).softmax(-1)) < CHI_SQUARED_999[11]


def test_draws_of_other_seeds_are_independent(logits: torch.Tensor) -> None:
    """One position with many seeds is as good a sample as many positions with one seed."""
    tokens = [one(logits, SamplingParams(temperature=1.0, seed=seed), 17) for seed in range(DRAWS)]
    assert chi_squared(np.bincount(tokens, minlength=12), logits.softmax(-1)) < CHI_SQUARED_999[11]


def test_top_k_cuts_and_keeps_proportions(logits: torch.Tensor) -> None:
    kept = torch.full_like(logits, -INF)
    best = logits.topk(5).indices
    kept[best] = logits[best]
    assert chi_squared(draw(logits, top_k=5), kept.softmax(-1)) < CHI_SQUARED_999[4]


def test_top_k_of_one_is_greedy_and_a_large_one_cuts_nothing(logits: torch.Tensor) -> None:
    assert set(np.flatnonzero(draw(logits, draws=50, top_k=1))) == {int(logits.argmax())}
    assert (draw(logits, draws=200, top_k=10**6) == draw(logits, draws=200)).all()


def test_top_p_keeps_the_smallest_set_that_holds_it(logits: torch.Tensor) -> None:
    probabilities = logits.softmax(-1)
    three = probabilities.topk(3)
    kept = torch.zeros_like(probabilities)
    kept[three.indices] = three.values / three.values.sum()
    between = float(three.values[:2].sum() + three.values.sum()) / 2
    assert chi_squared(draw(logits, top_p=between), kept) < CHI_SQUARED_999[2]


def test_top_p_that_one_token_reaches_keeps_one(logits: torch.Tensor) -> None:
    assert set(np.flatnonzero(draw(logits, draws=50, top_p=1e-9))) == {int(logits.argmax())}


def test_top_p_counts_within_top_k() -> None:
    """Top-k leaves two equal tokens, and half of their mass is one token."""
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0])
    assert np.count_nonzero(draw(logits, draws=100, top_k=2, top_p=0.5)) == 1
    assert np.count_nonzero(draw(logits, draws=100, top_k=2, top_p=0.51)) == 2


def test_equals_are_equally_likely() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, -INF])
    assert chi_squared(draw(logits), torch.tensor([1, 1, 1, 0]) / 3) < CHI_SQUARED_999[2]


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6])
def test_the_coldest_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    assert set(np.flatnonzero(draw(logits, draws=50, temperature=temperature))) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e6, 1e308])
def test_the_hottest_is_uniform_but_never_forbidden(logits: torch.Tensor, temperature: float) -> None:
    logits[4] = -INF
    flat = torch.full((12,), 1 / 11)
    flat[4] = 0
    assert chi_squared(draw(logits, temperature=temperature), flat) < CHI_SQUARED_999[11]


def test_tokens_of_no_probability_never_come() -> None:
    logits = torch.full((500,), -INF)
    logits[[7, 300]] = torch.tensor([0.0, 50.0])
    counts = draw(logits, draws=500, top_k=400)
    assert counts[300] == 500
    assert one(logits, SamplingParams(), 0) == 300


@pytest.mark.parametrize(
    "bad", [[0.0, math.nan, 1.0], [math.nan] * 3, [0.0, INF, 1.0], [INF, INF, -INF], [-INF] * 3], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_distribution_are_told(bad: list[float], temperature: float) -> None:
    """Other rows are not affected."""
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(3)]
    good = torch.tensor([0.5, 2.0, 1.0])
    tokens, best = sample(torch.stack([good, torch.tensor(bad), good]), params, [4, 9, 5])
    assert not math.isfinite(best[1])
    assert best[[0, 2]].tolist() == [2.0, 2.0]
    assert tokens[0] == one(good, params[0], 4)
    assert tokens[2] == one(good, params[2], 5)


def test_rows_do_not_depend_on_each_other(logits: torch.Tensor) -> None:
    rows = torch.stack([logits, -logits, logits / 2, logits * 3])
    params = [SamplingParams(temperature=t, seed=3, top_k=k) for t, k in ((1.0, 0), (0.0, 0), (0.7, 4), (2.0, 2))]
    tokens, best = sample(rows, params, [5, 6, 7, 8])
    assert tokens.tolist() == [one(row, param, 5 + i) for i, (row, param) in enumerate(zip(rows, params, strict=True))]
    assert torch.equal(best, rows.amax(-1))


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**31),
    temperature=st.floats(0.01, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 40),
)
def test_a_token_is_a_pure_function_of_seed_and_position(
    seed: int, position: int, temperature: float, top_p: float, top_k: int
) -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(position % 1000)) * 3
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    token = one(logits, params, position)
    torch.rand(3)  # neither torch's state
    np.random.default_rng().random()  # nor numpy's
    one(-logits, params, position + 1)  # nor what was drawn before plays a part
    assert one(logits.clone(), params, position) == token
    if top_k:
        assert logits[token] >= logits.sort(descending=True).values[min(top_k, 32) - 1]


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(40) for position in range(100)])
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert len(np.unique(numbers)) == len(numbers)
    by_seed = numbers.reshape(40, 100)
    assert abs(np.corrcoef(by_seed[0], by_seed[1])[0, 1]) < 0.35
    assert abs(np.corrcoef(by_seed[:, :-1].ravel(), by_seed[:, 1:].ravel())[0, 1]) < 0.06
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)
