"""Attention of packed prompt tokens over the hot pool and themselves, in Triton.

In PyTorch: `reference.ragged_prefill`.

A program has a tile of rows: some tokens of one sequence, each with all query heads of one KV head, so that it reads
K/V once for the group. It reads the past from the pool through the block table, then the sequence's own tokens up to
the diagonal, by online softmax (FlashAttention-2, arXiv 2307.08691). Only the last blocks of either part are masked.

The grid depends on shapes only. A program finds its sequence in ``starts``: tokens before the first sequence and after
the last count as sequences too, and tile numbers leave room for one tile more than a sequence's tokens fill. Where
there are too few tiles for all multiprocessors, several programs share the past of a tile, and a second kernel merges
their results.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806, SIM108

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from forecache.kernels.common import checks, tuning
from forecache.kernels.common.tuning import PrefillConfig

LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def find_tile(starts, i_tile, tokens, sequences, TILE_TOKENS: tl.constexpr):
    """The segment of a tile (0 is before the first sequence, ``sequences + 1`` after the last one), the segment's first
    token and its end, and the tile's first token, counted from the segment's. That may lie behind the end."""
    # segment i begins with tile number starts[i - 1] // TILE_TOKENS + i
    i_segment = 0
    for first in range(0, sequences + 1, 128):
        o_start = first + tl.arange(0, 128)
        b_start = tl.load(starts + o_start, mask=o_start <= sequences, other=1 << 30)
        i_segment += tl.sum((b_start // TILE_TOKENS + o_start + 1 <= i_tile).to(tl.int32), 0)
    begin = tl.load(starts + i_segment - 1, mask=i_segment > 0, other=0)
    end = tl.load(starts + i_segment, mask=i_segment <= sequences, other=tokens)
    return i_segment, begin, end, (i_tile - begin // TILE_TOKENS - i_segment) * TILE_TOKENS


@triton.jit
def read_block(
    p_tile,  # of the block's first element
    descriptor,
    i_0,  # the block's place along the first axis of the descriptor
    i_1,
    i_2,
    token_stride,
    m_token,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Keys ``[HEAD_PAD, BLOCK]`` (TRANSPOSED) or values ``[BLOCK, HEAD_PAD]``, zeros where ``m_token`` is false."""
    if DESCRIPTORS:
        if POOL:
            b_x = descriptor.load([i_0, i_1, i_2, 0]).reshape([BLOCK, HEAD_PAD])
        else:
            b_x = descriptor.load([i_0, i_1, 0]).reshape([BLOCK, HEAD_PAD])
        if TRANSPOSED:
            b_x = tl.trans(b_x)
        elif MASKED:  # a masked key only needs a logit, but a probability of 0 times NaN is NaN
            b_x = tl.where(m_token[:, None], b_x, 0.0)
    else:
        o_token, o_dim = tl.arange(0, BLOCK), tl.arange(0, HEAD_PAD)
        if TRANSPOSED:
            p_x = p_tile + o_dim[:, None] + o_token[None, :] * token_stride
            m_dim = o_dim[:, None] < HEAD_DIM
            if MASKED:
                b_x = tl.load(p_x, mask=m_dim & m_token[None, :], other=0.0)
            elif HEAD_DIM == HEAD_PAD:
                b_x = tl.load(p_x)
            else:
                b_x = tl.load(p_x, mask=m_dim, other=0.0)
        else:
            p_x = p_tile + o_token[:, None] * token_stride + o_dim[None, :]
            m_dim = o_dim[None, :] < HEAD_DIM
            if MASKED:
                b_x = tl.load(p_x, mask=m_token[:, None] & m_dim, other=0.0)
            elif HEAD_DIM == HEAD_PAD:
                b_x = tl.load(p_x)
            else:
                b_x = tl.load(p_x, mask=m_dim, other=0.0)
    return b_x


