"""Timing of kernels for `bench_kernels.py`: rows, clocks, and the inputs of decode attention."""

import csv
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class Bench:
    """Times calls on one device and collects rows."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.rows: list[Row] = []
        self.copy_bytes_per_s = math.nan
        self.on_gpu = device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if self.on_gpu else platform.processor() or "cpu"
        self.triton = __import__("triton").__version__ if self.on_gpu else "not used"

    def times_s(self, call: Callable[[int], object], calls: int = 1, graph: bool = False) -> list[float]:
        """Seconds of one call, sorted; ``call(i)`` runs with ``i`` from 0 to ``calls - 1`` in turn."""

        def run() -> None:
            for i in range(calls):
                call(i)

        for _ in range(2):
            run()
        if not self.on_gpu:
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
        settings: object = "", quiet: bool = False,
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
        if not quiet:
            print(f"{name:24} {row.shape:34} {row.dtype:14} {row.p50_ms:10.4f} ms {row.value:9.1f} {row.unit} {share}")
        return row

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def free_bytes(self) -> int:
        if not self.on_gpu:
            return 2 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


@dataclass(frozen=True)
class DecodeShape:
    """``context_tokens`` of each sequence; with ``ragged`` their mean, the first sequence having half of all."""

    batch: int
    context_tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False

    def lens(self) -> list[int]:
        tokens = self.batch * self.context_tokens
        if not self.ragged:
            return [self.context_tokens] * self.batch
        return [tokens // 2] + [tokens // 2 // (self.batch - 1)] * (self.batch - 1)

    @property
    def layer_bytes(self) -> int:
        """Bytes of keys and values that one call reads."""
        return sum(self.lens()) * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.context_tokens} h{self.heads}/{self.kv_heads} d{self.head_dim}"
        return f"{shape} ragged" if self.ragged else shape


@dataclass(frozen=True)
class DecodeInputs:
    """A pool with every layer's keys and values, and one step's arguments."""

    q: Tensor
    kv: Tensor
    layers: Tensor
    table: Tensor
    lens: Tensor
    scales: Tensor | None

    @staticmethod
    def make(shape: DecodeShape, device: torch.device, cache_bytes: int) -> "DecodeInputs":
        """With as many layers as are needed to read ``cache_bytes`` before any of it is read again, 32 at most."""
        chunks = [-(-length // CHUNK_TOKENS) for length in shape.lens()]
        slots = sum(chunks)
        layers = min(32, -(-cache_bytes // shape.layer_bytes))
        kv = torch.empty(
            (slots, layers, 2, shape.kv_heads, CHUNK_TOKENS, shape.head_dim), dtype=shape.dtype, device=device
        )
        for rows in torch.split(kv, 64):  # in pieces: random numbers are made in float32
            rows.copy_(torch.randn(rows.shape, device=device))
        scaled = shape.dtype.itemsize == 1
        q = torch.randn(shape.batch, shape.heads, shape.head_dim, device=device)
        table = torch.zeros(shape.batch, max(chunks), dtype=torch.int32, device=device)
        for row, own in zip(table, torch.randperm(slots, device=device).int().split(chunks), strict=True):
            row[: len(own)] = own
        return DecodeInputs(
            q=q.to(torch.bfloat16 if scaled else shape.dtype),
            kv=kv,
            layers=torch.arange(layers, device=device),
            table=table,
            lens=torch.tensor(shape.lens(), dtype=torch.int32, device=device),
            scales=torch.rand(slots, layers, 2, shape.kv_heads, device=device) if scaled else None,
        )

    def call(self, decode: Decode, i: int) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {}
        if self.scales is not None:
            options = {"k_scale": self.scales[:, :, 0], "v_scale": self.scales[:, :, 1]}
        return decode(self.q, self.kv, self.layers[i], self.table, self.lens, self.q.shape[-1] ** -0.5, **options)
