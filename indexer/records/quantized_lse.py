"""Log-sum-exps over many int8 records on a CPU, with integer products and blocks whose logits fit a core's cache.

:func:`.scores.exact_chunk_lse`, in float32, takes more than twice the CPU time. Here each query is the sum of two int8
vectors, which is exact to 1/32,258 of its largest component. One int8 vector would be a quarter faster, but some heads'
queries have a few large components, and the error would then change events and selected chunks.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec

FINE_STEPS = 254
"""One step of a query's high part is this many steps of its low part, which covers ±half a step in int8."""
LEAST_CHUNKS = 128
"""Fewer chunks are read in float32, which then takes a few milliseconds."""
BLOCK_LOGITS = 1 << 16
"""Logits of one KV head in a block: two int32 and a float32 each, 768 KiB."""
TASK_CHUNKS = 256
"""Chunks in one thread's task."""
LEAST_SUM = 2.0**-100
"""Smaller sums of exponentials are imprecise: the smallest normal float32 is 2**-126."""


def serves(spec: IndexSpec, records: Tensor, chunks: int) -> bool:
    """Whether to read ``chunks`` of ``records`` this way: int8 keys of tokens, and a CPU with AVX-512."""
    return (
        chunks >= LEAST_CHUNKS
        and spec.kind == "tokens"
        and spec.dtype == torch.int8
        and records.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def quantized_chunk_lse(spec: IndexSpec, records: Tensor, queries: Tensor, slots: Tensor | None) -> Tensor:
    """An approximation of :func:`.scores.chunk_lse`; NaN for chunks whose sum of exponentials float32 can't represent.

    Uses as many threads as torch would. Each thread processes whole chunks, so that threads do not wait for each other
    after every operator, which is slow when the CPUs are busy.
    """
    if slots is None:
        slots = torch.arange(len(records))
    lse = torch.empty(len(spec.query_heads), len(slots))
    # exp(x) = 2 ** (x log2 e), and 2 ** x is faster
    scaled = queries * (spec.scale * math.log2(math.e))
    coarse = (scaled.abs().amax(1, keepdim=True) / 127).clamp(min=LEAST_SUM)
    high = (scaled / coarse).round()
    low = ((scaled / coarse - high) * FINE_STEPS).round()
    parts, steps = torch.stack([high, low]).to(torch.int8), coarse / FINE_STEPS

    def work(some: Tensor, sums: Tensor) -> None:
        with torch.inference_mode():
            _sum_exponentials(spec, records, some, parts, steps, sums)

    tasks = list(zip(torch.split(slots, TASK_CHUNKS), torch.split(lse, TASK_CHUNKS, 1), strict=True))
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for task in tasks:
            work(*task)
    else:
        for done in [_workers(threads).submit(work, *task) for task in tasks]:
            done.result()
    lost = ~((lse >= LEAST_SUM) & (lse < torch.inf))
    return lse.log_().masked_fill_(lost, torch.nan)


def _sum_exponentials(
    spec: IndexSpec, records: Tensor, slots: Tensor, parts: Tensor, steps: Tensor, sums: Tensor
) -> None:
    """Fill ``sums``, float32 [query heads, slots], with the sum of 2 ** logit over each chunk's tokens.

    ``parts``: int8 [2, query heads, head_dim], high and low part of the queries; ``steps``: float32 [query heads, 1].
    """
    chunks, tokens, dim = len(slots), spec.chunk_tokens, spec.head_dim
    table = records.view(torch.int8)
    scales = records[:, spec.key_nbytes : spec.key_nbytes + spec.scale_nbytes].view(torch.float16)
    of_heads = scales.index_select(0, slots).view(chunks, len(spec.kv_heads), tokens).transpose(0, 1)
    factors = of_heads.float().reshape(len(spec.kv_heads), chunks * tokens)
    most = max(len(rows) for rows in spec.queries_of_kv)
    block = max(1, min(BLOCK_LOGITS // (most * tokens), chunks))
    keys = torch.empty(block, tokens * dim, dtype=torch.int8)
    products, logits = torch.empty(2 * most * block * tokens, dtype=torch.int32), torch.empty(most * block * tokens)
    for kv, members in enumerate(spec.queries_of_kv):
        group = list(members)
        queries, step = parts[:, group].flatten(0, 1), steps[group]
        found = torch.empty(len(group), chunks)
        stored = table[:, kv * tokens * dim : (kv + 1) * tokens * dim]
        for first in range(0, chunks, block):
            some = slots[first : first + block]
            count = len(some) * tokens
            torch.index_select(stored, 0, some, out=keys[: len(some)])
            integers = products[: 2 * len(group) * count].view(2 * len(group), count)
            high, low = integers[: len(group)], integers[len(group) :]
            block_logits = logits[: len(group) * count].view(len(group), count)
            torch._int_mm(queries, keys[: len(some)].view(count, dim).t(), out=integers)
            torch.add(low, high, alpha=FINE_STEPS, out=low)
            torch.mul(low, factors[kv, first * tokens : first * tokens + count], out=block_logits)
            block_logits.mul_(step).exp2_()
            torch.sum(block_logits.view(len(group), len(some), tokens), 2, out=found[:, first : first + block])
        sums[group] = found


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool of ``threads`` threads, whose torch operators each use one thread."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="forecache-lse")
    others = torch.get_num_threads()
    started = threading.Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # torch's first call in a thread would overwrite the number set below
        torch.set_num_threads(1)
        started.wait()

    for ready in [pool.submit(start) for _ in range(threads)]:
        ready.result()
    # set_num_threads also changes the default for threads that start later: restore it
    torch.set_num_threads(others)
    return pool
