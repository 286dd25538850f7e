"""Writes new keys and values into the hot pool, in Triton. In PyTorch: `reference.store_kv`."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.chunks import reference
from forecache.kernels.common import checks

FP8_MAX: tl.constexpr = tl.constexpr(reference.FP8_MAX)
SCALE_MIN: tl.constexpr = tl.constexpr(reference.SCALE_MIN)
_BLOCK_ELEMENTS = 2048


@triton.jit
def is_wrong(b_x):
    """True where a value is infinite or NaN."""
    return ~(tl.abs(b_x.to(tl.float32)) < float("inf"))


@triton.jit(do_not_specialize=["layer"])
def _store_kernel(
    k,  # [tokens, kv_heads, HEAD_DIM]
    v,  # [tokens, kv_heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, chunk_tokens, HEAD_DIM]
    layer,  # int, or a pointer to one
    slots,  # [tokens]
    offsets,  # [tokens]
    non_finite,  # [tokens] uint8
    kv_heads,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    FLAGS: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i_token).to(tl.int64)
    if slot < 0:
        return
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    o_head = tl.arange(0, HEADS_PAD)[:, None]
    o_dim = tl.arange(0, HEAD_PAD)[None, :]
    m_tile = (o_head < kv_heads) & (o_dim < HEAD_DIM)

    # [HEADS_PAD, HEAD_PAD]
    b_k = tl.load(k + i_token * k_token_stride + o_head * k_head_stride + o_dim, mask=m_tile)
    b_v = tl.load(v + i_token * v_token_stride + o_head * v_head_stride + o_dim, mask=m_tile)
    if FLAGS:
        wrong = tl.max(tl.max((m_tile & (is_wrong(b_k) | is_wrong(b_v))).to(tl.int32), 1), 0)
        tl.store(non_finite + i_token, wrong.to(tl.uint8), mask=wrong > 0)
    offset = tl.load(offsets + i_token)
    p_kv = kv + slot * kv_slot_stride + layer.to(tl.int64) * kv_layer_stride + offset * HEAD_DIM
    p_tile = p_kv + o_head * kv_head_stride + o_dim
    tl.store(p_tile, b_k.to(kv.dtype.element_ty), mask=m_tile)
    tl.store(p_tile + kv_part_stride, b_v.to(kv.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["layer", "tokens"])
def _store_scaled_kernel(
    k,  # [tokens, kv_heads, HEAD_DIM]
    v,  # [tokens, kv_heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, CHUNK_TOKENS, HEAD_DIM] fp8
    scale,  # [slots, layers, 2, kv_heads] float32
    layer,  # int, or a pointer to one
    slots,  # [tokens]
    offsets,  # [tokens]
    non_finite,  # [tokens] uint8
    tokens,
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
    scale_part_stride,
    scale_head_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    CHUNK_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    FLAGS: tl.constexpr,
):
    i_token, i_head, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + i_token)
    before = tl.load(slots + i_token - 1, mask=i_token > 0, other=-1)
    if (slot < 0) | (slot == before):
        return  # the program of a chunk's first token stores all tokens of the chunk
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    layer = layer.to(tl.int64)
    offset = tl.load(offsets + i_token).to(tl.int32)
    o_next = tl.arange(0, CHUNK_PAD)
    m_next = (i_token + o_next < tokens) & (offset + o_next < CHUNK_TOKENS)
    same = m_next & (tl.load(slots + i_token + o_next, mask=m_next, other=-1) == slot)
    count = tl.sum(same.to(tl.int32), 0)
    if i_part == 0:
        p_new, new_stride = k + i_token * k_token_stride + i_head * k_head_stride, k_token_stride
    else:
        p_new, new_stride = v + i_token * v_token_stride + i_head * v_head_stride, v_token_stride
    p_kv = kv + slot * kv_slot_stride + layer * kv_layer_stride + i_part * kv_part_stride + i_head * kv_head_stride
    p_scale = scale + slot * scale_slot_stride + layer * scale_layer_stride
    p_scale += i_part * scale_part_stride + i_head * scale_head_stride
    o_token = tl.arange(0, BLOCK)[:, None]
    o_dim = tl.arange(0, HEAD_PAD)[None, :]

    amax, wrong = 0.0, tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        m_tile = (start + o_token < count) & (o_dim < HEAD_DIM)
        b_new = tl.load(p_new + (start + o_token) * new_stride + o_dim, mask=m_tile, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.max(tl.abs(b_new), 1), 0))
        if FLAGS:
            wrong = tl.maximum(wrong, tl.max(tl.max(is_wrong(b_new).to(tl.int32), 1), 0))
    if FLAGS:
        tl.store(non_finite + i_token, wrong.to(tl.uint8), mask=wrong > 0)
    old = tl.load(p_scale, mask=offset > 0, other=0.0)
    new = tl.maximum(tl.maximum(old, SCALE_MIN), tl.div_rn(amax, FP8_MAX))
    inverse = tl.div_rn(1.0, new)
    tl.store(p_scale, new)
    for start in range(0, count, BLOCK):
        m_tile = (start + o_token < count) & (o_dim < HEAD_DIM)
        b_new = tl.load(p_new + (start + o_token) * new_stride + o_dim, mask=m_tile, other=0.0).to(tl.float32)
        p_tile = p_kv + (offset + start + o_token) * HEAD_DIM + o_dim
        tl.store(p_tile, (b_new * inverse).to(kv.dtype.element_ty), mask=m_tile)
    if new > old:
        for start in range(0, offset, BLOCK):
            m_tile = (start + o_token < offset) & (o_dim < HEAD_DIM)
            p_tile = p_kv + (start + o_token) * HEAD_DIM + o_dim
            b_old = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32) * (old * inverse)
            tl.store(p_tile, b_old.to(kv.dtype.element_ty), mask=m_tile)


def store_kv(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    slots: Tensor,
    offsets: Tensor,
    *,
    scale: Tensor | None = None,
    non_finite: Tensor | None = None,
) -> None:
    """See `reference.store_kv`."""
    checks.store(k, v, kv, slots, offsets, scale, non_finite)
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    head_pad = triton.next_power_of_2(head_dim)
    if scale is not None:
        _store_scaled_kernel[(tokens, kv_heads, 2)](
            k,
            v,
            kv,
            scale,
            layer,
            slots,
            offsets,
            non_finite,
            tokens,
            *k.stride()[:2],
            *v.stride()[:2],
            *kv.stride()[:4],
            *scale.stride(),
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad,
            CHUNK_TOKENS=kv.shape[4],
            CHUNK_PAD=triton.next_power_of_2(kv.shape[4]),
            BLOCK=max(1, _BLOCK_ELEMENTS // head_pad),
            LAYER_IS_POINTER=not isinstance(layer, int),
            FLAGS=non_finite is not None,
        )
        return
    _store_kernel[(tokens,)](
        k,
        v,
        kv,
        layer,
        slots,
        offsets,
        non_finite,
        kv_heads,
        *k.stride()[:2],
        *v.stride()[:2],
        *kv.stride()[:4],
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        LAYER_IS_POINTER=not isinstance(layer, int),
        FLAGS=non_finite is not None,
    )
