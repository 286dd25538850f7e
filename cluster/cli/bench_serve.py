"""`forecache bench serve`: load on a running server, and what its clients see of it."""

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.console import Console

from forecache.cluster.cli.arguments import output_folder
from forecache.cluster.cli.load_report import Slo, as_json, plot, summarize, table
from forecache.cluster.cli.load_test import (
    Answered,
    Target,
    check_loopback,
    client,
    closed_loop,
    open_loop,
    words_per_token,
)
from forecache.cluster.cli.load_workloads import Workload, WorkloadSettings, conversations
from forecache.cluster.http.tenants import read_key


def add_arguments(
    parser: argparse.ArgumentParser, positive: Callable[[str], int], ratio: Callable[[str], float]
) -> None:
    """Flags of the command."""
    workload = WorkloadSettings()
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(default: http://127.0.0.1:8000/v1)")
    parser.add_argument("--model", required=True, help="the name that the server serves it by")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the key, where the server asks for one")
    parser.add_argument("--allow-remote", action="store_true", help="make load on a server that is not this machine's")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--rate", type=_above_zero, help="open loop: conversations begin so often a second, as a Poisson process"
    )
    loop.add_argument("--concurrency", type=positive, help="closed loop: so many clients at once (default: 4)")
    parser.add_argument("--conversations", type=positive, default=32, help="how many in all (default: 32)")
    parser.add_argument("--workload", choices=get_args(Workload), default=workload.workload, help="(default: unique)")
    parser.add_argument("--input-tokens", type=positive, default=workload.input_tokens, help="of a document (1024)")
    parser.add_argument("--question-tokens", type=positive, default=workload.question_tokens, help="of a question (64)")
    parser.add_argument("--output-tokens", type=positive, default=64, help="of each answer (64)")
    parser.add_argument("--prefixes", type=positive, default=workload.prefixes, help="documents of shared-prefix (4)")
    parser.add_argument("--turns", type=positive, default=workload.turns, help="of a multi-turn conversation (4)")
    parser.add_argument("--keep-ratio", type=ratio, help="resident / all chunks; default: the server's")
    parser.add_argument("--slo-first-token-s", type=_above_zero, default=2.0, help="of a good answer (2)")
    parser.add_argument("--slo-inter-token-s", type=_above_zero, default=0.1, help="mean of a good answer (0.1)")
    parser.add_argument("--timeout-s", type=_above_zero, default=600.0, help="longest wait for a piece (600)")
    parser.add_argument("--seed", type=int, default=workload.seed, help="of texts and arrivals (0)")
    parser.add_argument("--out", type=output_folder, help="folder for serve.json and serve.png (default: none)")


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Make the load, print a table, write the files; 1 when a request failed that was not refused."""
    if not args.allow_remote:
        check_loopback(args.url)
    key = read_key(args.api_key_file)
    target = Target(args.url.rstrip("/"), args.model, key, args.output_tokens, args.keep_ratio, args.timeout_s)
    workload = WorkloadSettings(
        args.workload, args.input_tokens, args.question_tokens, args.prefixes, args.turns, args.seed
    )
    concurrency = None if args.rate is not None else args.concurrency or 4
    answers = asyncio.run(_load(target, workload, args.conversations, args.rate, concurrency))
    slo = Slo(args.slo_first_token_s, args.slo_inter_token_s)
    summary = summarize(answers, slo)
    console = Console()
    loop = f"{args.rate:g} a second" if concurrency is None else f"{concurrency} at once"
    console.print(table(summary, f"{args.model}: {args.workload}, {loop}"))
    for answer in [answer for answer in answers if answer.error and answer.status not in (429, 503)][:3]:
        console.print(f"failed: {answer.error}", markup=False)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {
            **asdict(workload), "rate": args.rate, "concurrency": concurrency, "slo": asdict(slo),
            **{name: value for name, value in asdict(target).items() if name != "api_key"},
        }  # fmt: skip
        (args.out / "serve.json").write_text(json.dumps(as_json(summary, settings, answers)), encoding="utf-8")
        plot(args.out / "serve.png", answers, slo)
    return 1 if summary.failed else 0


async def _load(
    target: Target, workload: WorkloadSettings, count: int, rate_per_s: float | None, concurrency: int | None
) -> list[Answered]:
    answers: list[Answered] = []
    async with client(target) as http:
        asked = conversations(count, workload, await words_per_token(http, target, workload.seed))
        if rate_per_s is not None:
            await open_loop(http, target, asked, rate_per_s, workload.seed, answers.append)
        else:
            await closed_loop(http, target, asked, concurrency or 1, answers.append)
    return answers
