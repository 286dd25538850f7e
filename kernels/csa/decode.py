"""Attention of one token per sequence over entries that are both key and value, in Triton, by flash decoding.

In PyTorch: `reference.csa_decode`. The selected entries and the window are each split into parts; one kernel merges all
parts and the sinks by log-sum-exp. The grids depend on shapes only; lengths and selections are read on the GPU, so a
captured CUDA graph serves every length.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.common import checks, tuning

_LOG2E = 1 / math.log(2)
_LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["places", "splits", "first_part", "parts", "table_stride", "selected_stride"])
def _part_kernel(
    q,  # [batch, HEADS, DIM]
    entries,  # [slots, CHUNK_ENTRIES, DIM]
    block_table,  # [batch, max_chunks]
    lens,  # [batch]
    selected,  # [batch, places] with SELECTED
    part_out,  # [batch, HEADS, parts, DIM] float32
    part_lse,  # [batch, HEADS, parts] float32, base 2
    scale_log2e,
    places,
    splits,
    first_part,
    parts,
    slot_stride,
    table_stride,
    selected_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECTED: tl.constexpr,
):
    i_split, i_tile, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_head = i_tile * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    o_dim, o_block = tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    m_head, m_dim = o_head < HEADS, o_dim < DIM
    m_q = m_head[:, None] & m_dim[None, :]
    b_q = tl.load(q + i_seq * (HEADS * DIM) + o_head[:, None] * DIM + o_dim[None, :], mask=m_q, other=0.0)
    length = tl.load(lens + i_seq)
    count = places if SELECTED else length
    blocks = tl.cdiv(count, BLOCK)
    b_max = tl.full([HEADS_BLOCK], -float("inf"), tl.float32)
    b_sum = tl.zeros([HEADS_BLOCK], tl.float32)
    b_out = tl.zeros([HEADS_BLOCK, DIM_PAD], tl.float32)
    for i_block in range((i_split * blocks) // splits, ((i_split + 1) * blocks) // splits):
        o_entry = i_block * BLOCK + o_block
        m_entry = o_entry < count
        if SELECTED:
            o_entry = tl.load(selected + i_seq * selected_stride + o_entry, mask=m_entry, other=-1)
            m_entry = (o_entry >= 0) & (o_entry < length)
        o_chunk = tl.where(m_entry, o_entry // CHUNK_ENTRIES, 0)
        b_slot = tl.load(block_table + i_seq * table_stride + o_chunk, mask=m_entry, other=0).to(tl.int64)
        o_row = b_slot * slot_stride + (o_entry % CHUNK_ENTRIES) * DIM
        # [BLOCK, DIM_PAD]
        b_kv = tl.load(entries + o_row[:, None] + o_dim[None, :], mask=m_entry[:, None] & m_dim[None, :], other=0.0).to(
            b_q.dtype
        )
        b_logits = tl.dot(b_q, tl.trans(b_kv), input_precision="ieee") * scale_log2e
        b_logits = tl.where(m_entry[None, :], b_logits, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        # a block may contain no entry
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits - b_shift[:, None])
        b_keep = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_q.dtype), b_kv, b_out * b_keep[:, None], input_precision="ieee")
        b_max = b_new_max
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), -float("inf"))
    o_part = (i_seq * HEADS + o_head) * parts + first_part + i_split
    tl.store(part_lse + o_part, b_lse, mask=m_head)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    tl.store(part_out + o_part[:, None] * DIM + o_dim[None, :], b_out, mask=m_q)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(
    part_out,  # [rows, parts, DIM] float32
    part_lse,  # [rows, parts] float32, base 2
    sinks,  # [HEADS] with HAS_SINKS
    out,  # [rows, DIM]
    lse,  # [rows] float32
    parts,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, DIM_PAD)
    m_dim = o_dim < DIM
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        largest = tl.zeros([1], tl.float32) + tl.load(sinks + i_row % HEADS).to(tl.float32) / _LN_2
        total += 1.0
    b_out = tl.zeros([DIM_PAD], tl.float32)
    for i_part in range(0, parts):
        of_part = tl.load(part_lse + i_row * parts + i_part)
        new = tl.maximum(largest, of_part)
        shift = tl.where(new == -float("inf"), 0.0, new)
        keep, weight = tl.exp2(largest - shift), tl.exp2(of_part - shift)
        b_part = tl.load(part_out + (i_row * parts + i_part) * DIM + o_dim, mask=m_dim, other=0.0)
        b_out = b_out * keep + b_part * weight
        total = total * keep + weight
        largest = new
    b_out = b_out / tl.where(total > 0, total, 1.0)
    tl.store(out + i_row * DIM + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim)
    if not HAS_SINKS:
        b_lse = tl.where(total > 0, (largest + tl.log2(tl.where(total > 0, total, 1.0))) * _LN_2, -float("inf"))
        tl.store(lse + i_row + tl.arange(0, 1), b_lse)


def attend_entries(
    q: Tensor, entries: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.attend_entries`."""
    sets = [(entries, block_table, lens, selected)]
    out, lse = _attend(q, sets, scale, None, torch.float32)
    return out, lse


