"""Time between tokens of one stream, in process and served: what the cluster adds to the same engine.

    python tests/benchmarks/bench_served.py [--words 1200] [--tokens 200] [--threads N] [--set early_wait_s=0 …]
        [--out FILE]

The same prompt, twice each, the second time from stored chunks: through `LLM`, then through `forecache serve` and HTTP.
Gaps between tokens in milliseconds: of all, and by where they lie, in the first window (where sets change at steps 2,
4, 8, … and are waited for) and after it. `--set` changes a setting of the engine for both, to tell causes apart.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import yaml
from harness import append_row, now
from rich.console import Console
from rich.table import Table

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import running
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.llm import LLM

TEXT = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


@dataclass(frozen=True)
class Row:
    """Gaps between tokens, in milliseconds; ``load`` is the machine's, of one minute, at the end."""

    where: str
    gaps: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    first_window_ms: float
    later_ms: float
    settings: str
    load: float
    date: str


def row(where: str, came_s: Sequence[float], config: EngineConfig, changed: dict[str, Any]) -> Row:
    gaps = [1000 * (b - a) for a, b in pairwise(came_s)]
    deciles = statistics.quantiles(gaps, n=10)
    first, later = gaps[: config.window_steps], gaps[config.window_steps :] or [float("nan")]
    mean = statistics.fmean
    return Row(where, len(gaps), mean(gaps), deciles[4], deciles[8], mean(first), mean(later),
               str(changed), os.getloadavg()[0], now())  # fmt: skip


def in_process(prompt: str, tokens: int, settings: dict[str, Any]) -> list[list[float]]:
    runs = []
    with LLM(**settings) as llm:
        assert llm.tokenizer is not None
        ids = tuple(llm.tokenizer(prompt)["input_ids"])
        for number in range(2):
            came: list[float] = []
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
            llm.engine.add_request(GenerateRequest(f"r{number}", ids, sampling))
            while not llm.engine.idle:
                came += [time.monotonic() for event in llm.engine.step() if event.token_ids]
            runs.append(came)
    return runs


def served(prompt: str, tokens: int, settings: dict[str, Any], console: Console) -> list[list[float]]:
    config = ServeConfig(port=0, engine=EngineConfig(**settings))
    runs = []
    with running(config, lambda said: console.print(f"[dim]{said}")) as cluster:
        body = {"model": config.model_name, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
                "temperature": 0, "stream": True, "logprobs": 0}  # fmt: skip
        for _ in range(2):
            came: list[float] = []
            with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=600) as answer:
                # with log-probabilities every token has its event, also one that completes no character
                told = (line for line in answer.iter_lines() if '"token_logprobs"' in line)
                came += [time.monotonic() for _ in told]
            runs.append(came)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--words", type=int, default=1200, help="of the prompt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    args = parser.parse_args()
    changed = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in args.set)}
    settings: dict[str, Any] = {"model": args.model, "threads": args.threads, **changed}
    prompt = " ".join(TEXT.read_text(encoding="utf-8").split()[: args.words])
    console, config = Console(), EngineConfig(**settings)
    table = Table("", "mean", "p50", "p90", "first window", "later", title="ms between tokens, one stream")
    runs = [("in process", came) for came in in_process(prompt, args.tokens, settings)]
    runs += [("served", came) for came in served(prompt, args.tokens, settings, console)]
    for where, came in runs:
        told = row(where, came, config, changed)
        figures = (told.mean_ms, told.p50_ms, told.p90_ms, told.first_window_ms, told.later_ms)
        table.add_row(where, *(f"{figure:.1f}" for figure in figures))
        if args.out is not None:
            append_row(args.out, told)
    console.print(table)


if __name__ == "__main__":
    main()
