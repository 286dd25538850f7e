"""The engine end to end over long contexts: decode, prefill, resumed sessions, and a profile of its steps.

    python tests/benchmarks/bench_long_context.py --out DIR [--rows decode prefill resume] [--contexts 131072]
        [--cold-gib 110] [--hot-gib 24] [--turnover 0 0.2 1] [--set cold_dtype=fp8 lead_steps=16]
    python tests/benchmarks/bench_long_context.py --out DIR --rows real --shape qwen2.5-7b-1m --contexts 1000000
    python tests/benchmarks/bench_long_context.py --out DIR --tiny

The model has random weights of a published shape (`load_format="dummy"`). For `decode`, `resume` and `profile` one
random chunk of K/V stands for every chunk of every prompt in cold memory, where the requests find it as a stored
prefix; `prefill` and `real` compute all. Rows are appended to DIR/long-context.csv as they are done;
the last line is JSON.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client import BenchmarkError
from harness import SHAPES, append_row, write_model
from long_context import SUFFIX_TOKENS, Bench, Options
from long_context_row import Row
from profiling import device_table, host_table
from synthetic import SyntheticIndexer

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.protocol import Indexer
from forecache.workers.llm import LLM

GIB = 1 << 30
SPARED_BYTES = 10 * GIB
"""Of shared memory, left to everything else."""
SETTLE_STEPS = 80
DEVICE_STEPS = 20
HOST_STEPS = 100
CONTEXTS = {
    "decode": [131072, 229376, 524288],
    "prefill": [32768, 131072, 262144],
    "resume": [131072],
    "real": [131072],
    "profile": [131072],
}
TINY_CONTEXTS = {"decode": [1280], "prefill": [256, 1600], "resume": [1280], "real": [768], "profile": [512]}
TINY_CHUNK_BYTES = 8192
SAID = (
    *("row", "context", "concurrency", "p50_ms", "over_floor", "tokens_per_s", "settled_tokens_per_s"),
    *("turnover", "turnover_per_window", "predict_p50_ms", "late_windows", "loss_to_recall"),
    *("ttft_p50_s", "prefill_tokens_per_s", "tflop_per_s", "copy_share", "note"),
)
"""Columns that are printed as a row is done; all are in the file."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for long-context.csv and the profiles")
    parser.add_argument("--rows", nargs="+", choices=list(CONTEXTS), default=["decode", "prefill", "resume"])
    parser.add_argument("--contexts", type=int, nargs="+", help="prompt tokens; default: those of each kind of row")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--concurrency", type=int, help="requests decoded together; default: as many as fit")
    parser.add_argument("--turnover", type=float, nargs="+", default=[0.0, 0.2, 1.0], help="imposed, one row each")
    parser.add_argument("--max-tokens", type=int, default=768, help="tokens of each answer of decode and real")
    parser.add_argument("--keep-ratio", type=float, default=0.1, help="resident chunks / all")
    parser.add_argument("--cold-gib", type=float, help="GiB of the arena; default: what is free, less 10")
    parser.add_argument("--hot-gib", type=float, default=24.0, help="GiB of the hot pool")
    parser.add_argument("--repeat", type=int, default=5, help="timed resumptions")
    parser.add_argument("--fill-threads", type=int, default=8, help="threads that fill the arena")
    parser.add_argument("--indexer-threads", type=int, default=1, help="CPU threads of the indexer")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="ends a real prefill; no row starts after it")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of LLM")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and short contexts, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shape, args.fill_threads, args.keep_ratio, args.max_tokens = "tiny", 1, 0.2, 96
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
    rows: list[Row] = []
    with opened(args) as bench:
        for row in measure(bench, contexts_of(args), args.out):
            append_row(args.out / "long-context.csv", row)
            rows.append(row)
            print(
                "  ".join(f"{k} {v}" for k, v in dataclasses.asdict(row).items() if k in SAID and v not in (None, ""))
            )
            sys.stdout.flush()
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
    return 0


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Bench]:
    """The engine that all rows share."""
    begun = time.perf_counter()
    longest = max(map(max, contexts_of(args).values()))
    with tempfile.TemporaryDirectory() as directory:
        heads = write_model(Path(directory), SHAPES[args.shape])
        settings = engine_settings(args, longest)
        selection = SelectionConfig()
        wrapped: list[SyntheticIndexer] = []

        def wrap(inner: Indexer) -> Indexer:
            wrapped.append(SyntheticIndexer(inner, float(settings["keep_ratio"]), selection))
            return wrapped[0]

        with LLM(
            directory,
            selection=selection,
            indexer=IndexerConfig(manifest=str(heads), threads=args.indexer_threads),
            wrap_indexer=wrap,
            **settings,
        ) as llm:
            start_s = time.perf_counter() - begun
            slots = f"{llm.memory.arena.slots} cold, {llm.engine.pool.num_slots} hot slots"
            print(f"started in {start_s:.1f} s: {slots} of {llm.backbone.layout.nbytes} bytes", flush=True)
            options = Options(
                shape=args.shape,
                settings=" ".join(args.set),
                max_tokens=args.max_tokens,
                concurrency=args.concurrency,
                turnovers=tuple(args.turnover),
                repeat=args.repeat,
                fill_threads=args.fill_threads,
                deadline_s=begun + args.time_limit_s,
                start_s=start_s,
            )
            yield Bench(llm, wrapped[0], selection, options)


