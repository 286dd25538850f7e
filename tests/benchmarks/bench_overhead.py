"""What the framework adds to each streamed token, by stage: a stub engine behind the real cluster and its HTTP.

    python tests/benchmarks/bench_overhead.py [--streams 16] [--seconds 30] [--arrivals together apart] [--out FILE]

Stages: *engine*, from a token's making to its leaving the worker's coroutine (the engine's thread → the event loop);
*router*, from there to the ingress, through Ray Serve's handle; *HTTP*, from there to the client's socket: the event's
text, the web framework, Serve's proxy. `together`: the tokens of all streams come at once, as those of a batch do, and
the last of them waits for the others; `apart`: they are spread over the step. The client runs on the same machine.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import append_row, now
from rich.console import Console
from rich.table import Table
from stream_client import Connection
from stub_worker import APART_SEED, TOKENS_PER_S, StampingIngress, StubWorker

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import running
from forecache.workers.core.config import EngineConfig

GOAL_MS = 2.0
WARM_UP_TOKENS = 40
"""Left out of every stream: connections, routes and caches of the first seconds."""
STAGES = ("engine", "router", "http", "total")


@dataclass(frozen=True)
class Row:
    """Times in milliseconds per token; ``tokens`` were counted."""

    arrivals: str
    stage: str
    streams: int
    tokens: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    date: str


async def one_stream(url: str, model: str, tokens: int) -> list[tuple[float, ...]]:
    """When each token was made, handed over, at the ingress and here: seconds."""
    connection = Connection(url)
    body = {"model": model, "messages": [{"role": "user", "content": "go"}], "max_tokens": tokens, "stream": True}
    response = await connection.post("/v1/chat/completions", json.dumps(body).encode())
    assert response.status == 200, response.body
    times: list[tuple[float, ...]] = []
    async for came_s, event in connection.events():
        assert "error" not in event, event
        said = event["choices"][0]["delta"].get("content") or ""
        times += [(*map(float, line.split()), came_s) for line in said.splitlines()]
    connection.close()
    assert len(times) == tokens, f"{len(times)} of {tokens} tokens came"
    return times[WARM_UP_TOKENS:]


async def all_streams(url: str, model: str, streams: int, tokens: int) -> list[tuple[float, ...]]:
    every = await asyncio.gather(*(one_stream(url, model, tokens) for _ in range(streams)))
    return [times for one in every for times in one]


def rows(arrivals: str, streams: int, times: Sequence[tuple[float, ...]]) -> list[Row]:
    made = []
    for number, stage in enumerate(STAGES):
        first, last = (number, number + 1) if stage != "total" else (0, 3)
        taken = [1000 * (one[last] - one[first]) for one in times]
        percentiles = statistics.quantiles(taken, n=100)
        made.append(
            Row(arrivals, stage, streams, len(taken), statistics.fmean(taken), percentiles[49], percentiles[98], now())
        )
    return made


def measure(arrivals: str, args: argparse.Namespace, console: Console) -> list[Row]:
    config = ServeConfig(port=0, engine=EngineConfig(model=args.model, seed=APART_SEED * (arrivals == "apart")))
    with running(
        config, lambda said: console.print(f"[dim]{said}"), ingress_class=StampingIngress, worker_class=StubWorker
    ) as cluster:
        tokens = int(args.seconds * TOKENS_PER_S) + WARM_UP_TOKENS
        return rows(arrivals, args.streams, asyncio.run(all_streams(cluster.url, args.model, args.streams, tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--arrivals", nargs="+", choices=("together", "apart"), default=["together", "apart"])
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    args = parser.parse_args()
    console = Console()
    table = Table("tokens come", "stage", "mean", "p50", "p99", title=f"ms per token, {args.streams} streams")
    for arrivals in args.arrivals:
        for row in measure(arrivals, args, console):
            table.add_row(arrivals, row.stage, f"{row.mean_ms:.2f}", f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}")
            if row.stage == "total":
                table.add_section()
                met = "met" if row.mean_ms <= GOAL_MS else "not met"
                console.print(f"{arrivals}: {row.mean_ms:.2f} ms a token, goal {GOAL_MS:g}: {met}")
            if args.out is not None:
                append_row(args.out, row)
    console.print(table)


if __name__ == "__main__":
    main()