def csa_decode(
    q: Tensor,
    entries: Tensor,
    block_table: Tensor,
    lens: Tensor,
    window: Tensor,
    window_slots: Tensor,
    window_lens: Tensor,
    sinks: Tensor,
    scale: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """See `reference.csa_decode`."""
    sets = [(entries, block_table, lens, selected), (window, window_slots.unsqueeze(1), window_lens, None)]
    out, _ = _attend(q, sets, scale, sinks, q.dtype)
    return out


def _attend(
    q: Tensor,
    sets: list[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    scale: float,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Split each set so that the splits fill the GPU, then merge all splits and the sinks."""
    batch, heads, dim = q.shape
    q = q.contiguous()
    dim_pad = max(16, triton.next_power_of_2(dim))
    # bounds the accumulator's registers: 16 heads of 512 dims take as many as 64 heads of 128
    heads_block = max(16, min(triton.next_power_of_2(heads), 8192 // dim_pad))
    block = 32 if dim_pad >= 256 else 64
    tiles, programs = triton.cdiv(heads, heads_block), 2 * tuning.multiprocessors(q.device)
    places = [table.shape[1] * kv.shape[1] if chosen is None else chosen.shape[1] for kv, table, _, chosen in sets]
    splits = [tuning.decode_splits(batch * tiles, triton.cdiv(count, block), programs) for count in places]
    parts = sum(splits)
    part_out = torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch, heads, parts), dtype=torch.float32, device=q.device)
    first = 0
    for (kv, table, lens, chosen), count, split in zip(sets, places, splits, strict=True):
        checks.entries(q, kv, table, lens)
        assert chosen is None or (chosen.shape[0] == batch and chosen.stride(1) == 1)
        _part_kernel[(split, tiles, batch)](
            q,
            kv,
            table,
            lens,
            chosen,
            part_out,
            part_lse,
            scale * _LOG2E,
            count,
            split,
            first,
            parts,
            kv.stride(0),
            table.stride(0),
            chosen.stride(0) if chosen is not None else 0,
            HEADS=heads,
            HEADS_BLOCK=heads_block,
            DIM=dim,
            DIM_PAD=dim_pad,
            CHUNK_ENTRIES=kv.shape[1],
            BLOCK=block,
            SELECTED=chosen is not None,
            num_warps=8 if dim_pad >= 256 else 4,
            num_stages=2,
        )
        first += split
    out = torch.empty((batch, heads, dim), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    _merge_kernel[(batch * heads,)](
        part_out,
        part_lse,
        sinks,
        out,
        lse,
        parts,
        HEADS=heads,
        DIM=dim,
        DIM_PAD=dim_pad,
        HAS_SINKS=sinks is not None,
        num_warps=4 if dim_pad >= 256 else 1,
    )
    return out, lse
