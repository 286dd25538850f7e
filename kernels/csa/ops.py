"""Compressed Sparse Attention at decode: Triton for CUDA tensors, plain PyTorch for all others.

Triton is imported at the first CUDA call.
"""

from torch import Tensor

from forecache.kernels.csa import reference
from forecache.kernels.csa.reference import merge_with_sinks

__all__ = ["attend_entries", "csa_decode", "merge_with_sinks", "score_entries", "top_entries"]


def score_entries(q: Tensor, weights: Tensor, keys: Tensor, block_table: Tensor, lens: Tensor) -> Tensor:
    """See `reference.score_entries`."""
    if q.is_cuda:
        from forecache.kernels.csa import score_entries as triton_kernel

        return triton_kernel.score_entries(q, weights, keys, block_table, lens)
    return reference.score_entries(q, weights, keys, block_table, lens)


def top_entries(scores: Tensor, k: int) -> Tensor:
    """See `reference.top_entries`."""
    if scores.is_cuda:
        from forecache.kernels.csa import top_entries as triton_kernel

        return triton_kernel.top_entries(scores, k)
    return reference.top_entries(scores, k)


def attend_entries(
    q: Tensor, entries: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.attend_entries`."""
    if q.is_cuda:
        from forecache.kernels.csa import decode as triton_kernel

        return triton_kernel.attend_entries(q, entries, block_table, lens, scale, selected=selected)
    return reference.attend_entries(q, entries, block_table, lens, scale, selected=selected)


def csa_decode(
    q: Tensor,
    entries: Tensor,
    block_table: Tensor,
    lens: Tensor,
    window: Tensor,
    window_slots: Tensor,
    window_lens: Tensor,
    sinks: Tensor,
    scale: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """See `reference.csa_decode`."""
    table, near = (entries, block_table, lens), (window, window_slots, window_lens)
    if q.is_cuda:
        from forecache.kernels.csa import decode as triton_kernel

        return triton_kernel.csa_decode(q, *table, *near, sinks, scale, selected=selected)
    return reference.csa_decode(q, *table, *near, sinks, scale, selected=selected)
