"""Speed of the kernels: bandwidth of copies, decode and gather, TFLOP/s of prefill, and a sweep of settings.

    python tests/benchmarks/bench_kernels.py --out DIR            # all measurements, as CSV
    python tests/benchmarks/bench_kernels.py --sweep --out DIR    # settings for kernels/tuning.py
    python tests/benchmarks/bench_kernels.py --device cpu --quick --out DIR

A row's time is that of one call. Launches are captured in a CUDA graph, and successive calls read different
layers, so that neither Python nor the cache is measured. The last line printed is JSON.
"""

import argparse
import csv
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from forecache.kernels import ops, prefill, tuning
from forecache.kernels.tuning import DecodeConfig

CHUNK_TOKENS = 64
CACHE_BYTES = 512 << 20  # a rotation over more than this leaves nothing in any GPU's L2
Decode = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds of one call, ``value`` from the median."""

    name: str
    shape: str
    dtype: str
    settings: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    value: float
    unit: str
    of_copy: float | None
    gpu: str
    torch: str
    triton: str
    date: str


@dataclass(frozen=True)
class DecodeShape:
    batch: int
    context_tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer_bytes(self) -> int:
        """Bytes of keys and values that one call reads."""
        row = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        return self.batch * self.context_tokens * row

    def __str__(self) -> str:
        return f"{self.batch}x{self.context_tokens} h{self.heads}/{self.kv_heads} d{self.head_dim}"


class Bench:
    """Times calls on one device and collects rows."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.rows: list[Row] = []
        self.copy_bytes_per_s = math.nan
        on_gpu = device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu"
        self.triton = __import__("triton").__version__ if on_gpu else "not used"

    def times_s(self, call: Callable[[int], object], calls: int = 1, graph: bool = False) -> list[float]:
        """Seconds of one call, sorted; ``call(i)`` runs with ``i`` from 0 to ``calls - 1`` in turn."""

        def run() -> None:
            for i in range(calls):
                call(i)

        for _ in range(2):
            run()
        if self.device.type != "cuda":
            return sorted(self._clock_s(run) / calls for _ in range(3 if self.quick else 15))
        torch.cuda.synchronize()
        replay = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            replay = captured.replay
            replay()
        marks = [torch.Event(self.device, enable_timing=True) for _ in range(10 if self.quick else 50)]
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        for start, stop in pairs:
            start.record()
            replay()
            stop.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(stop) / 1e3 / calls for start, stop in pairs)

    @staticmethod
    def _clock_s(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def add(
        self, name: str, shape: object, dtype: torch.dtype, times_s: list[float], *, nbytes: float = 0, flop: float = 0,
        settings: object = "",
    ) -> Row:  # fmt: skip
        """Record a row: bytes per second in GB/s, or floating-point operations per second in TFLOP/s."""
        p20, p50, p80 = (times_s[min(len(times_s) - 1, int(q * len(times_s)))] for q in (0.2, 0.5, 0.8))
        row = Row(
            name=name,
            shape=str(shape),
            dtype=str(dtype).removeprefix("torch."),
            settings=str(settings),
            p20_ms=round(p20 * 1e3, 5),
            p50_ms=round(p50 * 1e3, 5),
            p80_ms=round(p80 * 1e3, 5),
            value=round(nbytes / p50 / 1e9 if nbytes else flop / p50 / 1e12, 3),
            unit="GB/s" if nbytes else "TFLOP/s",
            of_copy=round(nbytes / p50 / self.copy_bytes_per_s, 4) if nbytes else None,
            gpu=self.gpu,
            torch=torch.__version__,
            triton=self.triton,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.rows.append(row)
        share = f"{row.of_copy:7.1%} of copy" if row.of_copy is not None else ""
        print(f"{name:16} {row.shape:28} {row.dtype:14} {row.p50_ms:10.4f} ms {row.value:9.1f} {row.unit} {share}")
        return row

    def free_bytes(self) -> int:
        if self.device.type != "cuda":
            return 2 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def bench_copy(bench: Bench) -> None:
    """Copy on the device, read and write counted: what a memory-bound kernel is compared with."""
    nbytes = 64 << 20 if bench.device.type == "cpu" else 2 << 30
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times = bench.times_s(lambda _: target.copy_(source))
    bench.copy_bytes_per_s = 2 * nbytes / statistics.median(times)
    bench.add("copy", f"{nbytes >> 20} MiB", torch.uint8, times, nbytes=2 * nbytes)


@dataclass(frozen=True)
class DecodeInputs:
    q: Tensor
    kv: Tensor
    layers: Tensor
    table: Tensor
    lens: Tensor
    scales: Tensor | None

    @staticmethod
    def make(shape: DecodeShape, device: torch.device, cache_bytes: int) -> "DecodeInputs":
        chunks = shape.context_tokens // CHUNK_TOKENS
        slots = shape.batch * chunks
        layers = min(32, -(-cache_bytes // shape.layer_bytes))
        kv = torch.empty(
            (slots, layers, 2, shape.kv_heads, CHUNK_TOKENS, shape.head_dim), dtype=shape.dtype, device=device
        )
        for rows in torch.split(kv, 64):  # in pieces: random numbers are made in float32
            rows.copy_(torch.randn(rows.shape, device=device))
        q_dtype = torch.bfloat16 if shape.dtype.itemsize == 1 else shape.dtype
        scaled = shape.dtype.itemsize == 1
        return DecodeInputs(
            q=torch.randn(shape.batch, shape.heads, shape.head_dim, device=device).to(q_dtype),
            kv=kv,
            layers=torch.arange(layers, device=device),
            table=torch.randperm(slots, device=device).view(shape.batch, chunks).int(),
            lens=torch.full((shape.batch,), shape.context_tokens, dtype=torch.int32, device=device),
            scales=torch.rand(slots, layers, shape.kv_heads, device=device) if scaled else None,
        )

    def call(self, decode: Decode, i: int) -> tuple[Tensor, Tensor]:
        scale = self.q.shape[-1] ** -0.5
        scales = {"k_scale": self.scales, "v_scale": self.scales}
        return decode(self.q, self.kv, self.layers[i], self.table, self.lens, scale, **scales)


def decode_shapes(bench: Bench) -> Iterator[DecodeShape]:
    if bench.quick:
        yield DecodeShape(1, 1024, dtype=torch.float32 if bench.device.type == "cpu" else torch.bfloat16)
        yield DecodeShape(4, 1024)
        return
    for batch, context in itertools.product((1, 4, 16, 64), (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10)):
        yield DecodeShape(batch, context)
    for batch, context in itertools.product((1, 16), (4 << 10, 32 << 10)):
        yield DecodeShape(batch, context, kv_heads=1)
        yield DecodeShape(batch, context, dtype=torch.float8_e4m3fn)
        yield DecodeShape(batch, context, heads=9, kv_heads=3, head_dim=64)
        yield DecodeShape(batch, context, heads=24, kv_heads=8, head_dim=96)
        yield DecodeShape(batch, context, heads=8, kv_heads=4, head_dim=256)


def bench_decode(bench: Bench) -> None:
    for shape in decode_shapes(bench):
        if shape.layer_bytes > 0.8 * bench.free_bytes():
            print(f"sparse_decode    {shape}: left out, {shape.layer_bytes >> 30} GiB do not fit")
            continue
        inputs = DecodeInputs.make(shape, bench.device, CACHE_BYTES if bench.device.type == "cuda" else 1)
        calls = len(inputs.layers)
        times = bench.times_s(partial(inputs.call, ops.sparse_decode), calls, graph=True)
        bench.add("sparse_decode", shape, shape.dtype, times, nbytes=shape.layer_bytes)
        del inputs, times


def bench_merge(bench: Bench) -> None:
    rows = 1 << (12 if bench.quick else 18)
    out_a, out_b = (torch.randn(rows, 128, device=bench.device) for _ in range(2))
    lse_a, lse_b = (torch.randn(rows, device=bench.device) for _ in range(2))
    times = bench.times_s(lambda _: ops.merge_partials(out_a, lse_a, out_b, lse_b))
    bench.add("merge_partials", f"{rows}x128", out_a.dtype, times, nbytes=3 * out_a.nbytes)


def bench_prefill(bench: Bench) -> None:
    heads, kv_heads, head_dim = 32, 8, 128
    tokens, keys = (256, 1024) if bench.quick else (8192, 131072)
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    for n, causal in ((tokens, True), (tokens, False), (keys, False)):
        q = torch.randn(tokens, heads, head_dim, device=bench.device).to(dtype)
        k, v = (torch.randn(kv_heads, n, head_dim, device=bench.device).to(dtype) for _ in range(2))

        def attend(_: int, q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> object:
            return prefill.attend_block(q, k, v, q.shape[2] ** -0.5, causal=causal)

        times = bench.times_s(attend)
        flop = 4 * tokens * n * heads * head_dim * (0.5 if causal else 1)
        bench.add("attend_block", f"{tokens}x{n}{' causal' if causal else ''}", dtype, times, flop=flop)


def bench_gather(bench: Bench) -> None:
    """One layer of many chunks, from the device's own memory and from pinned host memory."""
    slots, layers = (8, 2) if bench.quick else (512, 8)
    for pinned in (False, True) if bench.device.type == "cuda" else (False,):
        host = torch.randn(slots, layers, 2, 8, CHUNK_TOKENS, 128).to(torch.bfloat16)
        kv = host.pin_memory() if pinned else host.to(bench.device)
        order = torch.randperm(slots, device=bench.device)

        def gather(i: int, kv: Tensor = kv, order: Tensor = order) -> object:
            return ops.gather_layer(kv, i, order)

        times = bench.times_s(gather, layers)
        nbytes = kv.nbytes // layers
        where = "pinned host" if pinned else "device"
        bench.add("gather_layer", f"{slots} chunks, {where}", kv.dtype, times, nbytes=nbytes * (1 if pinned else 2))


def sweep(bench: Bench) -> dict[str, dict[str, int]]:
    """The best settings for each kind of pool: smallest geometric mean of the times over batches."""
    from triton.runtime.errors import OutOfResources

    from forecache.kernels import sparse_decode as triton_kernel

    kinds = [
        DecodeShape(1, 16 << 10),
        DecodeShape(1, 16 << 10, dtype=torch.float8_e4m3fn),
        DecodeShape(1, 16 << 10, heads=32, kv_heads=1),
        DecodeShape(1, 16 << 10, heads=9, kv_heads=3, head_dim=64),
        DecodeShape(1, 16 << 10, heads=8, kv_heads=4, head_dim=256),
        DecodeShape(1, 16 << 10, dtype=torch.float32),
    ]
    best = {}
    for kind in kinds[:1] if bench.quick else kinds:
        shapes = [DecodeShape(**{**vars(kind), "batch": batch}) for batch in (1, 8, 64)]
        inputs = [DecodeInputs.make(shape, bench.device, CACHE_BYTES) for shape in shapes]
        results = []
        for block, warps, stages in itertools.product((32, 64), (4, 8), (2, 3, 4, 5)):
            block_bytes = 2 * block * kind.head_dim * kind.dtype.itemsize
            for programs in (1, 2, 3, 4, 6, 8):
                if programs > 1 and min(programs, 2) * block_bytes * (stages - 1) > 220 << 10:
                    continue  # more programs than shared memory holds are waves, and measured as such
                config = DecodeConfig(block, warps, stages, programs)
                decode = partial(triton_kernel.sparse_decode, config=config)
                try:
                    times = [bench.times_s(partial(x.call, decode), len(x.layers), graph=True) for x in inputs]
                except OutOfResources as error:
                    print(f"{kind} {config}: {error}")
                    continue
                medians = [statistics.median(t) for t in times]
                results.append((statistics.geometric_mean(medians), config, medians))
        results.sort(key=lambda result: result[0])
        name = f"{kind.dtype} d{kind.head_dim} group {kind.heads // kind.kv_heads}".removeprefix("torch.")
        tuned = tuning.decode_config(
            kind.dtype, kind.head_dim, kind.heads // kind.kv_heads, tuning.gpu_family(bench.device)
        )
        for mean_s, config, medians in results[:5] + [r for r in results[5:] if r[1] == tuned]:
            mark = "  <- tuning.py" if config == tuned else ""
            rates = ", ".join(f"{s.layer_bytes / t / 1e9:.0f}" for s, t in zip(shapes, medians, strict=True))
            print(f"{name:32} {mean_s * 1e6:8.1f} us  {rates} GB/s  {config}{mark}")
        for shape, seconds in zip(shapes, results[0][2], strict=True):
            bench.add("sweep best", shape, shape.dtype, [seconds], nbytes=shape.layer_bytes, settings=results[0][1])
        best[name] = asdict(results[0][1])
    return best


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
    best = {}
    bench_copy(bench)
    if args.sweep:
        best = sweep(bench)
    else:
        for run in (bench_decode, bench_merge, bench_prefill, bench_gather):
            run(bench)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"kernels{'-sweep' if args.sweep else ''}-{device.type}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(bench.rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in bench.rows)
    summary = {f"{r.name} {r.shape} {r.dtype}": {"value": r.value, "unit": r.unit} for r in bench.rows}
    print(json.dumps({"gpu": bench.gpu, "csv": str(path), "best": best, "results": summary}))


if __name__ == "__main__":
    main()
