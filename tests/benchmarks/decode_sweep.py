"""Search decode settings for `kernels/common/tuning.py`: the table's and their neighbours."""

import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from kernel_timing import CACHE_BYTES, CHUNK_TOKENS, Bench, DecodeInputs, DecodeShape
from triton.runtime.errors import OutOfResources

from forecache.kernels.attention.decode import sparse_decode
from forecache.kernels.common import tuning
from forecache.kernels.common.tuning import DecodeConfig

FP8 = torch.float8_e4m3fn
COMPILERS = 8
# (block_tokens, num_warps, num_stages, programs_per_sm), by the bytes of 64 tokens' keys and values
CANDIDATES = {
    32 << 10: [(64, 4, 3, 3), (64, 4, 4, 2), (64, 4, 3, 2), (64, 8, 4, 2), (64, 8, 6, 1), (32, 4, 4, 4), (32, 4, 5, 3)],
    16 << 10: [(64, 4, 4, 4), (64, 4, 5, 3), (64, 4, 6, 2), (64, 4, 4, 3), (64, 8, 5, 2), (64, 8, 6, 2), (64, 4, 3, 4)],
    8 << 10: [(64, 4, 5, 4), (64, 4, 6, 4), (64, 4, 6, 3), (64, 4, 5, 5), (64, 8, 6, 2), (64, 2, 5, 6), (64, 2, 4, 6)],
}


def as_code(c: DecodeConfig) -> str:
    """The settings as a line of the table in tuning.py."""
    numbers = f"{c.block_tokens}, {c.num_warps}, {c.num_stages}, {c.programs_per_sm}"
    flags = "".join(f", {name}=True" for name in ("stream", "pairs") if getattr(c, name))
    return f"DecodeConfig({numbers}{flags})"


def kinds() -> dict[str, list[DecodeShape]]:
    """Pools by the lines of the tables they are for: the same settings serve all groups of a line."""
    group_4, group_7 = DecodeShape(1, 0), DecodeShape(1, 0, heads=28, kv_heads=4)
    narrow = DecodeShape(1, 0, heads=9, kv_heads=3, head_dim=64)
    return {
        '("hopper", 2, 128)': [group_4, group_7],
        '("hopper", 1, 128)': [replace(group_4, dtype=FP8), replace(group_7, dtype=FP8)],
        '("hopper", 2, 64)': [narrow],
        '("hopper", 1, 64)': [replace(narrow, dtype=FP8)],
    }


def sized(kind: DecodeShape, quick: bool) -> Iterator[DecodeShape]:
    """64 MiB of keys and values in 1, 4 and 16 sequences, the last ones ragged, and 1 GiB in 16."""
    token_bytes = 2 * kind.kv_heads * kind.head_dim * kind.dtype.itemsize
    for batch, mebibytes, ragged in ((1, 64, False), (4, 64, False), (16, 64, True), (16, 1024, False)):
        tokens = (mebibytes << (16 if quick else 20)) // (batch * token_bytes) // CHUNK_TOKENS * CHUNK_TOKENS
        yield replace(kind, batch=batch, context_tokens=max(CHUNK_TOKENS, tokens), ragged=ragged)


def candidates(kind: DecodeShape, quick: bool) -> list[DecodeConfig]:
    """The table's settings first."""
    tuned = tuning.decode_config(kind.dtype, kind.head_dim, kind.heads // kind.kv_heads, "hopper")
    found = [tuned]
    numbers = CANDIDATES[2 * 64 * kind.head_dim * kind.dtype.itemsize]
    for stream, four in itertools.product((False, True), numbers[: 2 if quick else None]):
        config = DecodeConfig(*four, stream=stream, pairs=kind.dtype == FP8)
        if config not in found:
            found.append(config)
    return found


def compile_one(kind: DecodeShape, config: DecodeConfig) -> None:
    """Leave a candidate's kernels in Triton's cache on disk; run in separate processes."""
    inputs = DecodeInputs.make(replace(kind, batch=1, context_tokens=2 * CHUNK_TOKENS), torch.device("cuda"), 1 << 20)
    try:
        inputs.call(partial(sparse_decode, config=config), 0)
        torch.cuda.synchronize()
    except OutOfResources:
        return  # compiled all the same; the sweep says so


def compile_all(quick: bool) -> None:
    jobs = [(shape, c) for shapes in kinds().values() for shape in shapes for c in candidates(shape, quick)]
    start = time.perf_counter()
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, *job) for job in jobs]:
            done.result()
    print(f"compiled {len(jobs)} candidates in {time.perf_counter() - start:.1f} s")


def sweep(bench: Bench) -> dict[str, DecodeConfig]:
    """The best settings for each line of the table: smallest geometric mean of the times over groups and sizes."""
    compile_all(bench.quick)
    best = {}
    for line, groups in kinds().items():
        shapes = [shape for group in groups for shape in sized(group, bench.quick)]
        times_s: dict[DecodeConfig, list[float]] = {c: [] for c in candidates(groups[0], bench.quick)}
        for shape in shapes:
            inputs = DecodeInputs.make(shape, bench.device, CACHE_BYTES)
            for config in list(times_s):
                call = partial(inputs.call, partial(sparse_decode, config=config))
                try:
                    times = bench.times_s(call, len(inputs.layers), graph=True)
                except OutOfResources as error:
                    print(f"{line} {as_code(config)}: {error}")
                    del times_s[config]
                    continue
                times_s[config].append(statistics.median(times))
                settings = as_code(config)
                bench.add("sweep", shape, shape.dtype, times, nbytes=shape.layer_bytes, settings=settings, quiet=True)
            del inputs
        best[line] = report(bench, line, shapes, times_s)
    return best


def report(
    bench: Bench, line: str, shapes: list[DecodeShape], times_s: dict[DecodeConfig, list[float]]
) -> DecodeConfig:
    """Print the ranking of one line's candidates and the line to paste; return the best."""
    print(f"\n{line}, % of copy bandwidth: {'; '.join(map(str, shapes))}")
    ranked = sorted(times_s, key=lambda c: statistics.geometric_mean(times_s[c]))
    table = next(iter(times_s))
    for i, config in enumerate(ranked):
        if i >= 8 and config != table:
            continue
        shares = [s.layer_bytes / t / bench.copy_bytes_per_s for s, t in zip(shapes, times_s[config], strict=True)]
        mark = "  <- tuning.py" if config == table else ""
        mean_us = statistics.geometric_mean(times_s[config]) * 1e6
        print(f"  {mean_us:7.1f} us  {' '.join(f'{share:5.1%}' for share in shares)}  {as_code(config)}{mark}")
    print(f"    {line}: {as_code(ranked[0])},")
    return ranked[0]
