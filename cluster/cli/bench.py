"""`forecache bench`: benchmarks of this machine, and of a running server."""

import argparse
import asyncio
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
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from forecache.cluster.cli import load_test
from forecache.cluster.cli.command_line import Parser, above_zero, at_least_zero, output_folder, positive, ratio
from forecache.cluster.cli.load_workloads import Workload, WorkloadSettings
from forecache.cluster.tenants import read_key
from forecache.workers.evaluation.bench_decode import BASELINE, Measured, PairResult, Settings, Timings, measure

MIB = 2**20
GOAL_CONTEXT = 8192
GOAL_KEEP_RATIO = 0.135
GOALS = {"decode": 1.5, "prefill": 0.85}
"""Goals for the speed relative to transformers, at the context and keep ratio above."""
MIXED_INPUT_TOKENS = 2048
MIXED_RATE_PER_S = 1.0
"""Defaults of `bench serve --workload mixed`."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Rates are in tokens/s: p20 is slow, p80 is fast.

    ``turn``: the forecache setting that took turns with ``system``; ``of_transformers``: speed relative to
    transformers in these turns, by median times.
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
    """Run one benchmark. Returns the exit status."""
    args = _parser().parse_args(argv)
    if args.benchmark == "serve":
        return bench_serve(args)
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
    parser = Parser(prog="forecache bench", description="Benchmarks of this machine, and of a running server.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
    serve = benchmarks.add_parser(
        "serve",
        help="put load on a running server",
        description="Sends requests to a running server as many clients would, and reports what they see: throughput, "
        "time "
        "to first token, gaps between tokens, goodput under an SLO, keep ratio, and the cached share of the prompts.",
    )
    _add_serve_flags(serve)
    decode = benchmarks.add_parser(
        "decode",
        help="compare prefill and decode with transformers' generate",
        description="Measures prefill and decode of one long prompt with forecache, at a keep ratio and with full "
        "attention. transformers' generate (sdpa, greedy, KV cache) runs the same prompt in turns of a few tokens.",
    )
    default = Settings()
    decode.add_argument("--model", default=default.model, help="built-in name, directory or hub id")
    decode.add_argument("--context", type=positive, default=default.context, help="prompt tokens (default: 8192)")
    decode.add_argument(
        "--keep-ratio", type=ratio, default=default.keep_ratio, help="resident / all chunks (default: 0.135)"
    )
    decode.add_argument("--tokens", type=positive, default=default.tokens, help="decode steps to measure (default: 64)")
    decode.add_argument("--repeat", type=positive, default=default.repeat, help="repetitions (default: 3)")
    decode.add_argument("--threads", type=positive, help="CPU threads of each model (default: all cores)")
    decode.add_argument("--out", type=output_folder, help="directory for the CSV file (default: write none)")
    return parser


def bench_decode(settings: Settings, out: Path | None) -> None:
    """Measure, print a table, write the rows to the directory ``out``, and print a summary as one line of JSON."""
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
    """Four rows per forecache setting: prefill and decode of transformers, then of forecache."""
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
    """The quantile ``q`` (0 to 1) of ``values``, linearly interpolated."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def processor(device: str) -> str:
    """Name of the CPU or GPU of this machine."""
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
        caption="decode: percentiles of single steps; same tokens: leading tokens equal to transformers'",
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
    """The measured speeds against the goals; none for another context or keep ratio than theirs."""
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


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `forecache bench serve`."""
    workload = WorkloadSettings()
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000/v1", help="URL of the API (default: http://127.0.0.1:8000/v1)"
    )
    parser.add_argument("--model", required=True, help="name of the model on the server")
    parser.add_argument("--api-key-file", type=Path, help="file with the API key, if the server requires one")
    parser.add_argument(
        "--allow-remote", action="store_true", help="allow load on a server that is not on this machine"
    )
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--rate",
        type=above_zero,
        help="open loop: conversations that start per second, as a Poisson process (default for the workload mixed: 1)",
    )
    loop.add_argument("--concurrency", type=positive, help="closed loop: number of concurrent clients (default: 4)")
    parser.add_argument("--conversations", type=positive, default=32, help="number of conversations (default: 32)")
    parser.add_argument(
        "--workload",
        choices=get_args(Workload),
        default=workload.workload,
        help="unique: one document each; shared-prefix: documents that requests share, with a question each; "
        "multi-turn: a document, then questions; agentic: sessions that share a system prompt and grow by short "
        "results of tools; mixed: short chats and long documents (default: unique)",
    )
    parser.add_argument(
        "--input-tokens",
        type=positive,
        help="tokens of a document, of the first message of a session, or of the shortest prompt of the workload mixed "
        "(default: 1024; mixed: 2048)",
    )
    parser.add_argument(
        "--question-tokens",
        type=positive,
        default=workload.question_tokens,
        help="tokens of a question, or of a tool's result, which has half to one and a half times as many (default: "
        "64)",
    )
    parser.add_argument("--output-tokens", type=positive, default=64, help="tokens of each answer (default: 64)")
    parser.add_argument(
        "--prefixes",
        type=positive,
        default=workload.prefixes,
        help="documents of the workload shared-prefix (default: 4)",
    )
    parser.add_argument(
        "--turns",
        type=positive,
        default=workload.turns,
        help="turns of a conversation of the workloads multi-turn and agentic (default: 4)",
    )
    parser.add_argument(
        "--system-tokens",
        type=positive,
        default=workload.system_tokens,
        help="tokens of the system prompt of the workload agentic (default: 1024)",
    )
    parser.add_argument(
        "--document-tokens",
        type=positive,
        default=workload.document_tokens,
        help="tokens of the longest document of the workload mixed; the shortest has half as many (default: 32768)",
    )
    parser.add_argument(
        "--document-share",
        type=ratio,
        default=workload.document_share,
        help="share of the requests of the workload mixed that are documents (default: 0.25)",
    )
    parser.add_argument(
        "--pause-s",
        type=at_least_zero,
        default=workload.pause_s,
        help="mean seconds between an answer and the next turn, exponentially distributed (default: 0)",
    )
    parser.add_argument(
        "--keep-ratio", type=ratio, help="resident / all chunks, for a forecache server; default: the server's"
    )
    parser.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="answers may end early: requests have no ignore_eos, which OpenAI's own API refuses",
    )
    parser.add_argument(
        "--slo-first-token-s", type=above_zero, default=2.0, help="SLO: longest time to first token (default: 2)"
    )
    parser.add_argument(
        "--slo-inter-token-s", type=above_zero, default=0.1, help="SLO: longest mean time between tokens (default: 0.1)"
    )
    parser.add_argument(
        "--timeout-s", type=above_zero, default=600.0, help="longest silence of the server (default: 600)"
    )
    parser.add_argument("--seed", type=int, default=workload.seed, help="seed of texts and arrivals (default: 0)")
    parser.add_argument(
        "--out", type=output_folder, help="directory for serve.json and serve.png (default: write none)"
    )


def bench_serve(args: argparse.Namespace) -> int:
    """Run the load, print a table and the figures as one line of JSON, and write the files.

    Returns 1 if a request failed without being refused, else 0.
    """
    if not args.allow_remote:
        load_test.check_loopback(args.url)
    key = read_key(args.api_key_file)
    target = load_test.Target(
        args.url.rstrip("/"),
        args.model,
        key,
        args.output_tokens,
        args.keep_ratio,
        args.timeout_s,
        ignore_eos=not args.stop_at_eos,
    )
    mixed = args.workload == "mixed"
    workload = WorkloadSettings(
        workload=args.workload,
        input_tokens=args.input_tokens or (MIXED_INPUT_TOKENS if mixed else WorkloadSettings.input_tokens),
        question_tokens=args.question_tokens,
        prefixes=args.prefixes,
        turns=args.turns,
        system_tokens=args.system_tokens,
        document_tokens=args.document_tokens,
        document_share=args.document_share,
        pause_s=args.pause_s,
        seed=args.seed,
    )
    rate = args.rate
    if rate is None and args.concurrency is None and mixed:
        rate = MIXED_RATE_PER_S
    concurrency = None if rate is not None else args.concurrency or 4
    answers = asyncio.run(load_test.make_load(target, workload, args.conversations, rate, concurrency))
    slo = load_test.Slo(args.slo_first_token_s, args.slo_inter_token_s)
    summary = load_test.summarize(answers, slo)
    console = Console()
    loop = f"{rate:g} a second" if concurrency is None else f"{concurrency} at once"
    console.print(load_test.table(summary, f"{args.model}: {args.workload}, {loop}"))
    for answer in [answer for answer in answers if answer.error and answer.status not in (429, 503)][:3]:
        console.print(f"failed: {answer.error}", markup=False)
    settings = {
        **asdict(workload), "rate": rate, "concurrency": concurrency, "slo": asdict(slo),
        **{name: value for name, value in asdict(target).items() if name != "api_key"},
    }  # fmt: skip
    report = load_test.as_json(summary, settings, answers)
    print(json.dumps({"workload": args.workload, **report["summary"]}))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serve.json").write_text(json.dumps(report), encoding="utf-8")
        load_test.plot(args.out / "serve.png", answers, slo)
    return 1 if summary.failed else 0
