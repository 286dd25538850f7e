"""Index scores of resident entries, in Triton: one read of a key serves all heads. In PyTorch: `reference`."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.common import checks

_BLOCK = 64


@triton.jit(do_not_specialize=["table_stride", "out_stride"])
def _score_kernel(
    q,  # [batch, HEADS, DIM]
    weights,  # [batch, HEADS] float32
    keys,  # [slots, CHUNK_ENTRIES, DIM]
    block_table,  # [batch, max_chunks]
    lens,  # [batch]
    out,  # [batch, max_chunks * CHUNK_ENTRIES] float32
    slot_stride,
    table_stride,
    out_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS_PER_CHUNK: tl.constexpr = (CHUNK_ENTRIES + BLOCK - 1) // BLOCK
    i_block, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk = i_block // BLOCKS_PER_CHUNK
    o_offset = (i_block % BLOCKS_PER_CHUNK) * BLOCK + tl.arange(0, BLOCK)
    o_dim = tl.arange(0, DIM_PAD)
    o_entry = i_chunk * CHUNK_ENTRIES + o_offset
    m_place = o_offset < CHUNK_ENTRIES
    length = tl.load(lens + i_seq)
    b_scores = tl.full([BLOCK], -float("inf"), tl.float32)
    if i_chunk * CHUNK_ENTRIES < length:
        m_entry = m_place & (o_entry < length)
        slot = tl.load(block_table + i_seq * table_stride + i_chunk).to(tl.int64)
        # [DIM_PAD, BLOCK]
        p_keys = keys + slot * slot_stride + o_offset[None, :] * DIM + o_dim[:, None]
        b_keys = tl.load(p_keys, mask=m_entry[None, :] & (o_dim < DIM)[:, None], other=0.0)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i_head in range(0, HEADS, HEADS_BLOCK):
            o_head = i_head + tl.arange(0, HEADS_BLOCK)
            m_head = o_head < HEADS
            p_q = q + i_seq * (HEADS * DIM) + o_head[:, None] * DIM + o_dim[None, :]
            b_q = tl.load(p_q, mask=m_head[:, None] & (o_dim < DIM)[None, :], other=0.0)
            b_w = tl.load(weights + i_seq * HEADS + o_head, mask=m_head, other=0.0)
            # weights may be negative, so products are rectified before they are weighted
            b_products = tl.maximum(tl.dot(b_q, b_keys.to(b_q.dtype), input_precision="ieee"), 0.0)
            b_sum += tl.sum(b_products * b_w[:, None], 0)
        b_scores = tl.where(m_entry, b_sum, b_scores)
    tl.store(out + i_seq * out_stride + o_entry, b_scores, mask=m_place)


def score_entries(q: Tensor, weights: Tensor, keys: Tensor, block_table: Tensor, lens: Tensor) -> Tensor:
    """See `reference.score_entries`."""
    checks.entries(q, keys, block_table, lens)
    batch, heads, dim = q.shape
    chunk_entries, max_chunks = keys.shape[1], block_table.shape[1]
    assert weights.shape == (batch, heads), f"weights {tuple(weights.shape)} of queries {tuple(q.shape)}"
    q, weights = q.contiguous(), weights.float().contiguous()
    out = torch.empty((batch, max_chunks * chunk_entries), dtype=torch.float32, device=q.device)
    block = max(16, min(_BLOCK, triton.next_power_of_2(chunk_entries)))
    _score_kernel[(max_chunks * triton.cdiv(chunk_entries, block), batch)](
        q,
        weights,
        keys,
        block_table,
        lens,
        out,
        keys.stride(0),
        block_table.stride(0),
        out.stride(0),
        HEADS=heads,
        HEADS_BLOCK=max(16, min(64, triton.next_power_of_2(heads))),
        DIM=dim,
        DIM_PAD=max(16, triton.next_power_of_2(dim)),
        CHUNK_ENTRIES=chunk_entries,
        BLOCK=block,
        num_warps=4,
    )
    return out
