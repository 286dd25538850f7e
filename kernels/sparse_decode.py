"""Decode attention over a block table in Triton: flash decoding, split over the keys.

Stage 1: one program per (sequence, KV head, split) reads its share of the sequence's blocks once, for all query
heads of the group. Stage 2: one program per (sequence, query head, slice of the head) merges the splits by
log-sum-exp. The grids depend on shapes only, and lengths, slots and the layer are read on the GPU: the launch
can be captured in a CUDA graph. What changes while serving (batch, splits, width of the block table) is never
a compile-time constant. The same in PyTorch: `reference.sparse_decode`.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels import tuning
from forecache.kernels.tuning import DecodeConfig

LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _count_blocks(context_len, CHUNK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr):
    """Blocks of the full chunks, and those of the last chunk that are not empty."""
    rest = context_len % CHUNK_TOKENS
    return context_len // CHUNK_TOKENS * BLOCKS_PER_CHUNK + tl.cdiv(rest, BLOCK)


@triton.jit(do_not_specialize=["layer", "max_splits", "table_stride", "block_lse_stride"])
def _split_kernel(
    q,  # [batch, heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM]
    layer,  # int, or a pointer to one
    block_table,  # [batch, max_chunks]
    context_lens,  # [batch]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    part_out,  # [batch, heads, max_splits, HEAD_DIM] float32
    part_lse,  # [batch, heads, max_splits] float32, base 2
    block_lse,  # [batch, heads, max_chunks * BLOCKS_PER_CHUNK] float32, base 2
    scale_log2e,
    q_batch_stride,
    q_head_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    max_splits,
    table_stride,
    block_lse_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    i_split, i_head, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    context_len = tl.load(context_lens + i_seq)
    blocks = _count_blocks(context_len, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK)
    splits = tl.minimum(blocks, max_splits)
    if i_split >= splits:
        return
    first_block = (i_split * blocks) // splits
    last_block = ((i_split + 1) * blocks) // splits
    if LAYER_IS_POINTER:
        layer = tl.load(layer)

    o_group = tl.arange(0, GROUP_PAD)
    o_dim = tl.arange(0, HEAD_PAD)
    o_token = tl.arange(0, BLOCK)
    m_group = o_group < GROUP
    m_dim = o_dim < HEAD_DIM
    o_query = i_head * GROUP + o_group

    # [GROUP_PAD, HEAD_PAD]
    p_q = q + i_seq.to(tl.int64) * q_batch_stride + o_query[:, None] * q_head_stride + o_dim[None, :]
    b_q = tl.load(p_q, mask=m_group[:, None] & m_dim[None, :], other=0.0)
    # The pool may be larger than 2^31 elements.
    p_kv = kv + layer.to(tl.int64) * kv_layer_stride + i_head * kv_head_stride
    p_table = block_table + i_seq.to(tl.int64) * table_stride
    o_scale = layer.to(tl.int64) * scale_layer_stride + i_head
    p_block_lse = block_lse + (i_seq * heads + o_query).to(tl.int64) * block_lse_stride

    b_max = tl.full([GROUP_PAD], -float("inf"), tl.float32)
    b_sum = tl.zeros([GROUP_PAD], tl.float32)
    b_out = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    # Carried around the loop, the slot is not a load that K and V wait for: with the load in the same round
    # Triton's pipeliner spends its stages on this chain and keeps only one block of K and V in flight.
    next_slot = tl.load(p_table + first_block // BLOCKS_PER_CHUNK)
    for i_block in range(first_block, last_block):
        slot = next_slot.to(tl.int64)
        i_next = tl.minimum(i_block + 1, last_block - 1)
        next_slot = tl.load(p_table + i_next // BLOCKS_PER_CHUNK)
        i_chunk = i_block // BLOCKS_PER_CHUNK
        o_offset = (i_block % BLOCKS_PER_CHUNK) * BLOCK + o_token
        m_token = o_offset < tl.minimum(CHUNK_TOKENS, context_len - i_chunk * CHUNK_TOKENS)
        p_slot = p_kv + slot * kv_slot_stride
        # Both transposed and plain tiles are read along HEAD_DIM, which is contiguous.
        p_k = p_slot + o_dim[:, None] + o_offset[None, :] * HEAD_DIM
        p_v = p_slot + kv_part_stride + o_offset[:, None] * HEAD_DIM + o_dim[None, :]
        # [HEAD_PAD, BLOCK]
        b_k = tl.load(p_k, mask=m_dim[:, None] & m_token[None, :], other=0.0)
        # [BLOCK, HEAD_PAD]
        b_v = tl.load(p_v, mask=m_token[:, None] & m_dim[None, :], other=0.0)

        # [GROUP_PAD, BLOCK], in base 2
        b_logits = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee") * scale_log2e
        if HAS_SCALES:
            b_logits *= tl.load(k_scale + slot * scale_slot_stride + o_scale)
        b_logits = tl.where(m_token[None, :], b_logits, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_p = tl.exp2(b_logits - b_new_max[:, None])
        b_block_sum = tl.sum(b_p, 1)
        b_keep = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_keep + b_block_sum
        if HAS_SCALES:
            b_p *= tl.load(v_scale + slot * scale_slot_stride + o_scale)
        b_out = b_out * b_keep[:, None]
        b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out, input_precision="ieee")
        b_max = b_new_max
        if HAS_MASS:
            tl.store(p_block_lse + i_block, b_new_max + tl.log2(b_block_sum), mask=m_group)

    o_part = ((i_seq * heads + o_query).to(tl.int64)) * max_splits + i_split
    tl.store(part_lse + o_part, b_max + tl.log2(b_sum), mask=m_group)
    p_out = part_out + o_part[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out, b_out / b_sum[:, None], mask=m_group[:, None] & m_dim[None, :])


@triton.jit(do_not_specialize=["max_splits", "max_chunks"])
def _merge_kernel(
    part_out,  # [batch, heads, max_splits, HEAD_DIM] float32
    part_lse,  # [batch, heads, max_splits] float32, base 2
    block_lse,  # [batch, heads, max_chunks * BLOCKS_PER_CHUNK] float32, base 2
    context_lens,  # [batch]
    out,  # [batch, heads, HEAD_DIM]
    lse,  # [batch, heads] float32
    chunk_mass,  # [batch, heads, max_chunks] float32
    max_splits,
    max_chunks,
    HEAD_DIM: tl.constexpr,
    DIM_SLICE: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    i_slice, i_head, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_seq.to(tl.int64) * tl.num_programs(1) + i_head
    context_len = tl.load(context_lens + i_seq)
    blocks = _count_blocks(context_len, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK)
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
        # No keys at all: out 0, lse -inf, mass 0.
        tl.store(lse + i_row, tl.where(splits > 0, b_norm * LN_2, -float("inf")))
        if HAS_MASS:
            for first in range(0, max_chunks, CHUNK_BLOCK):
                o_chunk = first + tl.arange(0, CHUNK_BLOCK)
                b_mass = tl.zeros([CHUNK_BLOCK], tl.float32)
                for part in tl.static_range(BLOCKS_PER_CHUNK):
                    i_block = o_chunk * BLOCKS_PER_CHUNK + part
                    p_block = block_lse + i_row * max_chunks * BLOCKS_PER_CHUNK + i_block
                    b_block = tl.load(p_block, mask=i_block < blocks, other=-float("inf"))
                    b_mass += tl.exp2(b_block - b_norm)
                tl.store(chunk_mass + i_row * max_chunks + o_chunk, b_mass, mask=o_chunk < max_chunks)


def sparse_decode(
    q: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    chunk_mass: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_decode`. ``config`` replaces the tuned launch settings, for sweeps and tests."""
    batch, heads, head_dim = q.shape
    _, layers, parts, kv_heads, chunk_tokens, kv_dim = kv.shape
    max_chunks = block_table.shape[1]
    assert kv_dim == head_dim and parts == 2, f"q {tuple(q.shape)} does not fit kv {tuple(kv.shape)}"
    assert heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups"
    assert q.stride(2) == 1 and kv.stride(5) == 1 and kv.stride(4) == head_dim, "heads must be contiguous"
    assert block_table.shape[0] == context_lens.shape[0] == batch and block_table.stride(1) == 1
    assert context_lens.is_contiguous()
    assert not isinstance(layer, int) or 0 <= layer < layers, f"layer {layer} of {layers}"
    assert (k_scale is None) == (v_scale is None), "keys and values are both scaled or neither is"
    if k_scale is not None and v_scale is not None:
        assert k_scale.shape == v_scale.shape == (kv.shape[0], layers, kv_heads)
        assert k_scale.stride() == v_scale.stride() and k_scale.stride(2) == 1
        assert k_scale.dtype == v_scale.dtype == torch.float32
    if chunk_mass is not None:
        assert chunk_mass.shape == (batch, heads, max_chunks) and chunk_mass.is_contiguous()
        assert chunk_mass.dtype == torch.float32

    group = heads // kv_heads
    config = config or tuning.decode_config(kv.dtype, head_dim, group, tuning.gpu_family(q.device))
    block = max(16, min(config.block_tokens, triton.next_power_of_2(chunk_tokens)))
    blocks_per_chunk = triton.cdiv(chunk_tokens, block)
    max_blocks = max_chunks * blocks_per_chunk
    places = config.programs_per_sm * tuning.multiprocessors(q.device)
    splits = tuning.decode_splits(batch * kv_heads, max_blocks, places)

    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    part_out = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    block_lse = part_lse  # not touched unless the mass is wanted
    if chunk_mass is not None:
        block_lse = torch.empty((batch, heads, max_blocks), dtype=torch.float32, device=q.device)
    shared = {
        "HEAD_DIM": head_dim,
        "CHUNK_TOKENS": chunk_tokens,
        "BLOCK": block,
        "BLOCKS_PER_CHUNK": blocks_per_chunk,
        "HAS_MASS": chunk_mass is not None,
    }
    _split_kernel[(splits, kv_heads, batch)](
        q,
        kv,
        layer,
        block_table,
        context_lens,
        k_scale,
        v_scale,
        part_out,
        part_lse,
        block_lse,
        scale / LN_2.value,
        *q.stride()[:2],
        *kv.stride()[:4],
        *(k_scale.stride()[:2] if k_scale is not None else (0, 0)),
        splits,
        block_table.stride(0),
        max_blocks,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_PAD=triton.next_power_of_2(head_dim),
        LAYER_IS_POINTER=not isinstance(layer, int),
        HAS_SCALES=k_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    dim_slice = min(32, triton.next_power_of_2(head_dim))
    _merge_kernel[(triton.cdiv(head_dim, dim_slice), heads, batch)](
        part_out,
        part_lse,
        block_lse,
        context_lens,
        out,
        lse,
        chunk_mass,
        splits,
        max_chunks,
        DIM_SLICE=dim_slice,
        SPLIT_BLOCK=64,
        CHUNK_BLOCK=128,
        num_warps=4,
        **shared,
    )
    return out, lse
