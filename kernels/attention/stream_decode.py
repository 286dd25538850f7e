"""Decode attention in one wave of programs in Triton: all blocks of all rows in one stream, cut into equal shares.

A row is a sequence and a KV head. A program walks over the rows of its share, from the middle of one to the middle of
another; so lengths may differ as they like, and every multiprocessor has the same number of blocks to read (stream-K,
arXiv 2301.03598, for attention: LeanAttention, arXiv 2405.10480). Rows within one share are final at once. Of the
others every share leaves a partial result, and the one that arrives last merges them, in the order of the shares;
without counters to tell who that is, a second kernel does. The grid depends on shapes only, and lengths, slots and the
layer are read on the GPU: the launch can be captured in a CUDA graph.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from forecache.kernels.attention.decode_blocks import attend_blocks, count_blocks
from forecache.kernels.attention.merge_shares import LN_2, merge_kernel, merge_shares, share_of, share_start
from forecache.kernels.common import tuning
from forecache.kernels.common.tuning import DecodeConfig

_MERGE_ELEMENTS = 8192  # read at once by the second kernel; the first has fewer registers left


@triton.jit(do_not_specialize=["layer", "batch", "kv_heads", "table_stride", "block_lse_stride"])
def _stream_kernel(
    q,  # [batch, heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM], or uint16 [..., HEAD_DIM / 2] with PAIRS
    layer,  # int, or a pointer to one
    block_table,  # [batch, max_chunks]
    context_lens,  # [batch]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    counters,  # [batch * kv_heads] int32, zeros before and after
    part_out,  # [2 * shares, GROUP, HEAD_DIM] float32
    part_lse,  # [2 * shares, GROUP] float32, base 2
    block_lse,  # [batch, heads, max_chunks * BLOCKS_PER_CHUNK] float32, base 2
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
    block_lse_stride,
    BATCH_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    GROUP_TIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_COUNTERS: tl.constexpr,
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
            q, kv, layer, block_table, k_scale, v_scale, block_lse, scale_log2e, i_seq, i_head, heads,
            tl.load(context_lens + i_seq), position - row_start, stop - row_start,
            q_batch_stride, q_head_stride, kv_slot_stride, kv_layer_stride, kv_part_stride, kv_head_stride,
            scale_slot_stride, scale_layer_stride, scale_head_stride, table_stride, block_lse_stride,
            GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK, PAIRS, NATIVE,
            HAS_SCALES, HAS_MASS,
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
            if HAS_COUNTERS:
                p_counter = counters + i_seq * kv_heads + i_head
                tl.debug_barrier()  # all threads have stored before one of them counts
                arrived = tl.atomic_add(p_counter, 1, sem="acq_rel") + 1
                if arrived == share_of(row_end - 1, total, shares) - share_of(row_start, total, shares) + 1:
                    tl.store(p_counter, 0)
                    o_head = tl.arange(0, GROUP_TIGHT)
                    m_head = o_head < GROUP
                    b_merged, b_merged_lse = merge_shares(
                        part_out, part_lse, row_start, row_end, total, shares, o_head, m_head, o_dim, m_dim,
                        GROUP, HEAD_DIM, PARTS,
                    )  # fmt: skip
                    tl.store(lse + o_row + o_head, b_merged_lse * LN_2, mask=m_head)
                    p_out = out + (o_row + o_head)[:, None] * HEAD_DIM + o_dim[None, :]
                    m_out = m_head[:, None] & m_dim[None, :]
                    tl.store(p_out, b_merged.to(out.dtype.element_ty), mask=m_out)
        part = 2 * i_share + 1
        position = stop

    for i_seq in range(tl.program_id(0), batch, tl.num_programs(0)):  # sequences without keys: out 0, lse -inf
        if tl.load(context_lens + i_seq) == 0:
            for i_head in range(heads):
                o_row = i_seq * heads + i_head
                tl.store(lse + o_row, -float("inf"))
                tl.store(out + o_row * HEAD_DIM + o_dim, tl.zeros([HEAD_PAD], out.dtype.element_ty), mask=m_dim)


def launch(
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    strides: tuple[int, ...],
    out: Tensor,
    lse: Tensor,
    chunk_mass: Tensor | None,
    max_chunks: int,
    config: DecodeConfig,
    counters: Tensor | None,
) -> None:
    """Fill ``out``, ``lse`` and ``chunk_mass``; the rest comes from `sparse_decode.sparse_decode`."""
    (batch, heads, head_dim), device = out.shape, out.device
    group = constants["GROUP"]
    kv_heads = heads // group
    max_blocks = max_chunks * constants["BLOCKS_PER_CHUNK"]
    shares = min(config.programs_per_sm * tuning.multiprocessors(device), batch * kv_heads * max_blocks)
    part_out = torch.empty((2 * shares, group, head_dim), dtype=torch.float32, device=device)
    part_lse = torch.empty((2 * shares, group), dtype=torch.float32, device=device)
    block_lse = part_lse  # not touched unless the mass is wanted
    if chunk_mass is not None:
        block_lse, counters = torch.empty((batch, heads, max_blocks), dtype=torch.float32, device=device), None
    dependent = counters is None and tuning.gpu_family(device) == "hopper"
    batch_pad, head_pad = max(16, triton.next_power_of_2(batch)), constants["HEAD_PAD"]
    group_tight = triton.next_power_of_2(group)
    *tensors, scale_log2e = arguments
    _stream_kernel[(shares,)](
        *tensors,
        counters,
        part_out,
        part_lse,
        block_lse,
        out,
        lse,
        scale_log2e,
        batch,
        kv_heads,
        *strides,
        max_blocks,
        BATCH_PAD=batch_pad,
        GROUP_TIGHT=group_tight,
        PARTS=max(1, _MERGE_ELEMENTS // 2 // (group_tight * head_pad)),
        HAS_COUNTERS=counters is not None,
        DEPENDENT=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # of a multiprocessor's 65,536: all shares must run at once
        maxnreg=max(32, min(255, 65536 // (32 * config.num_warps * config.programs_per_sm) // 8 * 8)),
        **constants,
    )
    if counters is not None:
        return
    options = {"launch_pdl": True} if dependent else {}
    names = ("GROUP", "HEAD_DIM", "HEAD_PAD", "CHUNK_TOKENS", "BLOCK", "BLOCKS_PER_CHUNK", "HAS_MASS")
    merge_kernel[(heads, batch)](
        tensors[4],
        part_out,
        part_lse,
        block_lse,
        out,
        lse,
        chunk_mass,
        batch,
        shares,
        max_chunks,
        BATCH_PAD=batch_pad,
        PARTS=max(1, _MERGE_ELEMENTS // head_pad),
        CHUNK_BLOCK=128,
        DEPENDENT=dependent,
        num_warps=4,
        **{name: constants[name] for name in names},
        **options,
    )
