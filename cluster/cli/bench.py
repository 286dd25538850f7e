"""`forecache bench`: measure this machine."""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from forecache.cluster.cli import bench_serve
from forecache.cluster.cli.arguments import Parser, output_folder, positive, ratio
from forecache.workers.evaluation.bench_decode import Measured, PairResult, Settings, Timings, measure
from forecache.workers.evaluation.bench_turns import BASELINE

MIB = 2**20
GOAL_CONTEXT = 8192
GOAL_KEEP_RATIO = 0.135
GOALS = {"decode": 1.5, "prefill": 0.85}
"""Speed over transformers' that forecache sets out to reach at the two values above."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Rates in tokens/s; p20 is a slow one, p80 a fast one.

    ``turn`` names the way of forecache that took turns with ``system``; ``of_transformers`` is the ratio of their
    median times in these turns.
    """

    system: str
    turn: str
    phase: str
    p20_tokens_per_s: float
    p50_tokens_per_s: float
    p80_tokens_per_s: float
    mean_tokens_per_s: float
    of_transformers: float
    p50_s: float
    samples: int
    kept_ratio: float
    resident_bytes: int
    context_bytes: int
    same_tokens: int
    model: str
    context: int
    new_tokens: int
    dtype: str
    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    transformers: str
    date: str


