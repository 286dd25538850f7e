"""Speed of the kernels: bandwidth of decode and of all that moves chunks, TFLOP/s of prefill, and a sweep of settings.

    python tests/benchmarks/bench_kernels.py --out DIR            # all measurements, as CSV
    python tests/benchmarks/bench_kernels.py --sweep --out DIR    # settings for kernels/common/tuning.py
    python tests/benchmarks/bench_kernels.py --device cpu --quick --out DIR

A row's time is that of one call. Launches are captured in a CUDA graph, and successive calls read different
layers, so that neither Python nor the cache is measured. The last line printed is JSON.
"""

import argparse
import itertools
import json
import mmap
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from kernel_timing import CACHE_BYTES, CHUNK_TOKENS, Bench, DecodeInputs, DecodeShape
from torch import Tensor

from forecache.kernels.attention import ops, prefill
from forecache.kernels.chunks import ops as chunk_ops
from forecache.kernels.common import tuning

FP8 = torch.float8_e4m3fn


def bench_copy(bench: Bench) -> None:
    """Copy on the device, read and write counted: what a memory-bound kernel is compared with."""
    nbytes = 2 << 30 if bench.on_gpu else 64 << 20
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times = bench.times_s(lambda _: target.copy_(source))
    bench.copy_bytes_per_s = 2 * nbytes / statistics.median(times)
    bench.add("copy", f"{nbytes >> 20} MiB", torch.uint8, times, nbytes=2 * nbytes)
    if bench.on_gpu:  # as much as the smallest shape that sparse_decode is judged by reads
        parts = list(zip(target.split(32 << 20), source.split(32 << 20), strict=True))
        times = bench.times_s(lambda i: parts[i][0].copy_(parts[i][1]), calls=len(parts), graph=True)
        bench.add("copy", "32 MiB to 32 MiB", torch.uint8, times, nbytes=64 << 20)


def decode_shapes(bench: Bench) -> Iterator[DecodeShape]:
    if bench.quick:
        yield DecodeShape(1, 1024, dtype=torch.bfloat16 if bench.on_gpu else torch.float32)
        yield DecodeShape(4, 1024)
        return
    for batch, context in itertools.product((1, 4, 16, 64), (1 << 10, 4 << 10, 16 << 10, 64 << 10)):
        yield DecodeShape(batch, context)
    yield DecodeShape(1, 128 << 10)
    yield DecodeShape(16, 1 << 10, ragged=True)
    yield DecodeShape(16, 16 << 10, ragged=True)
    for batch, context in ((1, 4 << 10), (1, 32 << 10), (16, 32 << 10)):
        yield DecodeShape(batch, context, kv_heads=1)
        yield DecodeShape(batch, context, heads=28, kv_heads=4)
        yield DecodeShape(batch, context, heads=9, kv_heads=3, head_dim=64)
        yield DecodeShape(batch, context, heads=24, kv_heads=8, head_dim=96)
        yield DecodeShape(batch, context, heads=8, kv_heads=4, head_dim=256)
        yield DecodeShape(batch, context, dtype=FP8)
        yield DecodeShape(batch, context, heads=9, kv_heads=3, head_dim=64, dtype=FP8)


def bench_decode(bench: Bench) -> None:
    """With the settings of tuning.py."""
    for shape in decode_shapes(bench):
        inputs = DecodeInputs.make(shape, bench.device, CACHE_BYTES if bench.on_gpu else 1)
        calls, group = len(inputs.layers), shape.heads // shape.kv_heads
        config = tuning.decode_config(shape.dtype, shape.head_dim, group, tuning.gpu_family(bench.device))
        times = bench.times_s(partial(inputs.call, ops.sparse_decode), calls, graph=True)
        bench.add("sparse_decode", shape, shape.dtype, times, nbytes=shape.layer_bytes, settings=config)
        del inputs


def bench_merge(bench: Bench) -> None:
    rows = 1 << (12 if bench.quick else 18)
    out_a, out_b = (torch.randn(rows, 128, device=bench.device) for _ in range(2))
    lse_a, lse_b = (torch.randn(rows, device=bench.device) for _ in range(2))
    times = bench.times_s(lambda _: ops.merge_partials(out_a, lse_a, out_b, lse_b))
    bench.add("merge_partials", f"{rows}x128", out_a.dtype, times, nbytes=3 * out_a.nbytes)


