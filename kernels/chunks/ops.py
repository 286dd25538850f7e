"""Chunk kernels: Triton for CUDA tensors, plain PyTorch for all others. Triton is imported at the first CUDA call."""

import torch
from torch import Tensor

from forecache.kernels.chunks import reference
from forecache.kernels.common.columns import Columns


def slot_checksums(memory: Tensor, slots: Tensor, first_word: int = 0) -> Tensor:
    """See `reference.slot_checksums`. With CUDA ``slots``, ``memory`` may be pinned or registered host memory."""
    if slots.is_cuda:
        from forecache.kernels.chunks import slot_checksums as triton_kernel

        return triton_kernel.slot_checksums(memory, slots, first_word)
    return reference.slot_checksums(memory, slots, first_word)


def score_chunks(
    records: Tensor,
    slots: Tensor,
    queries: Tensor,
    query_starts: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    copies: Tensor | None = None,
    copy_slots: Tensor | None = None,
    into: Columns | None = None,
) -> Tensor:
    """See `reference.score_chunks`. With CUDA ``slots``, ``records`` may be pinned or registered host memory."""
    backend = reference.score_chunks
    if slots.is_cuda:
        from forecache.kernels.chunks import score_chunks as triton_kernel

        backend = triton_kernel.score_chunks
    return backend(
        records,
        slots,
        queries,
        query_starts,
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        copies=copies,
        copy_slots=copy_slots,
        into=into,
    )


def quantize_chunks(kv: Tensor, slots: Tensor, out_kv: Tensor, out_scale: Tensor, out_slots: Tensor) -> None:
    """See `reference.quantize_chunks`."""
    if slots.is_cuda:
        from forecache.kernels.chunks import quantize_chunks as triton_kernel

        triton_kernel.quantize_chunks(kv, slots, out_kv, out_scale, out_slots)
    else:
        reference.quantize_chunks(kv, slots, out_kv, out_scale, out_slots)


def dequantize_chunks(kv: Tensor, scale: Tensor, slots: Tensor, out_kv: Tensor, out_slots: Tensor) -> None:
    """See `reference.dequantize_chunks`."""
    if slots.is_cuda:
        from forecache.kernels.chunks import quantize_chunks as triton_kernel

        triton_kernel.dequantize_chunks(kv, scale, slots, out_kv, out_slots)
    else:
        reference.dequantize_chunks(kv, scale, slots, out_kv, out_slots)