def contexts_of(args: argparse.Namespace) -> dict[str, list[int]]:
    """The lengths of each kind of row that was asked for."""
    return {row: args.contexts or (TINY_CONTEXTS if args.tiny else CONTEXTS)[row] for row in args.rows}


def engine_settings(args: argparse.Namespace, longest: int) -> dict[str, Any]:
    """Keyword arguments of :class:`LLM`; ``--set`` wins. ``longest``: prompt tokens."""
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer": True,
        "max_model_len": longest + max(args.max_tokens, SUFFIX_TOKENS + 1),
        "keep_ratio": args.keep_ratio,
        "min_resident_tokens": 0,
    }
    if args.tiny:
        settings |= {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "chunk_tokens": 16,
            "window_steps": 16,
            "max_step_tokens": 256,
            "hot_bytes": 66 * TINY_CHUNK_BYTES,
            "cold_bytes": 4 << 20,
        }
    else:
        free = os.statvfs("/dev/shm")
        cold = args.cold_gib * GIB if args.cold_gib else free.f_bavail * free.f_frsize - SPARED_BYTES
        settings |= {"hot_bytes": int(args.hot_gib * GIB), "cold_bytes": int(cold)}
    return settings | dict(setting.split("=", 1) for setting in args.set)


def measure(bench: Bench, contexts: dict[str, list[int]], out: Path) -> Iterator[Row]:
    """All rows asked for; one that can't be measured is said on stderr, and the others go on."""
    kinds: dict[str, Callable[[int], Iterator[Row]]] = {
        "decode": bench.decode,
        "prefill": bench.prefill,
        "resume": bench.resume,
        "real": bench.real,
        "profile": lambda context: profile_steps(bench, context, out),
    }
    for kind, lengths in contexts.items():
        for context in lengths:
            if time.perf_counter() > bench.options.deadline_s:
                print(f"{kind} {context}: not begun, the time limit is over", file=sys.stderr, flush=True)
                continue
            try:
                yield from kinds[kind](context)
            except BenchmarkError as error:
                print(f"{kind} {context}: {error}", file=sys.stderr, flush=True)
                bench.client.cancel()


def profile_steps(bench: Bench, context: int, out: Path) -> Iterator[Row]:
    """Where the time of steady decode steps goes, on the device and in the engine's thread: two text files."""
    concurrency = bench.concurrency(context)
    turnover = bench.options.turnovers[-1]
    tracks, _ = bench.start_decoding(context, concurrency, turnover)
    settle = min(SETTLE_STEPS, bench.options.max_tokens // 4)
    bench.client.run_until(lambda: all(len(track.token_s) > settle for track in tracks))
    out.mkdir(parents=True, exist_ok=True)
    for name, table, steps in (("device", device_table, DEVICE_STEPS), ("host", host_table, HOST_STEPS)):
        text = table(bench.client.step, min(steps, bench.options.max_tokens // 4))
        (out / f"profile-{name}-{context}x{concurrency}.txt").write_text(text)
        print("\n".join(text.splitlines()[:30]), flush=True)
    bench.client.cancel()
    yield from ()


if __name__ == "__main__":
    sys.exit(main())
