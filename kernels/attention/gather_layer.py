"""Copies one layer of many chunks to contiguous keys and values, in Triton. In PyTorch: `reference.gather_layer`.

The pool may be GPU memory, or pinned or registered host memory, which the GPU reads over PCIe. The same pass can
dequantise fp8 chunks and add up checksums of the bytes that it reads.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.chunks.slot_checksums import word_keys, words_of
from forecache.kernels.common import checks, tuning

_BLOCK_BYTES = 16384


@triton.jit(do_not_specialize=["layer", "n", "scale_word"])
def _gather_kernel(
    kv,  # [slots, layers, 2, kv_heads, CHUNK], CHUNK = chunk_tokens * head_dim
    layer,  # int, or a pointer to one
    slots,  # [n]
    scale,  # [slots, layers, 2, kv_heads] float32
    sums,  # [n] int64
    out,  # [2, kv_heads, n, CHUNK]
    n,
    kv_heads,
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    scale_slot_stride,
    scale_layer_stride,
    scale_part_stride,
    scale_head_stride,
    scale_word,  # offset of the scales in a row, in words
    out_part_stride,
    out_head_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    layer = layer.to(tl.int64)
    per_word: tl.constexpr = 32 // kv.dtype.element_ty.primitive_bitwidth
    for i_row in range(tl.program_id(0), n * kv_heads * 2, tl.num_programs(0)):
        i_slot, i_head, i_part = i_row % n, i_row // n % kv_heads, i_row // n // kv_heads
        slot = tl.load(slots + i_slot).to(tl.int64)
        o_in = layer * kv_layer_stride + i_part * kv_part_stride + i_head * kv_head_stride
        p_in = kv + slot * kv_slot_stride + o_in
        p_out = out + i_part.to(tl.int64) * out_part_stride + i_head.to(tl.int64) * out_head_stride
        p_out += i_slot.to(tl.int64) * CHUNK
        factor = tl.full([], 1.0, tl.float32)
        o_scale = layer * scale_layer_stride + i_part * scale_part_stride + i_head * scale_head_stride
        if HAS_SCALE:
            factor = tl.load(scale + slot * scale_slot_stride + o_scale)

        b_sum = tl.zeros([BLOCK // per_word], tl.uint64)
        for start in tl.static_range(0, CHUNK, BLOCK):
            o_element = start + tl.arange(0, BLOCK)
            m_element = o_element < CHUNK
            if HAS_SUMS:
                b_in = tl.load(p_in + o_element, mask=m_element, other=0.0)
                o_word = (o_in + start) // per_word + tl.arange(0, BLOCK // per_word)
                b_sum += word_keys(o_word.to(tl.uint32)) * words_of(b_in, BLOCK).to(tl.uint64)
            else:
                b_in = tl.load(p_in + o_element, mask=m_element)
            if HAS_SCALE:
                b_in = b_in.to(tl.float32) * factor
            tl.store(p_out + o_element, b_in.to(out.dtype.element_ty), mask=m_element)

        if HAS_SUMS:
            total = tl.sum(b_sum, 0)
            if HAS_SCALE:
                word = factor.to(tl.uint32, bitcast=True).to(tl.uint64)
                total += word_keys((scale_word + o_scale).to(tl.uint32)) * word
            tl.atomic_add(sums + i_slot, total.to(tl.int64, bitcast=True), sem="relaxed")


def gather_layer(
    kv: Tensor,
    layer: int | Tensor,
    slots: Tensor,
    *,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.gather_layer`; the result is on the device of ``slots``."""
    checks.gather(kv, layer, slots, scale, out, sums, dtype)
    _, _, _, kv_heads, chunk_tokens, head_dim = kv.shape
    n, chunk = slots.shape[0], chunk_tokens * head_dim
    if out is None:
        out = torch.empty((2, kv_heads, n * chunk_tokens, head_dim), dtype=dtype or kv.dtype, device=slots.device)
    if n:
        programs = n * kv_heads * 2
        if not kv.is_cuda and slots.is_cuda:
            # enough programs to saturate the link; the rest of the GPU is left to the attention over gathered chunks
            programs = min(programs, tuning.multiprocessors(slots.device))
        _gather_kernel[(programs,)](
            kv,
            layer,
            slots,
            scale,
            sums,
            out,
            n,
            kv_heads,
            *kv.stride()[:4],
            *(scale.stride() if scale is not None else (0, 0, 0, 0)),
            (scale.data_ptr() - kv.data_ptr()) // 4 if scale is not None else 0,
            *out.stride()[:2],
            CHUNK=chunk,
            BLOCK=min(triton.next_power_of_2(chunk), _BLOCK_BYTES // kv.dtype.itemsize),
            LAYER_IS_POINTER=not isinstance(layer, int),
            HAS_SCALE=scale is not None,
            HAS_SUMS=sums is not None,
            num_warps=8 if sums is not None and kv.dtype.itemsize == 4 else 4,  # each word also needs a 64-bit sum
        )
    return out[0], out[1]
