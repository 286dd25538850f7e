"""The kernels' public face: Triton for CUDA tensors, plain PyTorch for all others.

Triton is imported at the first CUDA call, so this module also works where Triton does not exist.
"""

import torch
from torch import Tensor

from forecache.kernels import reference
from forecache.kernels.columns import Columns


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
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_decode`."""
    if q.is_cuda:
        from forecache.kernels import sparse_decode as triton_kernel

        return triton_kernel.sparse_decode(
            q,
            kv,
            layer,
            block_table,
            context_lens,
            scale,
            k_scale=k_scale,
            v_scale=v_scale,
            chunk_mass=chunk_mass,
            counters=counters,
        )
    return reference.sparse_decode(
        q,
        kv,
        layer,
        block_table,
        context_lens,
        scale,
        k_scale=k_scale,
        v_scale=v_scale,
        chunk_mass=chunk_mass,
    )


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.merge_partials`."""
    if out_a.is_cuda:
        from forecache.kernels import merge_partials as triton_kernel

        return triton_kernel.merge_partials(out_a, lse_a, out_b, lse_b)
    return reference.merge_partials(out_a, lse_a, out_b, lse_b)


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
    if k.is_cuda:
        from forecache.kernels import store_kv as triton_kernel

        triton_kernel.store_kv(k, v, kv, layer, slots, offsets, scale=scale, non_finite=non_finite)
    else:
        reference.store_kv(k, v, kv, layer, slots, offsets, scale=scale, non_finite=non_finite)


def flag_non_finite(x: Tensor, non_finite: Tensor) -> None:
    """See `reference.flag_non_finite`."""
    if x.is_cuda:
        from forecache.kernels import flag_non_finite as triton_kernel

        triton_kernel.flag_non_finite(x, non_finite)
    else:
        reference.flag_non_finite(x, non_finite)


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
    """See `reference.gather_layer`. With CUDA ``slots``, ``kv`` may be pinned or registered host memory."""
    if slots.is_cuda:
        from forecache.kernels import gather_layer as triton_kernel

        return triton_kernel.gather_layer(kv, layer, slots, scale=scale, out=out, sums=sums, dtype=dtype)
    return reference.gather_layer(kv, layer, slots, scale=scale, out=out, sums=sums, dtype=dtype)


def slot_checksums(memory: Tensor, slots: Tensor, first_word: int = 0) -> Tensor:
    """See `reference.slot_checksums`. With CUDA ``slots``, ``memory`` may be pinned or registered host memory."""
    if slots.is_cuda:
        from forecache.kernels import slot_checksums as triton_kernel

        return triton_kernel.slot_checksums(memory, slots, first_word)
    return reference.slot_checksums(memory, slots, first_word)


def quantize_chunks(kv: Tensor, slots: Tensor, out_kv: Tensor, out_scale: Tensor, out_slots: Tensor) -> None:
    """See `reference.quantize_chunks`."""
    if slots.is_cuda:
        from forecache.kernels import quantize_chunks as triton_kernel

        triton_kernel.quantize_chunks(kv, slots, out_kv, out_scale, out_slots)
    else:
        reference.quantize_chunks(kv, slots, out_kv, out_scale, out_slots)


def dequantize_chunks(kv: Tensor, scale: Tensor, slots: Tensor, out_kv: Tensor, out_slots: Tensor) -> None:
    """See `reference.dequantize_chunks`."""
    if slots.is_cuda:
        from forecache.kernels import quantize_chunks as triton_kernel

        triton_kernel.dequantize_chunks(kv, scale, slots, out_kv, out_slots)
    else:
        reference.dequantize_chunks(kv, scale, slots, out_kv, out_slots)


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
        from forecache.kernels import score_chunks as triton_kernel

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