def bench_prefill(bench: Bench) -> None:
    heads, kv_heads, head_dim = 32, 8, 128
    tokens, keys = (256, 1024) if bench.quick else (8192, 131072)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    for n, causal in ((tokens, True), (tokens, False), (keys, False)):
        q = torch.randn(tokens, heads, head_dim, device=bench.device).to(dtype)
        k, v = (torch.randn(kv_heads, n, head_dim, device=bench.device).to(dtype) for _ in range(2))

        def attend(_: int, q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> object:
            return prefill.attend_block(q, k, v, q.shape[2] ** -0.5, causal=causal)

        times = bench.times_s(attend)
        flop = 4 * tokens * n * heads * head_dim * (0.5 if causal else 1)
        bench.add("attend_block", f"{tokens}x{n}{' causal' if causal else ''}", dtype, times, flop=flop)


@contextmanager
def host_copy(memory: Tensor) -> Iterator[Tensor]:
    """The same bytes in shared memory of the host that is registered with CUDA, as an arena's are."""
    shared = mmap.mmap(-1, memory.nbytes)
    copy = torch.frombuffer(shared, dtype=torch.uint8).view(memory.shape)
    copy.copy_(memory)
    runtime = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(copy.data_ptr(), copy.nbytes, 0))
    assert error == 0, f"cudaHostRegister of {copy.nbytes} bytes: error {error}"
    try:
        yield copy
        torch.cuda.synchronize()
    finally:
        runtime.cudaHostUnregister(copy.data_ptr())


