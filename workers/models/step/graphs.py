"""Decode steps as CUDA graphs: what all architectures share of their capture."""

WARM_UPS = 2
"""Eager runs before a capture: lazy initialisation (cuBLAS handles, Triton compilation) must be over by then."""


def batch_buckets(max_batch_size: int) -> list[int]:
    """Batch sizes to capture: 2, 4, 8, then every 8, up to ``max_batch_size`` rounded up."""
    return [size for size in (2, 4) if size < max_batch_size] + list(range(8, max_batch_size + 8, 8))