def main(argv: list[str]) -> int:
    """Run one benchmark; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.benchmark == "serve":
        return bench_serve.run(args)
    settings = Settings(
        model=args.model,
        context=args.context,
        keep_ratio=args.keep_ratio,
        tokens=args.tokens,
        repeat=args.repeat,
        threads=args.threads,
    )
    bench_decode(settings, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="forecache bench", description="Measure this machine.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
    serve = benchmarks.add_parser(
        "serve",
        help="load on a running server",
        description="Asks a running server as many clients would, and tells what they see: throughput, time to first "
        "token, gaps between tokens, goodput under an SLO, keep ratio, and how much of the prompts was in the cache.",
    )
    bench_serve.add_arguments(serve, positive, ratio)
    decode = benchmarks.add_parser(
        "decode",
        help="prefill and decode beside transformers' own generate",
        description="Prefill and decode of one long prompt by forecache, at a keep ratio and with everything kept, in "
        "turns of a few tokens with transformers' generate (sdpa, greedy, KV cache) on the same prompt.",
    )
    default = Settings()
    decode.add_argument("--model", default=default.model, help="built-in name, directory or hub id")
    decode.add_argument("--context", type=positive, default=default.context, help="prompt tokens (default: 8192)")
    decode.add_argument("--keep-ratio", type=ratio, default=default.keep_ratio, help="resident / all chunks (0.135)")
    decode.add_argument("--tokens", type=positive, default=default.tokens, help="measured decode steps (default: 64)")
    decode.add_argument("--repeat", type=positive, default=default.repeat, help="prompts of each (default: 3)")
    decode.add_argument("--threads", type=positive, help="CPU threads of each model (default: all cores)")
    decode.add_argument("--out", type=output_folder, help="folder for the CSV file (default: none is written)")
    return parser


def bench_decode(settings: Settings, out: Path | None) -> None:
    """Measure, print a table, write the rows to ``out``, and print a last line of JSON."""
    measured = _measure_with_progress(settings)
    rows = to_rows(settings, measured)
    console = Console()
    console.print(_table(rows))
    for line in _verdicts(settings, rows):
        console.print(line)
    path = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"decode-{measured.device}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    print(json.dumps(_summary(rows, path)))


def _measure_with_progress(settings: Settings) -> Measured:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        return measure(settings, progress=lambda text, done: bar.update(task, description=text, completed=done))


def to_rows(settings: Settings, measured: Measured) -> list[Row]:
    """For each way of forecache four rows: prefill and decode of transformers, then its own."""
    common: dict[str, Any] = {
        "model": settings.model,
        "context": settings.context,
        "dtype": measured.dtype,
        "processor": processor(measured.device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": measured.threads,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [
        _row(pair, system, phase, settings.context, common)
        for pair in measured.pairs
        for system in (BASELINE, "forecache")
        for phase in ("prefill", "decode")
    ]


def _row(pair: PairResult, system: str, phase: str, prompt_tokens: int, common: dict[str, Any]) -> Row:
    timings = pair.transformers if system == BASELINE else pair.forecache
    durations_s, reference_s = (_of_phase(x, phase) for x in (timings, pair.transformers))
    tokens = prompt_tokens if phase == "prefill" else 1
    slow, middle, fast = (quantile(durations_s, q) for q in (0.8, 0.5, 0.2))
    partial = system != BASELINE and phase == "decode"
    return Row(
        system=system,
        turn=pair.name,
        phase=phase,
        p20_tokens_per_s=round(tokens / slow, 2),
        p50_tokens_per_s=round(tokens / middle, 2),
        p80_tokens_per_s=round(tokens / fast, 2),
        mean_tokens_per_s=round(tokens / statistics.fmean(durations_s), 2),
        of_transformers=round(quantile(reference_s, 0.5) / middle, 3),
        p50_s=round(middle, 5),
        samples=len(durations_s),
        kept_ratio=round(pair.kept_ratio, 4) if partial else 1.0,
        resident_bytes=pair.transformers_bytes if system == BASELINE else pair.resident_bytes,
        context_bytes=pair.transformers_bytes if system == BASELINE else pair.context_bytes,
        same_tokens=pair.new_tokens if system == BASELINE else pair.same_tokens,
        new_tokens=pair.new_tokens,
        **common,
    )


def _of_phase(timings: Timings, phase: str) -> tuple[float, ...]:
    return timings.prefill_s if phase == "prefill" else timings.step_s


def quantile(values: Sequence[float], q: float) -> float:
    """The quantile ``q`` of ``values``, between two of them where it falls there."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def processor(device: str) -> str:
    """Name of the CPU or GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(rows: list[Row]) -> Table:
    prefills, decodes = rows[::2], rows[1::2]
    first = rows[0]
    table = Table(
        title=f"{first.model}, {first.context} tokens, {first.dtype}; {first.processor}, {first.threads} threads",
        caption="decode: percentiles over single steps; same tokens: leading ones equal to transformers'",
    )
    table.add_column("")
    for row in decodes:
        table.add_column(row.system if row.system == BASELINE else f"{row.system}\n{row.turn}", justify="right")
    table.add_row("prefill s", *(f"{row.p50_s:.2f}" for row in prefills))
    table.add_row("prefill tok/s", *(f"{row.p50_tokens_per_s:.0f}" for row in prefills))
    table.add_row("  of transformers", *(f"{row.of_transformers:.2f}x" for row in prefills), end_section=True)
    table.add_row("decode tok/s p20", *(f"{row.p20_tokens_per_s:.1f}" for row in decodes))
    table.add_row("  p50", *(f"{row.p50_tokens_per_s:.1f}" for row in decodes))
    table.add_row("  p80", *(f"{row.p80_tokens_per_s:.1f}" for row in decodes))
    table.add_row("  mean", *(f"{row.mean_tokens_per_s:.1f}" for row in decodes))
    table.add_row("  of transformers", *(f"{row.of_transformers:.2f}x" for row in decodes), end_section=True)
    table.add_row("chunks kept", *(f"{row.kept_ratio:.3f}" for row in decodes))
    table.add_row("KV resident MiB", *(f"{row.resident_bytes / MIB:.1f}" for row in decodes))
    table.add_row("KV full MiB", *(f"{row.context_bytes / MIB:.1f}" for row in decodes))
    table.add_row("same tokens", *(f"{row.same_tokens} of {row.new_tokens}" for row in decodes))
    return table


def _verdicts(settings: Settings, rows: list[Row]) -> list[str]:
    """The goals beside what was measured, where that is what they are set for."""
    if (settings.context, settings.keep_ratio) != (GOAL_CONTEXT, GOAL_KEEP_RATIO):
        return []
    reached = {row.phase: row.of_transformers for row in rows[2:4]}
    return [
        f"{phase}: {reached[phase]:.2f}x transformers, goal {goal}x, "
        f"{'reached' if reached[phase] >= goal else 'not reached'}"
        for phase, goal in GOALS.items()
    ]


def _summary(rows: list[Row], path: Path | None) -> dict[str, Any]:
    results = {
        f"{row.system} {row.phase} ({row.turn})": {
            "p50_tokens_per_s": row.p50_tokens_per_s,
            "mean_tokens_per_s": row.mean_tokens_per_s,
            "of_transformers": row.of_transformers,
        }
        for row in rows
    }
    return {"csv": None if path is None else str(path), "results": results}