def make_rows(bench: Bench, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of Llama-3.1-8B's chunks (of fewer layers), their K/V and, behind it, their scales; all but the first view
    the first."""
    slots, layers, kv_heads, head_dim = (4, 2, 2, 64) if bench.quick else (128, 32, 8, 128)
    shape = (layers, 2, kv_heads, CHUNK_TOKENS, head_dim)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.zeros(slots, nbytes + 4096, dtype=torch.uint8, device=bench.device)
    kv = memory[:, :nbytes].view(dtype).unflatten(1, shape)
    for rows in torch.split(kv, 16):
        rows.copy_(torch.randn(rows.shape, device=bench.device))
    scale = memory[:, nbytes : nbytes + 4 * layers * 2 * kv_heads].view(torch.float32).unflatten(1, shape[:3])
    scale.fill_(0.01)
    return memory, kv, scale


def like_rows(memory: Tensor, kv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``kv`` and ``scale`` as views of other memory of the same form."""
    nbytes = kv[0].numel() * kv.dtype.itemsize
    views = memory[:, :nbytes].view(kv.dtype), memory[:, nbytes : nbytes + scale[0].numel() * 4].view(torch.float32)
    return views[0].unflatten(1, kv.shape[1:]), views[1].unflatten(1, scale.shape[1:])


def bench_rows(bench: Bench) -> None:
    """What reads whole rows or layers of them, from the device's memory and from the host's: GB/s of what is read, and
    for gathers on the device of what is written too."""
    for dtype in (torch.bfloat16, FP8):
        memory, kv, scale = make_rows(bench, dtype)
        bench_gather(bench, "device", memory, kv, scale)
        bench_checksums(bench, "device", memory)
        if bench.on_gpu:
            with host_copy(memory) as copy:
                bench_gather(bench, "host", copy, *like_rows(copy, kv, scale))
                bench_checksums(bench, "host", copy)


def bench_gather(bench: Bench, where: str, memory: Tensor, kv: Tensor, scale: Tensor) -> None:
    order = torch.randperm(len(kv), device=bench.device)
    sums = torch.zeros(len(kv), dtype=torch.int64, device=bench.device)
    dtype = kv.dtype if kv.dtype.itemsize > 1 else torch.bfloat16
    read, written = kv[:, 0].numel() * kv.dtype.itemsize, kv[:, 0].numel() * dtype.itemsize
    out = torch.empty(2, kv.shape[3], len(kv) * CHUNK_TOKENS, kv.shape[5], dtype=dtype, device=bench.device)
    scaled = {"scale": scale} if kv.dtype == FP8 else {}
    for name, options in (("gather_layer", scaled), ("gather_layer, sums", {"sums": sums, **scaled})):
        gather = partial(ops.gather_layer, kv, slots=order, out=out, **options)
        times = bench.times_s(gather, kv.shape[1], graph=bench.on_gpu)
        nbytes = read + written if where == "device" else read
        bench.add(name, f"{len(kv)} chunks, {where}", kv.dtype, times, nbytes=nbytes)
    if bench.on_gpu:
        sums.zero_()
        for layer in range(kv.shape[1]):
            ops.gather_layer(kv, layer, order, out=out, sums=sums, **scaled)
        if kv.dtype == FP8:  # of bfloat16 rows the scales are not read, though they are there
            assert torch.equal(sums, chunk_ops.slot_checksums(memory, order)), "the layers' sums are not the rows'"


def bench_checksums(bench: Bench, where: str, memory: Tensor) -> None:
    for n in (4, len(memory)):
        groups = torch.arange(len(memory), device=bench.device).view(-1, n)
        times = bench.times_s(
            lambda i, groups=groups: chunk_ops.slot_checksums(memory, groups[i]), len(groups), graph=True
        )
        nbytes = n * memory.shape[1]
        bench.add("slot_checksums", f"{n} x {memory.shape[1] >> 10} KiB, {where}", memory.dtype, times, nbytes=nbytes)


def bench_fp8(bench: Bench) -> None:
    """Whole chunks to fp8 and back, and new tokens into fp8 chunks: bytes read and written."""
    _, wide, _ = make_rows(bench, torch.bfloat16)
    _, small, scale = make_rows(bench, FP8)
    order = torch.randperm(len(wide), device=bench.device)
    nbytes = wide.numel() * 3
    shape = f"{len(wide)} chunks"
    times = bench.times_s(lambda _: chunk_ops.quantize_chunks(wide, order, small, scale, order))
    bench.add("quantize_chunks", shape, wide.dtype, times, nbytes=nbytes)
    times = bench.times_s(lambda _: chunk_ops.dequantize_chunks(small, scale, order, wide, order))
    bench.add("dequantize_chunks", shape, wide.dtype, times, nbytes=nbytes)
    for tokens, per_chunk in ((len(small), 1), (len(small) * CHUNK_TOKENS, CHUNK_TOKENS)):
        k, v = (torch.randn(tokens, *small.shape[3:6:2], device=bench.device).bfloat16() for _ in range(2))
        slots = order.repeat_interleave(per_chunk)
        offsets = torch.arange(per_chunk, device=bench.device).repeat(len(order))
        store = partial(ops.store_kv, k, v, slots=slots, offsets=offsets)
        for name, pool, options in (("store_kv", wide, {}), ("store_kv, fp8", small, {"scale": scale})):

            def call(layer: int, store=store, pool=pool, options=options) -> None:  # type: ignore[no-untyped-def]
                store(kv=pool, layer=layer, **options)

            times = bench.times_s(call, small.shape[1], graph=bench.on_gpu)
            written = k.numel() * (2 + pool.dtype.itemsize) * 2
            bench.add(name, f"{tokens} tokens, {per_chunk} a chunk", pool.dtype, times, nbytes=written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    parser.add_argument("--sweep", action="store_true", help="search decode settings (CUDA only)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.sweep and device.type != "cuda":
        parser.error("--sweep needs a CUDA GPU: the settings are Triton's")
    bench = Bench(device, args.quick)
    best: dict[str, object] = {}
    path = args.out / f"kernels{'-sweep' if args.sweep else ''}-{device.type}.csv"
    bench_copy(bench)
    if args.sweep:
        from decode_sweep import sweep  # needs Triton, which the rest does without on a CPU

        best = {name: asdict(config) for name, config in sweep(bench).items()}
    else:
        for run in (bench_decode, bench_merge, bench_prefill, bench_rows, bench_fp8):
            run(bench)
            bench.write(path)  # as far as it went, should the rest not end in time
    bench.write(path)
    summary = {f"{r.name} {r.shape} {r.dtype}": {"value": r.value, "unit": r.unit} for r in bench.rows}
    print(json.dumps({"gpu": bench.gpu, "csv": str(path), "best": best, "results": {} if args.sweep else summary}))


if __name__ == "__main__":
    main()
