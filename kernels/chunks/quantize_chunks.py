"""Quantises chunks to fp8 and back, in Triton, with one scale per (chunk, layer, keys or values, head).

In PyTorch: `reference.quantize_chunks` and `reference.dequantize_chunks`.
"""

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
_BLOCK = 8192


@triton.jit
def _quantize_kernel(
    kv,  # [slots, layers, 2, kv_heads, CHUNK], CHUNK = chunk_tokens * head_dim
    slots,  # [n]
    out_kv,  # [slots, layers, 2, kv_heads, CHUNK] fp8
    out_scale,  # [slots, layers, 2, kv_heads] float32
    out_slots,  # [n]
    kv_heads,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    out_slot_stride,
    out_layer_stride,
    out_part_stride,
    out_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_part_stride,
    scale_head_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_slot, i_layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_part, i_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    slot, out_slot = tl.load(slots + i_slot), tl.load(out_slots + i_slot)
    p_in = kv + slot * kv_slot_stride + i_layer * kv_layer_stride + i_part * kv_part_stride + i_head * kv_head_stride
    p_out = out_kv + out_slot * out_slot_stride + i_layer * out_layer_stride
    p_out += i_part * out_part_stride + i_head * out_head_stride
    o_element = tl.arange(0, BLOCK)

    b_in = tl.load(p_in + o_element, mask=o_element < CHUNK, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(b_in), 0)
    for start in tl.static_range(BLOCK, CHUNK, BLOCK):
        b_more = tl.load(p_in + start + o_element, mask=start + o_element < CHUNK, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(b_more), 0))
    scale = tl.where(amax > 0, tl.maximum(tl.div_rn(amax, FP8_MAX), SCALE_MIN), 1.0)
    p_scale = out_scale + out_slot * scale_slot_stride + i_layer * scale_layer_stride
    tl.store(p_scale + i_part * scale_part_stride + i_head * scale_head_stride, scale)
    inverse = tl.div_rn(1.0, scale)
    tl.store(p_out + o_element, (b_in * inverse).to(out_kv.dtype.element_ty), mask=o_element < CHUNK)
    for start in tl.static_range(BLOCK, CHUNK, BLOCK):  # larger chunks are read a second time, from the cache
        m_element = start + o_element < CHUNK
        b_more = tl.load(p_in + start + o_element, mask=m_element, other=0.0).to(tl.float32)
        tl.store(p_out + start + o_element, (b_more * inverse).to(out_kv.dtype.element_ty), mask=m_element)


@triton.jit
def _dequantize_kernel(
    kv,  # [slots, layers, 2, kv_heads, CHUNK] fp8, CHUNK = chunk_tokens * head_dim
    scale,  # [slots, layers, 2, kv_heads] float32
    slots,  # [n]
    out_kv,  # [slots, layers, 2, kv_heads, CHUNK]
    out_slots,  # [n]
    kv_heads,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    out_slot_stride,
    out_layer_stride,
    out_part_stride,
    out_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_part_stride,
    scale_head_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_slot, i_layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_part, i_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    slot, out_slot = tl.load(slots + i_slot), tl.load(out_slots + i_slot)
    p_in = kv + slot * kv_slot_stride + i_layer * kv_layer_stride + i_part * kv_part_stride + i_head * kv_head_stride
    p_out = out_kv + out_slot * out_slot_stride + i_layer * out_layer_stride
    p_out += i_part * out_part_stride + i_head * out_head_stride
    p_scale = scale + slot * scale_slot_stride + i_layer * scale_layer_stride
    factor = tl.load(p_scale + i_part * scale_part_stride + i_head * scale_head_stride)
    for start in tl.static_range(0, CHUNK, BLOCK):
        o_element = start + tl.arange(0, BLOCK)
        b_in = tl.load(p_in + o_element, mask=o_element < CHUNK, other=0.0).to(tl.float32)
        tl.store(p_out + o_element, (b_in * factor).to(out_kv.dtype.element_ty), mask=o_element < CHUNK)


def quantize_chunks(kv: Tensor, slots: Tensor, out_kv: Tensor, out_scale: Tensor, out_slots: Tensor) -> None:
    """See `reference.quantize_chunks`."""
    checks.chunks(kv, slots, out_kv, out_slots, fp8=out_kv, scale=out_scale)
    _launch(_quantize_kernel, (kv, slots, out_kv, out_scale, out_slots), kv, out_kv, out_scale)


def dequantize_chunks(kv: Tensor, scale: Tensor, slots: Tensor, out_kv: Tensor, out_slots: Tensor) -> None:
    """See `reference.dequantize_chunks`."""
    checks.chunks(kv, slots, out_kv, out_slots, fp8=kv, scale=scale)
    _launch(_dequantize_kernel, (kv, scale, slots, out_kv, out_slots), kv, out_kv, scale)


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], kv: Tensor, out_kv: Tensor, scale: Tensor) -> None:
    """One program per head's chunk."""
    n = tensors[-1].shape[0]
    _, layers, _, kv_heads, chunk_tokens, head_dim = kv.shape
    if n == 0:
        return
    chunk = chunk_tokens * head_dim
    kernel[(n, 2 * kv_heads, layers)](
        *tensors,
        kv_heads,
        *kv.stride()[:4],
        *out_kv.stride()[:4],
        *scale.stride(),
        CHUNK=chunk,
        BLOCK=min(triton.next_power_of_2(chunk), _BLOCK),
    )
