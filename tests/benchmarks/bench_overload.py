"""Ten times a server's capacity for two minutes: time to a refusal, slowdown of admitted requests, and memory.

    python tests/benchmarks/bench_overload.py [--factor 10] [--baseline-s 60] [--overload-s 120] [--out FILE.json]

A real server (`forecache serve`, the default model) lets in `--batch` running and `--queue` waiting requests. First as
many closed-loop clients as that, each with its next request as soon as the last is answered, or when a refusal said
to come again: the capacity in requests per second, and the time between tokens at that concurrency. Then Poisson
arrivals at `--factor` times the capacity, of which most are refused: the same figure of the admitted ones, the time to
a refusal, and the memory of all processes. Other work on the machine affects all times, so its load is reported too.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import now
from rich.console import Console
from rich.table import Table
from stream_client import Connection

from forecache.cluster.cli.load_workloads import prose

REFUSED_GOAL_S, SLOWER_GOAL, GROWTH_GOAL = 0.1, 1.5, 1.05
STOP_S = 60.0
MEMORY_EVERY_S = 2.0


@dataclass
class Phase:
    """What clients saw. Times in seconds; sampled: ``memory_bytes`` of all of the server's processes, ``load`` of the
    machine."""

    name: str
    duration_s: float = 0.0
    answered: int = 0
    refused_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Memory in the last third of the phase over that in its second third: the first may still fill caches."""
        third = len(self.memory_bytes) // 3
        if not third:
            return 1.0
        return statistics.fmean(self.memory_bytes[-third:]) / statistics.fmean(self.memory_bytes[third : 2 * third])


