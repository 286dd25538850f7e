"""Whole workloads through forecache and, where it is importable, through vLLM, one after the other on one device.

    python tests/benchmarks/bench_workloads.py --out FILE.json --rows 64x2048+256 8x32768+256 4x131072+256
    python tests/benchmarks/bench_workloads.py --out FILE.json --rows sessions --gpu-gib 70
    python tests/benchmarks/bench_workloads.py --out FILE.json --rows mixed [--bisect-runs 3]
    python tests/benchmarks/bench_workloads.py --out FILE.json --table
    python tests/benchmarks/bench_workloads.py --out FILE.json --sizes small --shape tiny

The last one takes a minute on a CPU; `--table` measures nothing and prints what FILE.json has.

Rows:

- `REQUESTSxPROMPT+ANSWER`: so many unique prompts, all sent at once.
- `sessions`: 12 sessions, all at once. The first turn has 65,536 tokens of history and 256 new ones; five more turns
  add 256 each; every answer has 256. Both engines are held to `--gpu-gib` of GPU memory. vLLM gets CPU memory for all
  K/V of the row (`--offload-gib`); forecache keeps K/V in CPU memory anyway.
- `mixed`: 128 requests as a Poisson process: three quarters chats of 2K to 4K tokens, one quarter documents of 16K to
  32K, answers of 256. The rate is `--rate-share` of what vLLM sustains. That is requests over seconds when all are sent
  at once, which a short run understates; `--bisect-runs` then searches upward for the rate at which the queue grows.
  Without vLLM it is forecache's own.

- `STREAMS@PROMPT`, such as `32@32768`: a prompt that is sent when so many streams decode (512 tokens each, answers of
  2,048): its first token, and the gaps between tokens of the streams before and during its prefill. `1x32768+1` is the
  same prompt alone. A target for the time between tokens is a setting of forecache: `--set`, and another `--out`.

The model has random weights in the shape of Llama-3.1-8B (`--shape`), or is `--model`. Answers ignore the end of
sequence. forecache has a column for each of `--keep-ratios`; 1 has everything resident. Every other setting is each
engine's default (vLLM: that of its server), unless `--set` or `--vllm-set` say otherwise. A row's time runs from the
first request to the last token, prefill included; start and warm-up are reported apart.

Each engine runs in a process of its own, which starts once for the rows that share its memory limits. FILE.json is
complete after every row; a later call with the same FILE measures only what is missing, so calls can be short
(`--time-limit-s`: no row starts after it). `--again` measures the rows once more.

A host without a package registry needs the wheels of vLLM and of what it lacks, installed with `pip install --no-index
--no-deps --target SITE`, and forecache likewise (`pip install --no-deps --no-build-isolation --target SITE .`). Then:

    PYTHONPATH=SITE python3 tests/benchmarks/bench_workloads.py --out $OUT/w.json --rows 64x2048+256 8x32768+256 \
        4x131072+256 mixed --time-limit-s 420
    PYTHONPATH=SITE python3 tests/benchmarks/bench_workloads.py --out $OUT/w.json --rows sessions --time-limit-s 420

vLLM's process has VLLM_ENABLE_V1_MULTIPROCESSING=0 (it runs in this process), VLLM_USE_FLASHINFER_SAMPLER=0 (FlashInfer
need not be there) and VLLM_USE_SIMPLE_KV_OFFLOAD=1: its other connector rounds page-locked memory up to a power of two,
128 GiB for this row.
"""

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import SHAPES, machine_facts, now, write_model
from workload_engines import GIB, Course, ForecacheEngine, MeasuredEngine, VllmEngine, drive
from workload_report import PEER, Rate, Results, ResumeError, columns_of, forecache_column, table
from workload_rows import (
    ROWS,
    SIZES,
    Prompts,
    RowError,
    Session,
    burst,
    highest_rate,
    keeps_up,
    most_tokens,
    sessions_of,
)

from forecache.workers.models.backbone import load_config
from forecache.workers.models.loader import resolve_model

