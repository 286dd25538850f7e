"""Decode attention in Triton by flash decoding: every row is split over as many programs as fill the GPU.

The split kernel has one program per (sequence, KV head, split), which reads its part of the sequence's blocks once for
all query heads of the group. The merge kernel has one program per (sequence, query head, slice of the head dim), which
merges the splits by log-sum-exp. The grids depend on shapes only; lengths, slots and the layer are read on the GPU, so
a CUDA graph can capture the launch. Sizes that change while serving (batch, splits, width of the block table) are not
compile-time constants.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.attention.decode_blocks import LN_2, attend_blocks, count_blocks
from forecache.kernels.common import tuning
from forecache.kernels.common.tuning import DecodeConfig


@triton.jit(do_not_specialize=["layer", "max_splits", "table_stride"])
def _split_kernel(
    q,  # [batch, heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM], or uint16 [..., HEAD_DIM / 2] with PAIRS
    layer,  # int, or a pointer to one
    block_table,  # [batch, max_chunks]
    context_lens,  # [batch]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    part_out,  # [batch, heads, max_splits, HEAD_DIM] float32
    part_lse,  # [batch, heads, max_splits] float32, base 2
    scale_log2e,
    q_batch_stride,
    q_head_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_head_stride,
    max_splits,
    table_stride,
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
):
    i_split, i_head, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    context_len = tl.load(context_lens + i_seq)
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    blocks = count_blocks(context_len, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK)
    splits = tl.minimum(blocks, max_splits)
    if i_split >= splits:
        return
    b_max, b_sum, b_out = attend_blocks(
        q, kv, layer.to(tl.int64), block_table, k_scale, v_scale, scale_log2e, i_seq, i_head, context_len,
        (i_split * blocks) // splits, ((i_split + 1) * blocks) // splits,
        q_batch_stride, q_head_stride, kv_slot_stride, kv_layer_stride, kv_part_stride, kv_head_stride,
        scale_slot_stride, scale_layer_stride, scale_head_stride, table_stride,
        GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK, PAIRS, NATIVE,
        HAS_SCALES,
    )  # fmt: skip
    o_group = tl.arange(0, GROUP_PAD)
    o_dim = tl.arange(0, HEAD_PAD)
    m_group = o_group < GROUP
    o_part = (i_seq * heads + i_head * GROUP + o_group).to(tl.int64) * max_splits + i_split
    tl.store(part_lse + o_part, b_max + tl.log2(b_sum), mask=m_group)
    p_out = part_out + o_part[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, b_out / b_sum[:, None], mask=m_group[:, None] & (o_dim < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["max_splits"])
def _merge_kernel(
    part_out,  # [batch, heads, max_splits, HEAD_DIM] float32
    part_lse,  # [batch, heads, max_splits] float32, base 2
    context_lens,  # [batch]
    out,  # [batch, heads, HEAD_DIM]
    lse,  # [batch, heads] float32
    max_splits,
    HEAD_DIM: tl.constexpr,
    DIM_SLICE: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
):
    i_slice, i_head, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_seq.to(tl.int64) * tl.num_programs(1) + i_head
    context_len = tl.load(context_lens + i_seq)
    blocks = count_blocks(context_len, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK)
    splits = tl.minimum(blocks, max_splits)
    o_split = tl.arange(0, SPLIT_BLOCK)
    o_dim = i_slice * DIM_SLICE + tl.arange(0, DIM_SLICE)
    m_dim = o_dim < HEAD_DIM

    b_max = -float("inf")
    b_sum = 0.0
    b_out = tl.zeros([DIM_SLICE], tl.float32)
    for first in range(0, splits, SPLIT_BLOCK):
        m_split = first + o_split < splits
        o_part = i_row * max_splits + first + o_split
        b_lse = tl.load(part_lse + o_part, mask=m_split, other=-float("inf"))
        # [SPLIT_BLOCK, DIM_SLICE]
        p_part = part_out + o_part[:, None] * HEAD_DIM + o_dim[None, :]
        b_part = tl.load(p_part, mask=m_split[:, None] & m_dim[None, :], other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        b_weight = tl.exp2(b_lse - b_new_max)
        b_keep = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_keep + tl.sum(b_weight, 0)
        b_out = b_out * b_keep + tl.sum(b_part * b_weight[:, None], 0)
        b_max = b_new_max

    b_sum = tl.where(splits > 0, b_sum, 1.0)
    b_norm = tl.where(splits > 0, b_max, 0.0) + tl.log2(b_sum)
    b_out = b_out / b_sum
    tl.store(out + i_row * HEAD_DIM + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim)
    if i_slice == 0:
        # a sequence of length 0: out 0, lse -inf
        tl.store(lse + i_row, tl.where(splits > 0, b_norm * LN_2, -float("inf")))


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
    kv_heads = heads // constants["GROUP"]
    max_blocks = max_chunks * constants["BLOCKS_PER_CHUNK"]
    splits = tuning.decode_splits(batch * kv_heads, max_blocks, config.programs_per_sm * tuning.multiprocessors(device))
    part_out = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=device)
    part_lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=device)
    *tensors, scale_log2e = arguments
    *kv_strides, table_stride = strides
    _split_kernel[(splits, kv_heads, batch)](
        *tensors,
        part_out,
        part_lse,
        scale_log2e,
        *kv_strides,
        splits,
        table_stride,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    dim_slice = min(32, triton.next_power_of_2(head_dim))
    context_lens = tensors[4]
    _merge_kernel[(triton.cdiv(head_dim, dim_slice), heads, batch)](
        part_out,
        part_lse,
        context_lens,
        out,
        lse,
        splits,
        DIM_SLICE=dim_slice,
        SPLIT_BLOCK=64,
        num_warps=4,
        **{name: constants[name] for name in ("HEAD_DIM", "CHUNK_TOKENS", "BLOCK", "BLOCKS_PER_CHUNK")},
    )