def p99(values: Sequence[float]) -> float:
    """Never more than the largest of few values."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else float("nan")


class Clients:
    """Clients of one server; connections are used again."""

    def __init__(self, url: str, model: str, prompt_words: int, tokens: int, seed: int) -> None:
        self._url, self._model, self._words, self._tokens = url, model, prompt_words, tokens
        self._random = random.Random(seed)
        self._idle: list[Connection] = []

    async def ask(self, phase: Phase) -> float:
        """One request. Returns the seconds after which it may come again: 0 unless it was refused."""
        again_s = 0.0
        connection = self._idle.pop() if self._idle else Connection(self._url)
        body = {
            "model": self._model,
            "prompt": prose(self._words, self._random),
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        start = last_s = time.monotonic()
        try:
            response = await connection.post("/v1/completions", json.dumps(body).encode())
            if response.status == 429:
                phase.refused_s.append(time.monotonic() - start)
                again_s = float(response.headers["retry-after"])
            elif response.status != 200:
                phase.failures.append(f"{response.status}: {response.body[:200]!r}")
            else:
                first = True
                async for came_s, event in connection.events():
                    if "error" in event:
                        phase.failures.append(json.dumps(event["error"]))
                    elif event["choices"] and event["choices"][0]["text"]:
                        if not first:
                            phase.gaps_s.append(came_s - last_s)
                        first, last_s = False, came_s
                phase.answered += 1
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            phase.failures.append(repr(error))
            connection.close()
        else:
            self._idle.append(connection)
        return again_s

    async def closed_loop(self, phase: Phase, concurrency: int, duration_s: float) -> None:
        end = time.monotonic() + duration_s

        async def one() -> None:
            while (left_s := end - time.monotonic()) > 0:
                # one that came again at once would measure the capacity of a server that is busy refusing
                await asyncio.sleep(min(await self.ask(phase), left_s))

        await asyncio.gather(*(one() for _ in range(concurrency)))

    async def open_loop(self, phase: Phase, rate_per_s: float, duration_s: float) -> None:
        due = time.monotonic()
        end = due + duration_s
        async with asyncio.TaskGroup() as group:
            while (due := due + self._random.expovariate(rate_per_s)) < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self.ask(phase))

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def memory_of(root: int) -> int:
    """Bytes of private memory of ``root`` and all below it."""
    parents, private = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            pid = int(stat.parent.name)
            parents[pid] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            resident, shared = map(int, (stat.parent / "statm").read_text().split()[1:3])
            private[pid] = (resident - shared) * 4096
    members, frontier = {root}, {root}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        members |= frontier
    return sum(private.get(pid, 0) for pid in members)


async def watch(phase: Phase, root: int) -> None:
    while True:
        phase.memory_bytes.append(await asyncio.to_thread(memory_of, root))
        phase.load.append(os.getloadavg()[0])
        await asyncio.sleep(MEMORY_EVERY_S)


async def measure(clients: Clients, args: argparse.Namespace, root: int, console: Console) -> list[Phase]:
    concurrency = args.batch + args.queue
    phases = []
    # leave the costs of start, compilation and first use out of the latencies
    await clients.closed_loop(Phase("warm-up"), concurrency, args.baseline_s / 4)
    for name in ("admitted alone", "overload"):
        phase = Phase(name)
        watching = asyncio.create_task(watch(phase, root))
        start = time.monotonic()
        if name == "overload":
            capacity = phases[0].answered / phases[0].duration_s
            console.print(f"capacity {capacity:.2f} requests/s; now {args.factor:g} times that")
            await clients.open_loop(phase, args.factor * capacity, args.overload_s)
        else:
            await clients.closed_loop(phase, concurrency, args.baseline_s)
        phase.duration_s = time.monotonic() - start
        watching.cancel()
        phases.append(phase)
    clients.close()
    return phases


def report(phases: Sequence[Phase], console: Console) -> dict[str, object]:
    alone, overload = phases
    refused, slower = p99(overload.refused_s), p99(overload.gaps_s) / p99(alone.gaps_s)
    table = Table("", "admitted alone", "overload", "goal")
    failed = [str(len(phase.failures)) for phase in phases]
    gaps = [f"{1000 * statistics.median(p.gaps_s):.0f} / {1000 * p99(p.gaps_s):.0f}" for p in phases]
    table.add_row("answered / refused", f"{alone.answered} / {len(alone.refused_s)}",
                  f"{overload.answered} / {len(overload.refused_s)}", "")  # fmt: skip
    table.add_row("failed otherwise", *failed, "0")
    table.add_row("between tokens, p50 / p99, ms", *gaps, f"p99 within {SLOWER_GOAL:g}x: {slower:.2f}x")
    median = 1000 * statistics.median(overload.refused_s) if overload.refused_s else float("nan")
    table.add_row("refusal, p50 / p99, ms", "", f"{median:.1f} / {1000 * refused:.1f}", f"< {1000 * REFUSED_GOAL_S:g}")
    table.add_row("memory, last third over second", f"{alone.growth:.3f}", f"{overload.growth:.3f}", f"< {GROWTH_GOAL}")
    loads = [f"{min(phase.load):.1f} to {max(phase.load):.1f}" for phase in phases]
    table.add_row("load of the machine", *loads, "")
    console.print(table)
    goals = {
        "refused_fast": refused < REFUSED_GOAL_S,
        "admitted_undisturbed": slower <= SLOWER_GOAL,
        "memory_flat": overload.growth < GROWTH_GOAL,
        "nothing_failed": not alone.failures and not overload.failures,
    }
    console.print(", ".join(f"{name}: {'met' if met else 'NOT MET'}" for name, met in goals.items()))
    return {
        "date": now(),
        "refused_p99_s": refused,
        "slower": slower,
        "goals": goals,
        "phases": [asdict(p) for p in phases],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--queue", type=int, default=4)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--baseline-s", type=float, default=60.0)
    parser.add_argument("--overload-s", type=float, default=120.0)
    parser.add_argument("--prompt-words", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, help="JSON file with every figure")
    args = parser.parse_args()
    console = Console()
    command = [
        *(sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", args.model, "--port", "0"),
        *("--max-batch-size", str(args.batch), "--max-queued-requests", str(args.queue), "--cold-bytes", "512MiB"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next((found[1] for line in process.stdout if (found := re.search(r"(http://\S+)/v1", line))), None)
        if url is None:
            console.print(f"the server ended with status {process.wait()}")
            return 1
        clients = Clients(url, args.model, args.prompt_words, args.tokens, seed=0)
        limit_s = 3 * (args.baseline_s + args.overload_s) + STOP_S
        phases = asyncio.run(asyncio.wait_for(measure(clients, args, process.pid, console), limit_s))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    figures = report(phases, console)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures), encoding="utf-8")
    return 0 if all(figures["goals"].values()) else 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
