"""Merges two partial attention results, in Triton. In PyTorch: `reference.merge_partials`."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    out_a,  # [rows, HEAD_DIM]
    lse_a,  # [rows]
    out_b,  # [rows, HEAD_DIM]
    lse_b,  # [rows]
    out,  # [rows, HEAD_DIM]
    lse,  # [rows]
    rows,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dim = tl.arange(0, HEAD_PAD)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_tile = o_row[:, None] * HEAD_DIM + o_dim[None, :]

    b_lse_a = tl.load(lse_a + o_row, mask=m_row, other=-float("inf"))
    b_lse_b = tl.load(lse_b + o_row, mask=m_row, other=-float("inf"))
    b_max = tl.maximum(b_lse_a, b_lse_b)
    b_empty = b_max == -float("inf")
    b_shift = tl.where(b_empty, 0.0, b_max)
    b_weight_a = tl.exp(b_lse_a - b_shift)
    b_weight_b = tl.exp(b_lse_b - b_shift)
    b_sum = tl.where(b_empty, 1.0, b_weight_a + b_weight_b)
    tl.store(lse + o_row, tl.where(b_empty, b_max, b_shift + tl.log(b_sum)), mask=m_row)

    b_a = tl.load(out_a + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_b = tl.load(out_b + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_out = b_a * (b_weight_a / b_sum)[:, None] + b_b * (b_weight_b / b_sum)[:, None]
    tl.store(out + o_tile, b_out.to(out.dtype.element_ty), mask=m_tile)


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.merge_partials`."""
    head_dim = out_a.shape[-1]
    assert out_a.shape == out_b.shape, f"partial results of shapes {out_a.shape} and {out_b.shape}"
    assert lse_a.shape == lse_b.shape == out_a.shape[:-1], f"lse {lse_a.shape} for out {out_a.shape}"
    assert lse_a.dtype == lse_b.dtype == torch.float32
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    rows = lse.numel()
    head_pad = triton.next_power_of_2(head_dim)
    rows_per_program = max(1, 4096 // head_pad)
    _merge_kernel[(triton.cdiv(rows, rows_per_program),)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        rows,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        ROWS=rows_per_program,
    )
    return out, lse