@triton.jit
def attend_block(
    b_q, b_k, b_v, factor, v_factor, m_tile, b_max, b_sum, b_out, MASKED: tl.constexpr, SCALED: tl.constexpr
):
    """Online softmax over one block; ``factor`` brings logits to base 2, and is positive."""
    b_logits = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
    if MASKED:
        b_logits = tl.where(m_tile, b_logits, -float("inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_logits, 1) * factor)
    b_p = tl.exp2(b_logits * factor - b_new_max[:, None])
    b_keep = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_out = b_out * b_keep[:, None]
    if SCALED:
        b_p *= v_factor
    b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out, input_precision="ieee")
    return b_new_max, b_sum, b_out


@triton.jit
def attend_two_blocks(
    b_q, b_k, b_v, b_k_2, b_v_2, factor, factor_2, v_factor, v_factor_2, b_max, b_sum, b_out, SCALED: tl.constexpr
):
    """`attend_block` without masks over two blocks, at the cost of one rescaling of the output."""
    b_logits = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
    b_logits_2 = tl.dot(b_q, b_k_2.to(b_q.dtype), input_precision="ieee")
    if SCALED:
        b_logits *= factor
        b_logits_2 *= factor_2
        b_new_max = tl.maximum(b_max, tl.max(tl.maximum(b_logits, b_logits_2), 1))
        b_p = tl.exp2(b_logits - b_new_max[:, None])
        b_p_2 = tl.exp2(b_logits_2 - b_new_max[:, None])
    else:
        b_new_max = tl.maximum(b_max, tl.max(tl.maximum(b_logits, b_logits_2), 1) * factor)
        b_p = tl.exp2(b_logits * factor - b_new_max[:, None])
        b_p_2 = tl.exp2(b_logits_2 * factor - b_new_max[:, None])
    b_keep = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_keep + tl.sum(b_p + b_p_2, 1)
    b_out = b_out * b_keep[:, None]
    if SCALED:
        b_p *= v_factor
        b_p_2 *= v_factor_2
    b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out, input_precision="ieee")
    b_out = tl.dot(b_p_2.to(b_q.dtype), b_v_2.to(b_q.dtype), b_out, input_precision="ieee")
    return b_new_max, b_sum, b_out


