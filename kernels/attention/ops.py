"""Attention kernels: Triton for CUDA tensors, plain PyTorch for all others.

Triton is imported at the first CUDA call: this module also works where Triton is not installed.
"""

import torch
from torch import Tensor

from forecache.kernels.attention import reference


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
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_decode`."""
    if q.is_cuda:
        from forecache.kernels.attention import decode as triton_kernel

        return triton_kernel.sparse_decode(
            q, kv, layer, block_table, context_lens, scale, k_scale=k_scale, v_scale=v_scale
        )
    return reference.sparse_decode(q, kv, layer, block_table, context_lens, scale, k_scale=k_scale, v_scale=v_scale)


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
) -> tuple[Tensor, Tensor]:
    """See `reference.ragged_prefill`."""
    backend = reference.ragged_prefill
    if q.is_cuda:
        from forecache.kernels.attention import ragged_prefill as triton_kernel

        backend = triton_kernel.ragged_prefill
    return backend(q, k, v, kv, layer, block_table, past_lens, starts, scale, k_scale=k_scale, v_scale=v_scale)


def chunk_mass(
    q: Tensor,
    lse: Tensor,
    kv: Tensor,
    layers: Tensor,
    kv_heads: Tensor,
    block_table: Tensor,
    positions: Tensor,
    starts: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
) -> Tensor:
    """See `reference.chunk_mass`."""
    backend = reference.chunk_mass
    if q.is_cuda:
        from forecache.kernels.attention import chunk_mass as triton_kernel

        backend = triton_kernel.chunk_mass
    return backend(q, lse, kv, layers, kv_heads, block_table, positions, starts, scale, k_scale=k_scale)


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.merge_partials`."""
    if out_a.is_cuda:
        from forecache.kernels.attention import merge_partials as triton_kernel

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
        from forecache.kernels.attention import store_kv as triton_kernel

        triton_kernel.store_kv(k, v, kv, layer, slots, offsets, scale=scale, non_finite=non_finite)
    else:
        reference.store_kv(k, v, kv, layer, slots, offsets, scale=scale, non_finite=non_finite)


def flag_non_finite(x: Tensor, non_finite: Tensor) -> None:
    """See `reference.flag_non_finite`."""
    if x.is_cuda:
        from forecache.kernels.attention import flag_non_finite as triton_kernel

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
        from forecache.kernels.attention import gather_layer as triton_kernel

        return triton_kernel.gather_layer(kv, layer, slots, scale=scale, out=out, sums=sums, dtype=dtype)
    return reference.gather_layer(kv, layer, slots, scale=scale, out=out, sums=sums, dtype=dtype)
