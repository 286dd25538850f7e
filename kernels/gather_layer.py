"""One layer of many chunks, copied to contiguous keys and values in Triton.

The pool may be GPU memory, or host memory that is pinned or registered: then the GPU reads it over PCIe.
The same
in PyTorch: `reference.gather_layer`.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_BYTES = 16384


@triton.jit(do_not_specialize=["layer"])
def _gather_kernel(
    kv,  # [slots, layers, 2, kv_heads, CHUNK], CHUNK = chunk_tokens * head_dim
    layer,  # int, or a pointer to one
    slots,  # [n]
    out,  # [2, kv_heads, n, CHUNK]
    kv_slot_stride,
    kv_layer_stride,
    kv_part_stride,
    kv_head_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
):
    i_slot, i_head, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LAYER_IS_POINTER:
        layer = tl.load(layer)
    slot = tl.load(slots + i_slot).to(tl.int64)
    p_in = kv + slot * kv_slot_stride + layer.to(tl.int64) * kv_layer_stride
    p_in += i_part * kv_part_stride + i_head * kv_head_stride
    i_row = (i_part * tl.num_programs(1) + i_head).to(tl.int64) * tl.num_programs(0) + i_slot
    for start in tl.static_range(0, CHUNK, BLOCK):
        o_element = start + tl.arange(0, BLOCK)
        m_element = o_element < CHUNK
        tl.store(out + i_row * CHUNK + o_element, tl.load(p_in + o_element, mask=m_element), mask=m_element)


def gather_layer(kv: Tensor, layer: int | Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.gather_layer`; the result is on the device of ``slots``."""
    _, layers, parts, kv_heads, chunk_tokens, head_dim = kv.shape
    assert parts == 2 and kv.stride(5) == 1 and kv.stride(4) == head_dim, "a head's chunk must be contiguous"
    assert slots.dim() == 1 and slots.is_contiguous() and slots.dtype == torch.int64
    assert not isinstance(layer, int) or 0 <= layer < layers, f"layer {layer} of {layers}"
    n, chunk = slots.shape[0], chunk_tokens * head_dim
    out = torch.empty((2, kv_heads, n * chunk_tokens, head_dim), dtype=kv.dtype, device=slots.device)
    if n:
        _gather_kernel[(n, kv_heads, 2)](
            kv,
            layer,
            slots,
            out,
            *kv.stride()[:4],
            CHUNK=chunk,
            BLOCK=min(triton.next_power_of_2(chunk), _BLOCK_BYTES // kv.dtype.itemsize),
            LAYER_IS_POINTER=not isinstance(layer, int),
        )
    return out[0], out[1]