@triton.jit
def read_pool_block(
    p_kv, kv_blocks, slot, i_plane, v_planes, offset, kv_slot_stride, kv_part_stride, m_token,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Keys ``[HEAD_PAD, BLOCK]`` and values ``[BLOCK, HEAD_PAD]`` of a block within one slot."""
    p_block = p_kv + slot.to(tl.int64) * kv_slot_stride + offset * HEAD_DIM
    b_k = read_block(
        p_block, kv_blocks, slot, i_plane, offset, HEAD_DIM, m_token,
        BLOCK, HEAD_DIM, HEAD_PAD, True, MASKED, DESCRIPTORS, True,
    )  # fmt: skip
    b_v = read_block(
        p_block + kv_part_stride, kv_blocks, slot, i_plane + v_planes, offset, HEAD_DIM, m_token,
        BLOCK, HEAD_DIM, HEAD_PAD, True, MASKED, DESCRIPTORS, False,
    )  # fmt: skip
    return b_k, b_v


@triton.jit
def read_factors(k_scale, v_scale, slot, o_scale, scale_slot_stride, scale_log2e, HAS_SCALES: tl.constexpr):
    """Factors of a slot's logits and of its values."""
    factor, v_factor = scale_log2e, 1.0
    if HAS_SCALES:
        at = slot.to(tl.int64) * scale_slot_stride + o_scale
        factor = scale_log2e * tl.load(k_scale + at)
        v_factor = tl.load(v_scale + at)
    return factor, v_factor


@triton.jit(do_not_specialize=["layer", "tokens", "sequences", "splits", "table_stride"])
def _prefill_kernel(
    q,  # [tokens, heads, HEAD_DIM]
    k,  # [tokens, kv_heads, HEAD_DIM]
    v,  # [tokens, kv_heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM]
    k_blocks,  # with DESCRIPTORS a descriptor of k, in blocks of OWN_BLOCK tokens
    v_blocks,  # the same of v
    kv_blocks,  # with DESCRIPTORS one of kv as [slots, layers * 2 * kv_heads, CHUNK_TOKENS, HEAD_DIM]
    layer,  # int, or a pointer to one
    block_table,  # [sequences, max_chunks]
    past_lens,  # [sequences]
    starts,  # [sequences + 1]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    out,  # [tokens, heads, HEAD_DIM]; float32 [splits, tokens, heads, HEAD_DIM] of more than one split
    lse,  # float32 [tokens, heads], or [splits, tokens, heads]
    scale_log2e,
    tokens,
    sequences,
    kv_heads,
    splits,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # query heads of a tile: GROUP, or as many of it as there are rows
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    TILE_TOKENS: tl.constexpr = ROWS // HEAD_TILE
    SLICES: tl.constexpr = (GROUP + HEAD_TILE - 1) // HEAD_TILE
    BLOCKS_PER_CHUNK: tl.constexpr = (CHUNK_TOKENS + BLOCK - 1) // BLOCK
    # All heads and splits of a tile before the next tile, and the last tile, which has most keys, first.
    columns = kv_heads * SLICES
    i_column = tl.program_id(0) % columns
    i_split = tl.program_id(0) // columns % splits
    i_tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (columns * splits)
    i_head, i_slice = i_column // SLICES, i_column % SLICES
    i_segment, begin, end, first_token = find_tile(starts, i_tile, tokens, sequences, TILE_TOKENS)
    length = end - begin
    if first_token >= length:
        return

    o_row = tl.arange(0, ROWS)
    o_dim = tl.arange(0, HEAD_PAD)
    o_own = first_token + o_row // HEAD_TILE
    o_group = i_slice * HEAD_TILE + o_row % HEAD_TILE
    m_row = (o_row < TILE_TOKENS * HEAD_TILE) & (o_own < length) & (o_group < GROUP)
    m_rows = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_token = (begin + o_own).to(tl.int64)
    o_query = i_head * GROUP + o_group
    o_lse = o_token * (kv_heads * GROUP) + o_query
    o_lse += i_split.to(tl.int64) * tokens * (kv_heads * GROUP)
    p_out = out + o_lse[:, None] * HEAD_DIM + o_dim[None, :]
    if (i_segment == 0) | (i_segment > sequences):
        tl.store(p_out, tl.zeros([ROWS, HEAD_PAD], out.dtype.element_ty), mask=m_rows)
        tl.store(lse + o_lse, tl.full([ROWS], -float("inf"), tl.float32), mask=m_row)
        return

    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    layer = layer.to(tl.int64)
    i_seq = i_segment - 1
    # The pool may be larger than 2^31 elements.
    p_kv = kv + layer * kv_layer_stride + i_head * kv_head_stride
    p_table = block_table + i_seq.to(tl.int64) * table_stride
    i_plane = layer.to(tl.int32) * 2 * kv_heads + i_head
    o_scale = layer * scale_layer_stride + i_head * scale_head_stride
    o_page = tl.arange(0, BLOCK)

    # [ROWS, HEAD_PAD]
    b_q = tl.load(
        q + o_token[:, None] * q_token_stride + o_query[:, None] * q_head_stride + o_dim[None, :],
        mask=m_rows,
        other=0.0,
    )
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, HEAD_PAD], tl.float32)

    past_len = tl.load(past_lens + i_seq)
    blocks = past_len // CHUNK_TOKENS * BLOCKS_PER_CHUNK + tl.cdiv(past_len % CHUNK_TOKENS, BLOCK)
    # Blocks to read without masks, PAGES at a time: full ones, if all of a full chunk's are.
    if CHUNK_TOKENS % BLOCK == 0:
        full_blocks = past_len // (BLOCK * PAGES) * PAGES
    else:
        full_blocks = 0
    share = tl.cdiv(blocks, PAGES * splits) * PAGES
    first_block = i_split * share
    blocks = tl.minimum(blocks, first_block + share)
    full_blocks = tl.minimum(full_blocks, blocks)
    # Slots are loaded one iteration ahead: a load that depends on one of the same iteration would keep Triton's
    # pipeliner from having more than one block of K and V in flight.
    m_full = first_block < full_blocks
    next_slot = tl.load(p_table + first_block // BLOCKS_PER_CHUNK, mask=m_full, other=0)
    next_slot_2 = next_slot
    if PAGES == 2:
        next_slot_2 = tl.load(p_table + (first_block + 1) // BLOCKS_PER_CHUNK, mask=m_full, other=0)
    for i_block in range(first_block, full_blocks, PAGES):
        slot, slot_2 = next_slot, next_slot_2
        i_next = tl.minimum(i_block + PAGES, full_blocks - PAGES)
        next_slot = tl.load(p_table + i_next // BLOCKS_PER_CHUNK)
        b_k, b_v = read_pool_block(
            p_kv, kv_blocks, slot, i_plane, kv_heads, i_block % BLOCKS_PER_CHUNK * BLOCK,
            kv_slot_stride, kv_part_stride, o_page >= 0, BLOCK, HEAD_DIM, HEAD_PAD, False, DESCRIPTORS,
        )  # fmt: skip
        factor, v_factor = read_factors(k_scale, v_scale, slot, o_scale, scale_slot_stride, scale_log2e, HAS_SCALES)
        if PAGES == 2:
            next_slot_2 = tl.load(p_table + (i_next + 1) // BLOCKS_PER_CHUNK)
            b_k_2, b_v_2 = read_pool_block(
                p_kv, kv_blocks, slot_2, i_plane, kv_heads, (i_block + 1) % BLOCKS_PER_CHUNK * BLOCK,
                kv_slot_stride, kv_part_stride, o_page >= 0, BLOCK, HEAD_DIM, HEAD_PAD, False, DESCRIPTORS,
            )  # fmt: skip
            factor_2, v_factor_2 = read_factors(
                k_scale, v_scale, slot_2, o_scale, scale_slot_stride, scale_log2e, HAS_SCALES
            )
            b_max, b_sum, b_out = attend_two_blocks(
                b_q, b_k, b_v, b_k_2, b_v_2, factor, factor_2, v_factor, v_factor_2, b_max, b_sum, b_out, HAS_SCALES
            )
        else:
            b_max, b_sum, b_out = attend_block(
                b_q, b_k, b_v, factor, v_factor, True, b_max, b_sum, b_out, False, HAS_SCALES
            )
    for i_block in tl.range(tl.maximum(first_block, full_blocks), blocks, num_stages=1):
        i_chunk = i_block // BLOCKS_PER_CHUNK
        offset = i_block % BLOCKS_PER_CHUNK * BLOCK
        m_page = offset + o_page < tl.minimum(CHUNK_TOKENS, past_len - i_chunk * CHUNK_TOKENS)
        slot = tl.load(p_table + i_chunk)
        b_k, b_v = read_pool_block(
            p_kv, kv_blocks, slot, i_plane, kv_heads, offset,
            kv_slot_stride, kv_part_stride, m_page, BLOCK, HEAD_DIM, HEAD_PAD, True, DESCRIPTORS,
        )  # fmt: skip
        factor, v_factor = read_factors(k_scale, v_scale, slot, o_scale, scale_slot_stride, scale_log2e, HAS_SCALES)
        b_max, b_sum, b_out = attend_block(
            b_q, b_k, b_v, factor, v_factor, m_page[None, :], b_max, b_sum, b_out, True, HAS_SCALES
        )

    p_k = k + begin.to(tl.int64) * k_token_stride + i_head * k_head_stride
    p_v = v + begin.to(tl.int64) * v_token_stride + i_head * v_head_stride
    o_key = tl.arange(0, OWN_BLOCK)
    visible = (first_token + 1) // OWN_BLOCK * OWN_BLOCK  # keys in blocks that all rows see
    last = tl.minimum(length, first_token + TILE_TOKENS)
    if i_split < splits - 1:  # the last split reads the sequence's own keys
        visible, last = 0, 0
    for i_key in range(0, visible, OWN_BLOCK):
        b_k = read_block(
            p_k, k_blocks, begin + i_key, i_head, 0, k_token_stride, o_key >= 0,
            OWN_BLOCK, HEAD_DIM, HEAD_PAD, False, False, DESCRIPTORS, True,
        )  # fmt: skip
        b_v = read_block(
            p_v, v_blocks, begin + i_key, i_head, 0, v_token_stride, o_key >= 0,
            OWN_BLOCK, HEAD_DIM, HEAD_PAD, False, False, DESCRIPTORS, False,
        )  # fmt: skip
        b_max, b_sum, b_out = attend_block(b_q, b_k, b_v, scale_log2e, 1.0, True, b_max, b_sum, b_out, False, False)
        p_k += OWN_BLOCK * k_token_stride
        p_v += OWN_BLOCK * v_token_stride
    for i_key in tl.range(visible, last, OWN_BLOCK, num_stages=1):
        m_key = i_key + o_key < length
        b_k = read_block(
            p_k, k_blocks, begin + i_key, i_head, 0, k_token_stride, m_key,
            OWN_BLOCK, HEAD_DIM, HEAD_PAD, False, True, DESCRIPTORS, True,
        )  # fmt: skip
        b_v = read_block(
            p_v, v_blocks, begin + i_key, i_head, 0, v_token_stride, m_key,
            OWN_BLOCK, HEAD_DIM, HEAD_PAD, False, True, DESCRIPTORS, False,
        )  # fmt: skip
        m_tile = i_key + o_key[None, :] <= o_own[:, None]
        b_max, b_sum, b_out = attend_block(b_q, b_k, b_v, scale_log2e, 1.0, m_tile, b_max, b_sum, b_out, True, False)
        p_k += OWN_BLOCK * k_token_stride
        p_v += OWN_BLOCK * v_token_stride

    b_sum = tl.where(b_sum > 0, b_sum, 1.0)  # a split without keys has out 0, lse -inf
    tl.store(p_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_rows)
    tl.store(lse + o_lse, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_splits_kernel(
    part_out,  # [splits, rows, HEAD_DIM] float32
    part_lse,  # [splits, rows]
    out,  # [rows, HEAD_DIM]
    lse,  # [rows]
    rows,
    splits,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dim = tl.arange(0, HEAD_PAD)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for _ in range(splits):
        b_lse = tl.load(part_lse + o_row, mask=m_row, other=-float("inf"))
        b_part = tl.load(part_out + o_row[:, None] * HEAD_DIM + o_dim[None, :], mask=m_tile, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse)
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_keep, b_weight = tl.exp(b_max - b_shift), tl.exp(b_lse - b_shift)
        b_sum = b_sum * b_keep + b_weight
        b_out = b_out * b_keep[:, None] + b_part * b_weight[:, None]
        b_max = b_new_max
        o_row += rows
    o_row -= splits.to(tl.int64) * rows
    b_sum = tl.where(b_sum > 0, b_sum, 1.0)
    p_out = out + o_row[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_tile)
    tl.store(lse + o_row, b_max + tl.log(b_sum), mask=m_row)


def ragged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    starts: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    config: PrefillConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.ragged_prefill`; ``scale`` is positive.

    ``config``, ``splits``: launch settings, and how many programs share the past of a tile, instead of the tuned ones.
    """
    checks.ragged(q, k, v, kv, layer, block_table, past_lens, starts, k_scale, v_scale)
    assert scale > 0, f"the scale of logits is {scale}, not positive"
    tokens, heads, head_dim = q.shape
    _, layers, _, kv_heads, chunk_tokens, _ = kv.shape
    sequences, group = block_table.shape[0], heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    config = config or tuning.prefill_config(q.dtype, head_dim, tuning.gpu_family(q.device))
    head_pad = max(16, triton.next_power_of_2(head_dim))
    block = max(16, min(config.block_tokens, triton.next_power_of_2(chunk_tokens)))
    head_tile = min(group, config.rows)
    planes = layers * 2 * kv_heads
    descriptors = config.descriptors and all(_has_descriptor(x) for x in (k, v, kv))
    # the planes of a slot become one axis: a descriptor has at most five
    descriptors = descriptors and kv.stride()[1:4] == tuple(n * kv.stride(3) for n in (2 * kv_heads, kv_heads, 1))
    blocks: tuple[TensorDescriptor | None, ...] = (None, None, None)
    if descriptors:
        shape, strides = [len(kv), planes, chunk_tokens, head_dim], [kv.stride(0), *kv.stride()[3:]]
        blocks = (
            *(TensorDescriptor(x, [*x.shape], [*x.stride()], [config.block_tokens, 1, head_pad]) for x in (k, v)),
            TensorDescriptor(kv, shape, strides, [1, 1, block, head_pad]),
        )
    constants: dict[str, Any] = {
        "GROUP": group,
        "HEAD_TILE": head_tile,
        "ROWS": config.rows,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": head_pad,
        "CHUNK_TOKENS": chunk_tokens,
        "BLOCK": block,
        "OWN_BLOCK": config.block_tokens,
        "PAGES": 2 if 2 * block <= config.block_tokens else 1,
        "LAYER_IS_POINTER": not isinstance(layer, int),
        "HAS_SCALES": k_scale is not None,
        "DESCRIPTORS": descriptors,
    }
    tile_tokens, columns = config.rows // head_tile, kv_heads * triton.cdiv(group, head_tile)
    tiles = tokens // tile_tokens + sequences + 2
    if splits is None:
        places = tuning.multiprocessors(q.device) * max(1, 8 // config.num_warps)
        past_tokens = block_table.shape[1] * chunk_tokens
        splits = tuning.prefill_splits(triton.cdiv(tokens, tile_tokens) * columns, past_tokens, places)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty((splits, tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q.device)
    _prefill_kernel[(tiles * columns * splits,)](
        q,
        k,
        v,
        kv,
        *blocks,
        layer,
        block_table,
        past_lens,
        starts,
        k_scale,
        v_scale,
        part_out,
        part_lse,
        scale / math.log(2),
        tokens,
        sequences,
        kv_heads,
        splits,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *kv.stride()[:4],
        *(k_scale.stride() if k_scale is not None else (0, 0, 0)),
        block_table.stride(0),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    if splits > 1:
        rows, rows_per_program = tokens * heads, max(1, 4096 // head_pad)
        _merge_splits_kernel[(triton.cdiv(rows, rows_per_program),)](
            part_out, part_lse, out, lse, rows, splits, HEAD_DIM=head_dim, HEAD_PAD=head_pad, ROWS=rows_per_program
        )
    return out, lse


def _has_descriptor(x: Tensor) -> bool:
    """Whether the hardware's tensor descriptors support where ``x`` lies: rows begin at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.dtype.itemsize % 16 == 0 for stride in x.stride()[:-1])
