"""The loop over the blocks of one row, for both decode kernels, in Triton. A row is one sequence and one KV head."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806

import math

import triton
import triton.language as tl

from forecache.kernels.common.powers import power_of_two

LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def count_blocks(context_len, CHUNK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr):
    """Number of blocks that contain tokens: those of the full chunks, and the first ones of the last chunk."""
    rest = context_len % CHUNK_TOKENS
    return context_len // CHUNK_TOKENS * BLOCKS_PER_CHUNK + tl.cdiv(rest, BLOCK)


@triton.jit
def unpack_pairs(b_pairs, NATIVE: tl.constexpr):
    """The low and the high e4m3 byte of each uint16, as two float16 tensors. The conversion is exact."""
    if NATIVE:  # four instructions for four values; Triton compiles the other branch to eight
        b_low, b_high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            .reg .b16 low_pair, high_pair;
            prmt.b32 low, $2, 0, 0x4420;
            prmt.b32 high, $2, 0, 0x4431;
            cvt.u16.u32 low_pair, low;
            cvt.u16.u32 high_pair, high;
            cvt.rn.f16x2.e4m3x2 $0, low_pair;
            cvt.rn.f16x2.e4m3x2 $1, high_pair;
            }""",
            "=r,=r,r",
            [b_pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        b_low = b_pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        b_high = (b_pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return b_low, b_high


@triton.jit
def attend_blocks(
    q,  # [batch, heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM], or uint16 [..., HEAD_DIM / 2] with PAIRS
    layer,  # int64
    block_table,  # [batch, max_chunks]
    k_scale,  # [slots, layers, kv_heads]
    v_scale,  # [slots, layers, kv_heads]
    scale_log2e,
    i_seq,
    i_head,
    context_len,
    first_block,
    last_block,
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
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Attention of a row's queries over its blocks ``first_block`` to ``last_block`` (exclusive), by online softmax.

    Returns the maximum logit (base 2), ``[GROUP_PAD]``, the sum of the exponentials relative to it, ``[GROUP_PAD]``,
    and the output times that sum, ``[GROUP_PAD, HEAD_PAD]``, all float32.

    With PAIRS, fp8 keys and values are read as 16-bit pairs of neighbouring dims, and the even and odd dims are
    multiplied separately, in float16. Shared memory can transpose 16-bit units for the tensor cores but not bytes, and
    one instruction converts two fp8 values to float16, where bfloat16 takes a slow instruction for each. float16
    represents e4m3 exactly, and the queries after division by a power of two.
    """
    UNITS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    UNITS_PAD: tl.constexpr = HEAD_PAD // 2 if PAIRS else HEAD_PAD
    o_group = tl.arange(0, GROUP_PAD)
    o_unit = tl.arange(0, UNITS_PAD)
    o_token = tl.arange(0, BLOCK)
    m_group = o_group < GROUP
    m_unit = o_unit < UNITS
    o_query = i_head * GROUP + o_group

    p_q = q + i_seq.to(tl.int64) * q_batch_stride + o_query[:, None] * q_head_stride
    m_q = m_group[:, None] & m_unit[None, :]
    if PAIRS:
        b_even = tl.load(p_q + 2 * o_unit[None, :], mask=m_q, other=0.0).to(tl.float32)
        b_odd = tl.load(p_q + 2 * o_unit[None, :] + 1, mask=m_q, other=0.0).to(tl.float32)
        b_largest = tl.max(tl.maximum(tl.abs(b_even), tl.abs(b_odd)), 1)
        b_unit = power_of_two(b_largest)
        b_q = (b_even / b_unit[:, None]).to(tl.float16)
        b_q_odd = (b_odd / b_unit[:, None]).to(tl.float16)
        b_factor = b_unit * scale_log2e
        b_out_odd = tl.zeros([GROUP_PAD, UNITS_PAD], tl.float32)
    else:
        # [GROUP_PAD, HEAD_PAD]
        b_q = tl.load(p_q + o_unit[None, :], mask=m_q, other=0.0)
        b_factor = tl.full([GROUP_PAD], 1.0, tl.float32) * scale_log2e
    # The pool may be larger than 2^31 elements.
    p_kv = kv + layer * kv_layer_stride + i_head * kv_head_stride
    p_table = block_table + i_seq.to(tl.int64) * table_stride
    o_scale = layer * scale_layer_stride + i_head * scale_head_stride

    b_max = tl.full([GROUP_PAD], -float("inf"), tl.float32)
    b_sum = tl.zeros([GROUP_PAD], tl.float32)
    b_out = tl.zeros([GROUP_PAD, UNITS_PAD], tl.float32)
    # The slot of the next block is loaded one iteration ahead, so that the loads of K and V do not depend on a load
    # of the same iteration: else Triton's pipeliner keeps only one block of K and V in flight.
    # evict_last keeps the table in the L2 cache while K and V stream through it.
    next_slot = tl.load(p_table + first_block // BLOCKS_PER_CHUNK, eviction_policy="evict_last")
    for i_block in range(first_block, last_block):
        slot = next_slot.to(tl.int64)
        i_next = tl.minimum(i_block + 1, last_block - 1)
        next_slot = tl.load(p_table + i_next // BLOCKS_PER_CHUNK, eviction_policy="evict_last")
        i_chunk = i_block // BLOCKS_PER_CHUNK
        o_offset = (i_block % BLOCKS_PER_CHUNK) * BLOCK + o_token
        m_token = o_offset < tl.minimum(CHUNK_TOKENS, context_len - i_chunk * CHUNK_TOKENS)
        p_slot = p_kv + slot * kv_slot_stride
        # Both transposed and plain tiles are read along HEAD_DIM, which is contiguous.
        p_k = p_slot + o_unit[:, None] + o_offset[None, :] * UNITS
        p_v = p_slot + kv_part_stride + o_offset[:, None] * UNITS + o_unit[None, :]
        # [UNITS_PAD, BLOCK]
        b_k = tl.load(p_k, mask=m_unit[:, None] & m_token[None, :], other=0.0)
        # [BLOCK, UNITS_PAD]
        b_v = tl.load(p_v, mask=m_token[:, None] & m_unit[None, :], other=0.0)

        # [GROUP_PAD, BLOCK], in base 2
        if PAIRS:
            b_k_even, b_k_odd = unpack_pairs(b_k, NATIVE)
            b_logits = tl.dot(b_q_odd, b_k_odd, tl.dot(b_q, b_k_even))
        else:
            b_logits = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
        if HAS_SCALES:
            b_logits *= (b_factor * tl.load(k_scale + slot * scale_slot_stride + o_scale))[:, None]
        else:
            b_logits *= b_factor[:, None]
        b_logits = tl.where(m_token[None, :], b_logits, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_p = tl.exp2(b_logits - b_new_max[:, None])
        b_block_sum = tl.sum(b_p, 1)
        b_keep = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_keep + b_block_sum
        b_out = b_out * b_keep[:, None]
        v_factor = 1.0
        if HAS_SCALES:
            v_factor = tl.load(v_scale + slot * scale_slot_stride + o_scale)
        if PAIRS:
            b_v_even, b_v_odd = unpack_pairs(b_v, NATIVE)
            b_p = b_p.to(tl.float16)
            # scaled in float32, because probabilities times a small scale may underflow in float16
            b_out += tl.dot(b_p, b_v_even) * v_factor
            b_out_odd = b_out_odd * b_keep[:, None] + tl.dot(b_p, b_v_odd) * v_factor
        else:
            b_p *= v_factor
            b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out, input_precision="ieee")
        b_max = b_new_max
    if PAIRS:
        b_out = tl.reshape(tl.join(b_out, b_out_odd), [GROUP_PAD, HEAD_PAD])
    return b_max, b_sum, b_out
