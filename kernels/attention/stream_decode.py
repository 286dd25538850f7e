"""Decode attention in Triton, in one wave of programs with equal shares of the work.

A row is one sequence and one KV head. The blocks of all rows form one stream, which is cut into equal shares, one per
program. A share may begin and end in the middle of a row, so every multiprocessor reads the same number of blocks
however much the sequences' lengths differ (stream-K, arXiv 2301.03598; for attention: LeanAttention, arXiv
2405.10480). The stream kernel writes the final output of rows that lie within one share. For other rows each share
writes a partial result, and the merge kernel combines them in the order of the shares. The grids depend on shapes only;
lengths, slots and the layer are read on the GPU, so a CUDA graph can capture the launch.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM102

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from forecache.kernels.attention.decode_blocks import LN_2, attend_blocks, count_blocks
from forecache.kernels.common import tuning
from forecache.kernels.common.tuning import DecodeConfig

_MERGE_ELEMENTS = 8192  # of partial outputs that the merge kernel reads at once


@triton.jit
def share_start(i_share, total, shares):
    """First block of a share. Each of the first ``total % shares`` shares has one block more than the others."""
    return i_share * (total // shares) + tl.minimum(i_share, total % shares)


@triton.jit
def share_of(i_block, total, shares):
    """The share that contains a block."""
    size, larger = total // shares, total % shares
    after = i_block - larger * (size + 1)
    return tl.where(after < 0, i_block // (size + 1), larger + after // size)


@triton.jit(do_not_specialize=["layer", "batch", "kv_heads", "table_stride"])
def _stream_kernel(
    q,  # [batch, heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM], or uint16 [..., HEAD_DIM / 2] with PAIRS
    layer,  # int, or a pointer to one
    block_table,  # [batch, max_chunks]
    context_lens,  # [batch]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    part_out,  # [2 * shares, GROUP, HEAD_DIM] float32
    part_lse,  # [2 * shares, GROUP] float32, base 2
    out,  # [batch, heads, HEAD_DIM]
    lse,  # [batch, heads] float32
    scale_log2e,
    batch,
    kv_heads,
    q_batch_stride,
    q_head_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_head_stride,
    table_stride,
    BATCH_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    layer = layer.to(tl.int64)
    heads = kv_heads * GROUP
    o_seq = tl.arange(0, BATCH_PAD)
    b_lens = tl.load(context_lens + o_seq, mask=o_seq < batch, other=0, eviction_policy="evict_last")
    b_blocks = count_blocks(b_lens, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK).to(tl.int32)
    b_ends = tl.cumsum(b_blocks, 0) * kv_heads
    total = tl.max(b_ends, 0)
    shares = tl.minimum(tl.num_programs(0), total)
    i_share = tl.program_id(0)

    o_group = tl.arange(0, GROUP_PAD)
    o_dim = tl.arange(0, HEAD_PAD)
    m_group = o_group < GROUP
    m_dim = o_dim < HEAD_DIM
    m_tile = m_group[:, None] & m_dim[None, :]
    position = 0
    share_end = 0
    if i_share < shares:
        position = share_start(i_share, total, shares)
        share_end = share_start(i_share + 1, total, shares)
    part = 2 * i_share
    while position < share_end:
        i_seq = tl.sum((b_ends <= position).to(tl.int32), 0)
        seq_start = tl.max(tl.where(b_ends <= position, b_ends, 0), 0)
        blocks = tl.sum(tl.where(o_seq == i_seq, b_blocks, 0), 0)
        i_head = (position - seq_start) // blocks
        row_start = seq_start + i_head * blocks
        row_end = row_start + blocks
        stop = tl.minimum(share_end, row_end)
        b_max, b_sum, b_out = attend_blocks(
            q, kv, layer, block_table, k_scale, v_scale, scale_log2e, i_seq, i_head,
            tl.load(context_lens + i_seq), position - row_start, stop - row_start,
            q_batch_stride, q_head_stride, kv_slot_stride, kv_layer_stride, kv_part_stride, kv_head_stride,
            scale_slot_stride, scale_layer_stride, scale_head_stride, table_stride,
            GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK, PAIRS, NATIVE,
            HAS_SCALES,
        )  # fmt: skip
        b_lse = b_max + tl.log2(b_sum)
        b_out = b_out / b_sum[:, None]
        o_row = i_seq.to(tl.int64) * heads + i_head * GROUP
        if stop - position == blocks:
            tl.store(lse + o_row + o_group, b_lse * LN_2, mask=m_group)
            p_out = out + (o_row + o_group)[:, None] * HEAD_DIM + o_dim[None, :]
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)
        else:
            tl.store(part_lse + part * GROUP + o_group, b_lse, mask=m_group)
            tl.store(part_out + (part * GROUP + o_group)[:, None] * HEAD_DIM + o_dim[None, :], b_out, mask=m_tile)
        part = 2 * i_share + 1
        position = stop

    for i_seq in range(tl.program_id(0), batch, tl.num_programs(0)):  # sequences of length 0: out 0, lse -inf
        if tl.load(context_lens + i_seq) == 0:
            for i_head in range(heads):
                o_row = i_seq * heads + i_head
                tl.store(lse + o_row, -float("inf"))
                tl.store(out + o_row * HEAD_DIM + o_dim, tl.zeros([HEAD_PAD], out.dtype.element_ty), mask=m_dim)


@triton.jit(do_not_specialize=["batch", "shares"])
def _merge_kernel(
    context_lens,  # [batch]
    part_out,  # [2 * shares, GROUP, HEAD_DIM] float32
    part_lse,  # [2 * shares, GROUP] float32, base 2
    out,  # [batch, heads, HEAD_DIM]
    lse,  # [batch, heads] float32
    batch,
    shares,
    BATCH_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    i_query, i_seq = tl.program_id(0), tl.program_id(1)
    i_head = i_query // GROUP
    kv_heads = tl.num_programs(0) // GROUP
    o_seq = tl.arange(0, BATCH_PAD)
    b_lens = tl.load(context_lens + o_seq, mask=o_seq < batch, other=0)
    b_blocks = count_blocks(b_lens, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK).to(tl.int32)
    blocks = tl.sum(tl.where(o_seq == i_seq, b_blocks, 0), 0)
    total = tl.sum(b_blocks, 0) * kv_heads
    row_start = tl.sum(tl.where(o_seq < i_seq, b_blocks, 0), 0) * kv_heads + i_head * blocks
    shares = tl.minimum(shares, total)
    o_row = i_seq.to(tl.int64) * tl.num_programs(0) + i_query
    if DEPENDENT:
        gdc_wait()
    if blocks > 0:
        if share_of(row_start, total, shares) != share_of(row_start + blocks - 1, total, shares):
            o_dim = tl.arange(0, HEAD_PAD)
            m_dim = o_dim < HEAD_DIM
            o_head = i_query % GROUP + tl.arange(0, 1)
            m_head = o_head < GROUP
            first = share_of(row_start, total, shares)
            count = share_of(row_start + blocks - 1, total, shares) - first + 1
            # part 0 of a share is its first row, part 1 its last; only the row's first share may begin before the row
            begun = (share_start(first, total, shares) < row_start).to(tl.int32)
            b_max = tl.full(o_head.shape, -float("inf"), tl.float32)
            b_sum = tl.zeros(o_head.shape, tl.float32)
            b_out = tl.zeros([o_head.shape[0], o_dim.shape[0]], tl.float32)
            for start in range(0, count, PARTS):
                o_share = start + tl.arange(0, PARTS)
                m_share = o_share < count
                o_part = 2 * (first + o_share) + tl.where(o_share == 0, begun, 0)
                # [PARTS, 1]
                o_lse = o_part[:, None] * GROUP + o_head[None, :]
                m_lse = m_share[:, None] & m_head[None, :]
                b_lse = tl.load(part_lse + o_lse, mask=m_lse, other=0.0, cache_modifier=".cg")
                b_lse = tl.where(m_share[:, None], b_lse, -float("inf"))
                # [PARTS, 1, HEAD_PAD]
                p_part = part_out + o_lse[:, :, None] * HEAD_DIM + o_dim[None, None, :]
                m_part = m_lse[:, :, None] & m_dim[None, None, :]
                b_part = tl.load(p_part, mask=m_part, other=0.0, cache_modifier=".cg")
                b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
                b_weight = tl.exp2(b_lse - b_new_max[None, :])
                b_keep = tl.exp2(b_max - b_new_max)
                b_sum = b_sum * b_keep + tl.sum(b_weight, 0)
                b_out = b_out * b_keep[:, None] + tl.sum(b_part * b_weight[:, :, None], 0)
                b_max = b_new_max
            b_out = b_out / b_sum[:, None]
            b_lse = b_max + tl.log2(b_sum)
            tl.store(lse + o_row + tl.arange(0, 1), b_lse * LN_2)
            p_out = out + o_row * HEAD_DIM + o_dim[None, :]
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_dim[None, :])


def launch(
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    strides: tuple[int, ...],
    out: Tensor,
    lse: Tensor,
    max_chunks: int,
    config: DecodeConfig,
) -> None:
    """Fill ``out`` and ``lse``; `decode.sparse_decode` prepares the other arguments."""
    (batch, heads, head_dim), device = out.shape, out.device
    group = constants["GROUP"]
    kv_heads = heads // group
    max_blocks = max_chunks * constants["BLOCKS_PER_CHUNK"]
    shares = min(config.programs_per_sm * tuning.multiprocessors(device), batch * kv_heads * max_blocks)
    part_out = torch.empty((2 * shares, group, head_dim), dtype=torch.float32, device=device)
    part_lse = torch.empty((2 * shares, group), dtype=torch.float32, device=device)
    dependent = tuning.gpu_family(device) == "hopper"
    batch_pad, head_pad = max(16, triton.next_power_of_2(batch)), constants["HEAD_PAD"]
    *tensors, scale_log2e = arguments
    _stream_kernel[(shares,)](
        *tensors,
        part_out,
        part_lse,
        out,
        lse,
        scale_log2e,
        batch,
        kv_heads,
        *strides,
        BATCH_PAD=batch_pad,
        DEPENDENT=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # registers per thread such that all shares run at once; a multiprocessor has 65,536
        maxnreg=max(32, min(255, 65536 // (32 * config.num_warps * config.programs_per_sm) // 8 * 8)),
        **constants,
    )
    options = {"launch_pdl": True} if dependent else {}
    names = ("GROUP", "HEAD_DIM", "HEAD_PAD", "CHUNK_TOKENS", "BLOCK", "BLOCKS_PER_CHUNK")
    _merge_kernel[(heads, batch)](
        tensors[4],
        part_out,
        part_lse,
        out,
        lse,
        batch,
        shares,
        BATCH_PAD=batch_pad,
        PARTS=max(1, _MERGE_ELEMENTS // head_pad),
        DEPENDENT=dependent,
        num_warps=4,
        **{name: constants[name] for name in names},
        **options,
    )