ENGINES = (PEER, "forecache")
HELD_ROW = "sessions"
"""The row during which GPU memory is held to `--gpu-gib`."""
WARM_UP = {"full": "2x512+16", "small": "2x32+4"}
SLACK_S = {"full": 1.0, "small": 0.25}
"""Growth of a queue that is no sign of overload: about one long prompt."""
OFFLOAD_MARGIN = 1.05
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_SIMPLE_KV_OFFLOAD": "1",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Names that vLLM finds in config.json; transformers writes them only with weights."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write and to resume")
    parser.add_argument("--rows", nargs="+", help="rows to measure; default: all of --sizes")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: both, vLLM only if it is importable")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=[0.135, 1.0], help="resident chunks / all")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b", help="of the random weights")
    parser.add_argument("--model", help="directory or built-in name of a model with its weights, instead of --shape")
    parser.add_argument("--sizes", choices=list(SIZES), default="full", help="sizes of the rows sessions and mixed")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sizes and arrivals")
    parser.add_argument("--gpu-gib", type=float, default=70.0, help="GiB of GPU memory of the row sessions")
    parser.add_argument("--offload-gib", type=float, help="GiB of CPU memory for vLLM's K/V in the row sessions")
    parser.add_argument("--rate", type=float, help="arrivals per second of the row mixed; default: see above")
    parser.add_argument("--rate-share", type=float, default=0.8, help="share of the sustained rate")
    parser.add_argument("--bisect-runs", type=int, default=0, help="runs of the row mixed that search for the rate")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="no row starts after so many seconds")
    parser.add_argument("--again", action="store_true", help="measure rows that FILE has already")
    parser.add_argument("--table", action="store_true", help="print the table of FILE, measure nothing")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of forecache")
    parser.add_argument("--vllm-set", nargs="*", default=[], metavar="NAME=JSON", help="other arguments of vLLM")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rows = args.rows or list(ROWS[args.sizes])
    if args.engines is None:
        args.engines = [PEER, "forecache"] if importlib.util.find_spec("vllm") is not None else ["forecache"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments(words)
    begun = time.perf_counter()
    try:
        results = open_results(args)
        for row in args.rows:
            sessions_of(row, SIZES[args.sizes], args.seed, None)
    except (ResumeError, RowError) as error:
        print(f"bench_workloads: {error}", file=sys.stderr)
        return 2
    if args.child is not None:
        measure(args, results, begun)
        return 0
    failed = False if args.table else run_engines(args, words, begun)
    print(table(open_results(args), args.rows, list(columns_of(args.engines, args.keep_ratios))))
    return 1 if failed else 0


def open_results(args: argparse.Namespace) -> Results:
    settings = {
        "model": args.model or f"{args.shape}, random weights",
        "sizes": asdict(SIZES[args.sizes]),
        "seed": args.seed,
        "rate_share": args.rate_share,
        "set": args.set,
        "vllm_set": args.vllm_set,
    }
    return Results(args.out, settings)


def run_engines(args: argparse.Namespace, words: list[str], begun: float) -> bool:
    """Run each engine over its rows in a process of its own; returns whether one failed."""
    failed = False
    for rows in ([row for row in args.rows if row != HELD_ROW], [row for row in args.rows if row == HELD_ROW]):
        for engine in args.engines:
            left_s = args.time_limit_s - (time.perf_counter() - begun)
            if not missing(args, open_results(args), engine, rows):
                continue
            if left_s <= 0:
                print(f"{engine}, {' '.join(rows)}: not begun, the time limit is over", file=sys.stderr, flush=True)
                continue
            command = [sys.executable, __file__, *words, "--child", engine, "--time-limit-s", str(left_s)]
            environment = os.environ | (VLLM_ENVIRONMENT if engine == PEER else {})
            status = subprocess.run([*command, "--rows", *rows], env=environment).returncode
            if status:
                print(f"{engine}, {' '.join(rows)}: its process ended with {status}", file=sys.stderr, flush=True)
                failed = True
    return failed


def missing(args: argparse.Namespace, results: Results, engine: str, rows: Sequence[str]) -> bool:
    columns = list(columns_of([engine], args.keep_ratios))
    if args.again:
        return bool(rows)
    if engine == PEER and "mixed" in rows and rate_of(args, results, engine) is None:
        return True
    return not all(
        results.done(row, column, rate_of(args, results, engine) if row == "mixed" else None)
        for row in rows
        for column in columns
    )


def rate_of(args: argparse.Namespace, results: Results, engine: str) -> float | None:
    """Arrivals per second of the row `mixed`; ``None`` if they are still to be measured."""
    if args.rate is not None:
        return float(args.rate)
    if results.rate is None or (engine == PEER and results.rate.of != PEER):
        return None
    return float(round(results.rate.per_s * args.rate_share, 4))


def measure(args: argparse.Namespace, results: Results, begun: float) -> None:
    """Start one engine, and measure each of the rows in every column of it."""
    engine: MeasuredEngine
    with model_files(args) as (path, manifest):
        config = load_config(Path(path))
        engine = start(args, path, manifest, config)
        start_s = time.perf_counter() - begun
        try:
            columns = list(columns_of([args.child], args.keep_ratios))
            for column in columns:
                warm_up = burst(WARM_UP[args.sizes])
                assert warm_up is not None
                choose(engine, column, args.keep_ratios)
                drive(engine, warm_up, Prompts(config.vocab_size, args.seed, f"warm-up {column}"), f"warm-up-{column}")
            common = {
                "start_s": round(start_s, 2),
                "warm_up_s": round(time.perf_counter() - begun - start_s, 2),
                "memory": engine.memory(),
                "gpu_gib": args.gpu_gib if torch.cuda.is_available() and HELD_ROW in args.rows else None,
                **machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            }
            print(
                f"{args.child} started in {start_s:.1f} s, warm after {common['warm_up_s']:.1f} s: {common['memory']}"
            )
            measure_rows(Runner(args, engine, config.vocab_size), results, columns, common, begun)
        finally:
            engine.close()


class Runner:
    """Runs rows through one engine; every run has its own prompts."""

    def __init__(self, args: argparse.Namespace, engine: MeasuredEngine, vocab_size: int) -> None:
        self.args = args
        self._vocab_size = vocab_size
        self._runs = 0
        self.engine = engine

    def sessions(self, row: str, rate_per_s: float | None) -> list[Session]:
        return sessions_of(row, SIZES[self.args.sizes], self.args.seed, rate_per_s)

    def run(self, row: str, column: str, rate_per_s: float | None) -> Course:
        choose(self.engine, column, self.args.keep_ratios)
        self._runs += 1
        name = f"{column} {row} {self._runs}"
        prompts = Prompts(self._vocab_size, self.args.seed, name)
        return drive(self.engine, self.sessions(row, rate_per_s), prompts, name)

    def sustained_rate(self, column: str) -> Rate:
        """Arrivals per second that the engine sustains in the row `mixed`."""
        at_once = self.run("mixed", column, None)
        rate_per_s, how = len(at_once.tracks) / at_once.total_s, "requests over seconds, all sent at once"

        def sustained(rate_per_s: float) -> bool:
            course = self.run("mixed", column, rate_per_s)
            waits_s = [track.first_token_s for track in course.tracks]
            kept_up = keeps_up([track.due_s for track in course.tracks], waits_s, SLACK_S[self.args.sizes])
            print(f"{column}: {rate_per_s:.3f} requests/s {'sustained' if kept_up else 'not sustained'}", flush=True)
            return kept_up

        if runs := self.args.bisect_runs:
            rate_per_s = highest_rate(rate_per_s, 2 * rate_per_s, sustained, runs)
            how = f"bisection from there to twice as many, {runs} runs"
        return Rate(round(rate_per_s, 4), self.args.child, how)


def measure_rows(
    runner: Runner, results: Results, columns: Sequence[str], common: dict[str, Any], begun: float
) -> None:
    args = runner.args
    for row in args.rows:
        for column in columns:
            if time.perf_counter() - begun > args.time_limit_s:
                print(f"{column}, {row}: not begun, the time limit is over", file=sys.stderr, flush=True)
                continue
            rate_per_s = None
            if row == "mixed":
                if rate_of(args, results, args.child) is None:
                    results.set_rate(runner.sustained_rate(column))
                    print(f"sustained: {results.rate}", flush=True)
                rate_per_s = rate_of(args, results, args.child)
            if results.done(row, column, rate_per_s) and not args.again:
                continue
            course = runner.run(row, column, rate_per_s)
            figures = {"row": row, "column": column, "rate_per_s": rate_per_s, **course.figures()}
            results.add({**figures, **common, "gpu_used_bytes": gpu_used_bytes(), "date": now()})
            print(json.dumps(figures), flush=True)


def gpu_used_bytes() -> int | None:
    """GPU memory in use by all processes, which is this one's when it is alone."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def choose(engine: MeasuredEngine, column: str, keep_ratios: Sequence[float]) -> None:
    """Requests added from now on belong to ``column``."""
    if isinstance(engine, ForecacheEngine):
        engine.keep_ratio = next(ratio for ratio in keep_ratios if forecache_column(ratio) == column)


@contextmanager
def model_files(args: argparse.Namespace) -> Iterator[tuple[str, Path | None]]:
    """The directory of the model, and its retrieval heads if its weights are random."""
    if args.model is not None:
        yield str(resolve_model(args.model)), None
        return
    with tempfile.TemporaryDirectory() as directory:
        config = copy.deepcopy(SHAPES[args.shape])
        config.architectures = [ARCHITECTURES[config.model_type]]
        yield directory, write_model(Path(directory), config)


def start(args: argparse.Namespace, path: str, manifest: Path | None, config: Any) -> MeasuredEngine:
    """The engine of this process, with the limits of its rows."""
    sessions = [sessions_of(row, SIZES[args.sizes], args.seed, None) for row in args.rows]
    longest = max(most_tokens(row) for row in [*sessions, burst(WARM_UP[args.sizes]) or []])
    shared: dict[str, Any] = {"max_model_len": longest + 64}
    if args.model is None:
        shared["load_format"] = "dummy"
    if torch.cuda.is_available():
        shared["dtype"] = "bfloat16"
    held = HELD_ROW in args.rows
    if held and torch.cuda.is_available():  # a share of the whole memory, for both engines
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        shared["gpu_memory_utilization"] = round(args.gpu_gib * GIB / total_bytes, 4)
    if args.child == "forecache":
        settings = shared | dict(setting.split("=", 1) for setting in args.set)
        return ForecacheEngine(args.model or path, manifest, settings)
    offload_bytes = None
    if held:
        tokens = sum(session.tokens for row in sessions for session in row)
        offload_bytes = int((args.offload_gib or OFFLOAD_MARGIN * tokens * kv_bytes(config) / GIB) * GIB)
    given = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in args.vllm_set)}
    return VllmEngine(path, offload_bytes, shared | given)


def kv_bytes(config: Any) -> int:
    """Bytes of one token's keys and values in bfloat16."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim)


if __name__ == "__main__":
    sys.exit(main())
