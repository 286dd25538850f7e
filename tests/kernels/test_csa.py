"""Compressed Sparse Attention at decode, reference and Triton, against float64 one sequence at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.csa import decode as csa_decode
from forecache.kernels.csa import ops as ops_csa
from forecache.kernels.csa import reference as reference_csa
from forecache.kernels.csa import score_entries, top_entries

Poison = Callable[[], Any]
Measure = Callable[[Tensor, Tensor], float]
DTYPES = [torch.float32, torch.bfloat16]
INTERPRETED = not torch.cuda.is_available()


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return reference_csa
    return SimpleNamespace(
        score_entries=score_entries.score_entries,
        top_entries=top_entries.top_entries,
        attend_entries=csa_decode.attend_entries,
        csa_decode=csa_decode.csa_decode,
    )


def skip_if_not_interpretable(kernels: Any, dtype: torch.dtype) -> None:
    if INTERPRETED and kernels is not reference_csa and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")


@dataclass
class Pool:
    """Entries of some sequences in rows that are longer than they are, NaN wherever nothing may be read."""

    entries: Tensor
    block_table: Tensor
    lens: Tensor
    plain: list[Tensor]

    @classmethod
    def make(cls, lens: list[int], chunk_entries: int, dim: int, dtype: torch.dtype, device: torch.device) -> "Pool":
        width = max(1, *(math.ceil(length / chunk_entries) for length in lens)) + 1
        slots = len(lens) * width + 2
        memory = torch.full((slots, chunk_entries * dim + 16), math.nan, dtype=dtype)
        entries = memory[:, : chunk_entries * dim].view(slots, chunk_entries, dim)
        table = torch.randperm(slots)[: len(lens) * width].view(len(lens), width)
        plain = [torch.randn(length, dim).to(dtype) for length in lens]
        for row, rows in zip(table.tolist(), plain, strict=True):
            for number, part in enumerate(rows.split(chunk_entries)):
                entries[row[number], : len(part)] = part
        moved = memory.to(device)[:, : chunk_entries * dim].view(entries.shape)
        lens_of = torch.tensor(lens, dtype=torch.int32, device=device)
        return cls(moved, table.int().to(device), lens_of, [rows.double() for rows in plain])


def attended(q: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[heads, dim] over [entries, dim], in float64."""
    logits = q.double().cpu() @ rows.T * scale
    return logits.softmax(1) @ rows if len(rows) else torch.zeros(q.shape).double(), logits.logsumexp(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 8), (3, 24, 5), (64, 128, 16)], ids=str)
def test_scores_are_those_of_float64(
    kernels: Any, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, poisoned: Poison
) -> None:
    skip_if_not_interpretable(kernels, dtype)
    heads, dim, chunk_entries = shape
    lens = [3 * chunk_entries + 1, 0, chunk_entries, 1]
    pool = Pool.make(lens, chunk_entries, dim, dtype, device)
    q, weights = torch.randn(4, heads, dim).to(dtype), torch.randn(4, heads)
    with poisoned():
        scores = kernels.score_entries(q.to(device), weights.to(device), pool.entries, pool.block_table, pool.lens)
    assert scores.dtype == torch.float32 and scores.shape == (4, pool.block_table.shape[1] * chunk_entries)
    for row, rows in enumerate(pool.plain):
        expected = torch.einsum("h,hn->n", weights[row].double(), (q[row].double() @ rows.T).relu())
        torch.testing.assert_close(scores[row, : len(rows)].double().cpu(), expected, rtol=1e-4, atol=1e-4)
        assert (scores[row, len(rows) :] == -math.inf).all()


@pytest.mark.parametrize("k", [1, 4, 7, 32])
def test_the_best_entries_ascending_and_the_lower_of_equals(
    kernels: Any, k: int, device: torch.device, poisoned: Poison
) -> None:
    # few different values, zeros of both signs among them: nearly everything ties
    scores = torch.randint(-1, 2, (6, 23)).float() * torch.tensor([1.0, -1.0]).repeat(12)[:23]
    scores[1] = -math.inf
    scores[2, 3:] = -math.inf
    scores[3] = torch.randn(23)
    scores[4] = 0.5
    with poisoned():
        found = kernels.top_entries(scores.to(device), k)
    assert found.dtype == torch.int32 and found.shape == (6, k)
    for row, of_row in zip(scores.tolist(), found.tolist(), strict=True):
        ranked = sorted((i for i, score in enumerate(row) if score > -math.inf), key=lambda i: (-row[i], i))
        best = sorted(ranked[:k])
        assert of_row == best + [-1] * (k - len(best))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 8), (3, 24, 5), (64, 512, 16)], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
