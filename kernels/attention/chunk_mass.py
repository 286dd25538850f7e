"""The share of attention that some tokens put on each chunk, in Triton. In PyTorch: `reference.chunk_mass`.

A program has one chunk of one sequence and one pair of a layer and a head, for all rows of the sequence. The grid
depends on shapes only, so a CUDA graph can capture the launch.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.common import checks

LOG2_E: tl.constexpr = tl.constexpr(1 / math.log(2))
_ROWS = 32  # of a product; the last tokens of a prompt are as many
_BLOCK_ELEMENTS = 8192


@triton.jit(do_not_specialize=["max_chunks", "table_stride"])
def _mass_kernel(
    q,  # [rows, pairs, HEAD_DIM]
    lse,  # [rows, pairs]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM]
    layers,  # [pairs]
    kv_heads,  # [pairs]
    block_table,  # [sequences, max_chunks]
    positions,  # [rows]
    starts,  # [sequences + 1]
    k_scale,  # [slots, layers, kv_heads]
    mass,  # [sequences, pairs, max_chunks]
    scale_log2e,
    max_chunks,
    q_row_stride,
    q_pair_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_head_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk, i_pair, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pairs = tl.num_programs(1)
    layer = tl.load(layers + i_pair).to(tl.int64)
    i_head = tl.load(kv_heads + i_pair).to(tl.int64)
    slot = tl.load(block_table + i_seq.to(tl.int64) * table_stride + i_chunk).to(tl.int64)
    # The pool may be larger than 2^31 elements.
    p_k = kv + slot * kv_slot_stride + layer * kv_layer_stride + i_head * kv_head_stride
    o_dim = tl.arange(0, HEAD_PAD)
    o_block = tl.arange(0, BLOCK)

    largest = 0.0
    last_row = tl.load(starts + i_seq + 1)
    for first_row in range(tl.load(starts + i_seq), last_row, ROWS):
        o_row = first_row + tl.arange(0, ROWS)
        m_row = o_row < last_row
        # the last token of the chunk that a row sees; negative if it sees none
        b_last = tl.load(positions + o_row, mask=m_row, other=-1).to(tl.int32) - i_chunk * CHUNK_TOKENS
        b_last = tl.where(m_row, b_last, -1)
        seen = tl.minimum(tl.max(b_last, 0) + 1, CHUNK_TOKENS)
        if seen > 0:  # else the table may have any slot
            factor = scale_log2e
            if HAS_SCALES:
                o_scale = slot * scale_slot_stride + layer * scale_layer_stride + i_head * scale_head_stride
                factor *= tl.load(k_scale + o_scale)
            # [ROWS, HEAD_PAD]
            p_q = q + o_row.to(tl.int64)[:, None] * q_row_stride + i_pair * q_pair_stride + o_dim[None, :]
            b_q = tl.load(p_q, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)
            b_max = tl.full([ROWS], -float("inf"), tl.float32)
            b_sum = tl.zeros([ROWS], tl.float32)
            for start in range(0, seen, BLOCK):
                o_token = start + o_block
                m_k = (o_dim < HEAD_DIM)[:, None] & (o_token < seen)[None, :]
                # [HEAD_PAD, BLOCK]
                b_k = tl.load(p_k + o_dim[:, None] + o_token[None, :] * HEAD_DIM, mask=m_k, other=0.0)
                b_logits = tl.dot(b_q, b_k.to(b_q.dtype), input_precision=PRECISION) * factor
                m_tile = (o_token[None, :] <= b_last[:, None]) & (o_token < seen)[None, :]
                b_logits = tl.where(m_tile, b_logits, -float("inf"))
                b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
                b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
                b_p = tl.exp2(b_logits - b_shift[:, None])
                b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(b_p, 1)
                b_max = b_new_max
            b_lse = tl.load(lse + o_row.to(tl.int64) * pairs + i_pair, mask=m_row, other=0.0) * LOG2_E
            b_share = tl.where(b_last >= 0, tl.exp2(b_max - b_lse) * b_sum, 0.0)
            largest = tl.maximum(largest, tl.max(b_share, 0))
    tl.store(mass + (i_seq.to(tl.int64) * pairs + i_pair) * max_chunks + i_chunk, largest)


def chunk_mass(
    q: Tensor,
    lse: Tensor,
    kv: Tensor,
    layers: Tensor,
    kv_heads: Tensor,
    block_table: Tensor,
    positions: Tensor,
    starts: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
) -> Tensor:
    """See `reference.chunk_mass`."""
    checks.mass(q, lse, kv, layers, kv_heads, block_table, positions, starts, k_scale)
    pairs, head_dim = q.shape[1:]
    sequences, max_chunks = block_table.shape
    chunk_tokens = kv.shape[4]
    mass = torch.empty((sequences, pairs, max_chunks), dtype=torch.float32, device=q.device)
    if sequences and max_chunks:
        head_pad = max(16, triton.next_power_of_2(head_dim))
        _mass_kernel[(max_chunks, pairs, sequences)](
            q,
            lse,
            kv,
            layers,
            kv_heads,
            block_table,
            positions,
            starts,
            k_scale,
            mass,
            scale / math.log(2),
            max_chunks,
            *q.stride()[:2],
            *(kv.stride(axis) for axis in (0, 1, 3)),
            *(k_scale.stride() if k_scale is not None else (0, 0, 0)),
            block_table.stride(0),
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad,
            CHUNK_TOKENS=chunk_tokens,
            BLOCK=max(16, min(triton.next_power_of_2(chunk_tokens), _BLOCK_ELEMENTS // head_pad)),
            ROWS=_ROWS,
            HAS_SCALES=k_scale is not None,
            # as exact as float32; float32 itself would not run on tensor cores
            PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        )
    return mass.amax(1).round_(decimals=3)
