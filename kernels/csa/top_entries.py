"""The entries with the largest scores of each row, in Triton. In PyTorch: `reference.top_entries`.

One program per row finds the k-th score by radix select, one byte per pass from the highest byte, in four reads of the
row. A fifth read writes, in order and without a sort, the entries above that score and the first ones that equal it.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _ordered(b_scores):
    """Maps scores to uint32 in the same order; -0.0 equals 0.0."""
    b_bits = tl.where(b_scores == 0, 0.0, b_scores).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, ~b_bits, b_bits | -2147483648)
    return b_bits.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["entries", "row_stride"])
def _top_kernel(
    scores,  # [rows, entries] float32
    out,  # [rows, K] int32
    entries,
    row_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = scores + i_row * row_stride
    o_block, o_digit, o_out = tl.arange(0, BLOCK), tl.arange(0, 256), tl.arange(0, K_PAD)
    valid = 0
    for start in range(0, entries, BLOCK):
        o_entry = start + o_block
        b_scores = tl.load(p_row + o_entry, mask=o_entry < entries, other=-float("inf"))
        valid += tl.sum((b_scores > -float("inf")).to(tl.int32), 0)
    taken = tl.minimum(valid, K)
    p_out = out + i_row * K
    tl.store(p_out + o_out, tl.full([K_PAD], -1, tl.int32), mask=(o_out >= taken) & (o_out < K))
    if taken > 0:
        # the leading bytes of the k-th score, and how many entries with these bytes are still to be taken
        prefix = tl.zeros([1], tl.uint32)
        wanted = taken
        for i_byte in tl.static_range(4):
            b_counts = tl.zeros([256], tl.int32)
            for start in range(0, entries, BLOCK):
                o_entry = start + o_block
                m_entry = o_entry < entries
                b_key = _ordered(tl.load(p_row + o_entry, mask=m_entry, other=-float("inf")))
                m_same = m_entry
                if i_byte > 0:
                    m_same = m_same & ((b_key >> (32 - 8 * i_byte)) == prefix)
                b_digit = tl.where(m_same, (b_key >> (24 - 8 * i_byte)) & 0xFF, 0).to(tl.int32)
                others = tl.sum((~m_same).to(tl.int32), 0)
                b_counts += tl.histogram(b_digit, 256) - tl.where(o_digit == 0, others, 0)
            b_above = tl.sum(b_counts, 0) - tl.cumsum(b_counts, 0)
            m_digit = (b_above < wanted) & (b_above + b_counts >= wanted)
            digit = tl.sum(tl.where(m_digit, o_digit, 0), 0)
            wanted -= tl.sum(tl.where(m_digit, b_above, 0), 0)
            prefix = (prefix << 8) | digit.to(tl.uint32)
        found, equal = 0, 0
        for start in range(0, entries, BLOCK):
            o_entry = start + o_block
            m_entry = o_entry < entries
            b_key = _ordered(tl.load(p_row + o_entry, mask=m_entry, other=-float("inf")))
            b_equal = (m_entry & (b_key == prefix)).to(tl.int32)
            b_before = equal + tl.cumsum(b_equal, 0) - b_equal
            b_take = ((m_entry & (b_key > prefix)) | ((b_equal > 0) & (b_before < wanted))).to(tl.int32)
            b_place = found + tl.cumsum(b_take, 0) - b_take
            tl.store(p_out + b_place, o_entry, mask=b_take > 0)
            found += tl.sum(b_take, 0)
            equal += tl.sum(b_equal, 0)


def top_entries(scores: Tensor, k: int) -> Tensor:
    """See `reference.top_entries`."""
    assert scores.dim() == 2 and scores.dtype == torch.float32 and scores.stride(1) == 1 and k > 0
    rows, entries = scores.shape
    out = torch.empty((rows, k), dtype=torch.int32, device=scores.device)
    block = min(_BLOCK, max(256, triton.next_power_of_2(entries)))
    _top_kernel[(rows,)](
        scores,
        out,
        entries,
        scores.stride(0),
        K=k,
        K_PAD=triton.next_power_of_2(k),
        BLOCK=block,
        num_warps=8,
    )
    return out
