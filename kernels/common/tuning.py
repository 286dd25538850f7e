"""Launch settings of the attention kernels.

Those of decode were found with `tests/benchmarks/bench_kernels.py --sweep`. Those of prefill are to be compared with
`tests/benchmarks/bench_ragged_prefill.py`.

The server itself tunes nothing, so that no request waits for a search.
"""

from dataclasses import dataclass
from functools import cache

import torch

_WAVE_EFFICIENCY = 0.95
_LARGE_GROUP = 32
_LEAST_SPLIT_TOKENS = 2048


@dataclass(frozen=True)
class DecodeConfig:
    """Launch settings of `sparse_decode`.

    ``block_tokens``: keys in a block, a power of two; ``num_stages``: a program loads ``num_stages - 1`` blocks ahead;
    ``programs_per_sm``: programs that run on a multiprocessor at once. ``stream``: one wave of programs with equal
    shares of all rows (`stream_decode`) instead of the same number of splits for every row (`split_decode`).
    ``pairs``: read fp8 as pairs of values and multiply in float16, if queries have 16 bits.
    """

    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    stream: bool = False
    pairs: bool = False


# Key: (GPU family, bytes of a K/V element, padded head dim). A multiprocessor should have at least 64 KiB of loads in
# flight: block_tokens * head_dim * itemsize * 2 (K and V) * (num_stages - 2) * programs_per_sm. On one H100 80GB SXM
# `stream` makes batches of 64 MB with equal lengths 4 % slower, and with uneven lengths, as in serving, 66 % faster.
_DECODE = {
    ("hopper", 1, 64): DecodeConfig(64, 4, 5, 4, stream=True, pairs=True),
    ("hopper", 1, 128): DecodeConfig(64, 4, 4, 3, stream=True, pairs=True),
    ("hopper", 1, 256): DecodeConfig(32, 4, 4, 3),
    ("hopper", 2, 64): DecodeConfig(64, 4, 3, 4, stream=True),
    ("hopper", 2, 128): DecodeConfig(64, 4, 3, 2, stream=True),
    ("hopper", 2, 256): DecodeConfig(32, 4, 3, 3),
    ("hopper", 4, 64): DecodeConfig(32, 4, 4, 3),
    ("hopper", 4, 128): DecodeConfig(32, 8, 3, 2),
    ("hopper", 4, 256): DecodeConfig(16, 8, 3, 2),
}
# Groups of 32 query heads and more: the accumulator needs the registers of more warps.
_DECODE_LARGE_GROUP = {
    ("hopper", 1, 128): DecodeConfig(64, 8, 4, 2),
    ("hopper", 2, 128): DecodeConfig(64, 8, 3, 2),
    ("hopper", 2, 256): DecodeConfig(32, 8, 3, 2),
    ("hopper", 4, 64): DecodeConfig(32, 8, 4, 2),
}
_DEFAULT = DecodeConfig(32, 4, 2, 2)


def decode_config(dtype: torch.dtype, head_dim: int, group: int, family: str) -> DecodeConfig:
    """Settings for a pool of ``dtype``, ``group`` query heads per KV head, on a GPU of ``family``."""
    key = (family, dtype.itemsize, max(64, 1 << (head_dim - 1).bit_length()))
    if group >= _LARGE_GROUP and key in _DECODE_LARGE_GROUP:
        return _DECODE_LARGE_GROUP[key]
    return _DECODE.get(key, _DEFAULT)


@dataclass(frozen=True)
class PrefillConfig:
    """Launch settings of `ragged_prefill`.

    ``rows``: (token, query head) pairs of a program, a power of two; ``block_tokens``: keys read at once, a power of
    two, of one chunk or of two; ``num_stages``: a program loads ``num_stages - 1`` times as many ahead.
    ``descriptors``: K/V is copied by the GPU's tensor memory accelerator where its strides allow that.
    """

    rows: int
    block_tokens: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


PREFILL_VARIANTS = {
    "wide": PrefillConfig(128, 128, 8, 2),
    "wide-tma": PrefillConfig(128, 128, 8, 2, descriptors=True),
    "narrow": PrefillConfig(128, 64, 8, 3),
    "two-programs": PrefillConfig(64, 64, 4, 3),
}
"""Candidates for 16-bit queries and pools with heads of 128: a benchmark compares them."""
# Key: (GPU family, bytes of a query's element, padded head dim). Not measured yet: chosen so that queries and
# `num_stages` times the keys and values read at once fit into the 227 KiB of shared memory of a multiprocessor.
_PREFILL = {
    ("hopper", 2, 64): PrefillConfig(128, 128, 8, 3),
    ("hopper", 2, 128): PREFILL_VARIANTS["wide"],
    ("hopper", 2, 256): PrefillConfig(128, 64, 8, 2),
    ("hopper", 4, 64): PrefillConfig(64, 32, 4, 2),
    ("hopper", 4, 128): PrefillConfig(64, 32, 8, 2),
    ("hopper", 4, 256): PrefillConfig(32, 32, 8, 2),
}
_PREFILL_DEFAULT = PrefillConfig(64, 32, 4, 2)


def prefill_config(dtype: torch.dtype, head_dim: int, family: str) -> PrefillConfig:
    """Settings for queries of ``dtype`` on a GPU of ``family``."""
    key = (family, dtype.itemsize, max(64, 1 << (head_dim - 1).bit_length()))
    return _PREFILL.get(key, _PREFILL_DEFAULT)


@cache
def prefill_splits(programs: int, past_tokens: int, places: int) -> int:
    """Number of programs that share the past of a tile, ``past_tokens`` at most, where there would be ``programs`` on a
    GPU that runs ``places`` at once. It depends on shapes only, so that a captured CUDA graph serves every length.
    """
    return max(1, min(places // programs, past_tokens // _LEAST_SPLIT_TOKENS))


@cache
def decode_splits(rows: int, max_blocks: int, places: int) -> int:
    """Number of splits per row, for ``rows`` (sequence, KV head) pairs on a GPU that runs ``places`` programs at once.

    It is the smallest number that nearly fills the last wave of programs. It depends on shapes only, so that a captured
    CUDA graph serves every length.
    """

    def efficiency(splits: int) -> float:
        programs = rows * splits
        return programs / (-(-programs // places) * places)

    candidates = range(1, max(1, min(max_blocks, places)) + 1)
    good = (splits for splits in candidates if efficiency(splits) >= _WAVE_EFFICIENCY)
    return next(good, max(candidates, key=efficiency))


@cache
def gpu_family(device: torch.device) -> str:
    """``hopper``, or ``other`` for GPUs without measured settings."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "other"
    major, _ = torch.cuda.get_device_capability(device)
    return "hopper" if major == 9 else "other"


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