def test_attention_over_entries_window_and_sinks(
    kernels: Any,
    shape: tuple[int, int, int],
    sparse: bool,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poison,
    relative_error: Measure,
) -> None:
    skip_if_not_interpretable(kernels, dtype)
    heads, dim, chunk_entries = shape
    lens, window_lens = [5 * chunk_entries - 2, 0, chunk_entries, 1, 3], [9, 4, 1, 16, 0]
    far = Pool.make(lens, chunk_entries, dim, dtype, device)
    near = Pool.make(window_lens, 16, dim, dtype, device)
    q, sinks, scale = torch.randn(5, heads, dim).to(dtype).to(device), torch.randn(heads), dim**-0.5
    selected, chosen = None, far.plain
    if sparse:
        picks = [torch.randperm(length)[:7].sort().values for length in lens]
        rows = [torch.cat([pick, pick.new_full((9 - len(pick),), -1)]) for pick in picks]
        selected = torch.stack(rows).int().to(device)
        chosen = [rows[pick] for rows, pick in zip(far.plain, picks, strict=True)]
    table = far.entries, far.block_table, far.lens
    with poisoned():
        part = kernels.attend_entries(q, *table, scale, selected=selected)
        window = near.entries, near.block_table[:, 0], near.lens
        out = kernels.csa_decode(q, *table, *window, sinks.to(device), scale, selected=selected)
    assert part[0].dtype == part[1].dtype == torch.float32 and out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for row, rows in enumerate(chosen):
        expected, lse = attended(q[row], rows, scale)
        if not len(rows):
            assert part[1][row].isneginf().all() and (part[0][row] == 0).all()
        else:
            torch.testing.assert_close(part[1][row].double().cpu(), lse, rtol=1e-4, atol=1e-3)
            assert relative_error(part[0][row], expected) < tolerance
        both = torch.cat([rows, near.plain[row]])
        over_both, total = attended(q[row], both, scale)
        with_sinks = over_both * (total - torch.logaddexp(total, sinks.double())).exp().unsqueeze(1)
        assert relative_error(out[row], with_sinks) < tolerance


def test_everything_selected_is_everything(kernels: Any, device: torch.device) -> None:
    pool = Pool.make([17, 4], 5, 16, torch.float32, device)
    q = torch.randn(2, 4, 16, device=device)
    scores = kernels.score_entries(q, torch.ones(2, 4, device=device), pool.entries, pool.block_table, pool.lens)
    arguments = q, pool.entries, pool.block_table, pool.lens, 0.25
    out, lse = kernels.attend_entries(*arguments, selected=kernels.top_entries(scores, 17))
    dense, dense_lse = kernels.attend_entries(*arguments)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)
    few, _ = kernels.attend_entries(*arguments, selected=kernels.top_entries(scores, 3))
    assert (few[0] - dense[0]).abs().max() > 1e-3, "little selected is not everything"


def test_top_entries_of_rows_longer_than_a_block(kernels: Any, device: torch.device, poisoned: Poison) -> None:
    """Scores with few different values in every byte, so that the k-th is found only in the last."""
    scores = torch.randn(2, 9001)
    scores[1] = 1 + torch.randint(0, 5, (9001,)) * 2.0**-23
    padded = torch.cat([scores, torch.full((2, 7), math.nan)], 1).to(device)
    with poisoned():
        found = kernels.top_entries(padded[:, :9001], 512)
    assert torch.equal(found.cpu(), reference_csa.top_entries(scores, 512))
    assert (found[:, 1:] > found[:, :-1]).all()


def test_the_device_chooses_the_backend(device: torch.device) -> None:
    pool = Pool.make([17, 4], 5, 16, torch.float32, device)
    table = pool.entries, pool.block_table, pool.lens
    q, sinks, weights = (
        torch.randn(2, 4, 16, device=device),
        torch.randn(4, device=device),
        torch.ones(2, 4, device=device),
    )
    scores = ops_csa.score_entries(q, weights, *table)
    torch.testing.assert_close(scores, reference_csa.score_entries(q, weights, *table))
    selected = ops_csa.top_entries(scores, 3)
    assert torch.equal(selected, reference_csa.top_entries(scores, 3))
    window = pool.entries, pool.block_table[:, 0], torch.tensor([3, 4], dtype=torch.int32, device=device)
    out = ops_csa.csa_decode(q, *table, *window, sinks, 0.25, selected=selected)
    torch.testing.assert_close(out, reference_csa.csa_decode(q, *table, *window, sinks, 0.25, selected=selected))
    part, lse = ops_csa.attend_entries(q, *table, 0.25)
    torch.testing.assert_close((part, lse), reference_csa.attend_entries(q, *table, 0.25))
    with pytest.raises(AssertionError, match="does not fit"):
        ops_csa.attend_entries(q[..., :8], *table, 0.25)
