"""Writing new keys and values into the hot pool in Triton. The same in PyTorch: `reference.store_kv`."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["layer"])
def _store_kernel(
    k,  # [tokens, kv_heads, HEAD_DIM]
    v,  # [tokens, kv_heads, HEAD_DIM]
    kv,  # [slots, layers, 2, kv_heads, chunk_tokens, HEAD_DIM]
    layer,  # int, or a pointer to one
    slots,  # [tokens]
    offsets,  # [tokens]
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
    offset = tl.load(offsets + i_token)
    p_kv = kv + slot * kv_slot_stride + layer.to(tl.int64) * kv_layer_stride + offset * HEAD_DIM
    p_tile = p_kv + o_head * kv_head_stride + o_dim
    tl.store(p_tile, b_k.to(kv.dtype.element_ty), mask=m_tile)
    tl.store(p_tile + kv_part_stride, b_v.to(kv.dtype.element_ty), mask=m_tile)


def store_kv(k: Tensor, v: Tensor, kv: Tensor, layer: int | Tensor, slots: Tensor, offsets: Tensor) -> None:
    """See `reference.store_kv`."""
    tokens, kv_heads, head_dim = k.shape
    assert v.shape == k.shape, f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ"
    assert kv.shape[3] == kv_heads and kv.shape[5] == head_dim, f"kv {tuple(kv.shape)}, k {tuple(k.shape)}"
    assert k.stride(2) == v.stride(2) == kv.stride(5) == 1 and kv.stride(4) == head_dim
    assert slots.shape == offsets.shape == (tokens,) and slots.is_contiguous() and offsets.is_contiguous()
    assert slots.dtype == offsets.dtype == torch.int64
    if tokens == 0:
        return
    _store_kernel[(tokens,)](
        k,
        v,
        kv,
        layer,
        slots,
        offsets,
        kv_heads,
        *k.stride()[:2],
        *v.stride()[:2],
        *kv.stride()[:4],
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        LAYER_IS_POINTER=not isinstance(layer, int),
    )
