"""Compressed Sparse Attention at decode: Triton for CUDA tensors, plain PyTorch for all others, as `ops.py` does it."""

from torch import Tensor

from forecache.kernels.csa import reference as reference_csa
from forecache.kernels.csa.reference import merge_with_sinks

__all__ = ["attend_entries", "csa_decode", "merge_with_sinks", "score_entries", "top_entries"]


def score_entries(q: Tensor, weights: Tensor, keys: Tensor, block_table: Tensor, lens: Tensor) -> Tensor:
    """See `reference_csa.score_entries`."""
    if q.is_cuda:
        from forecache.kernels.csa import score_entries as triton_kernel

        return triton_kernel.score_entries(q, weights, keys, block_table, lens)
    return reference_csa.score_entries(q, weights, keys, block_table, lens)


def top_entries(scores: Tensor, k: int) -> Tensor:
    """See `reference_csa.top_entries`."""
    if scores.is_cuda:
        from forecache.kernels.csa import top_entries as triton_kernel

        return triton_kernel.top_entries(scores, k)
    return reference_csa.top_entries(scores, k)


def attend_entries(
    q: Tensor, entries: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference_csa.attend_entries`."""
    if q.is_cuda:
        from forecache.kernels.csa import decode as triton_kernel

        return triton_kernel.attend_entries(q, entries, block_table, lens, scale, selected=selected)
    return reference_csa.attend_entries(q, entries, block_table, lens, scale, selected=selected)


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
    """See `reference_csa.csa_decode`."""
    table, near = (entries, block_table, lens), (window, window_slots, window_lens)
    if q.is_cuda:
        from forecache.kernels.csa import decode as triton_kernel

        return triton_kernel.csa_decode(q, *table, *near, sinks, scale, selected=selected)
    return reference_csa.csa_decode(q, *table, *near, sinks, scale, selected=selected)
