"""Compares our router (earliest expected first token) with Ray Serve's default, power of two choices. A script:

    python tests/cluster/routing.py --out tests/benchmarks/results/routing.json

Workers on nodes of their own, each with its arena. The same requests come at the same random times (Poisson), first to
a cluster with the one router, then to a new one with the other: half of them share one of a few long beginnings, half
are unlike all others. The beginnings fit the arenas of all nodes together, and not one alone. Told are: time to first
token, the part of it in which stored chunks were found and brought from other nodes, tokens that were found stored,
chunks that came from other nodes, requests of each worker, and how far the busiest worker was ahead of the least busy
one (the pile-up). Times are of one machine that does all of it: other work on it changes them, and not the counts.
It takes two to three seconds for every request there is, less than five minutes as it is set, and ends with status 1
if a request failed.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from faults import VOCABULARY, make_model
from ray import serve
from ray.cluster_utils import Cluster
from ray_nodes import HEAD, NODE

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import running

ROUTERS = ("prefix", "power-of-two")
SAMPLE_S = 0.2


@dataclass(frozen=True)
class Request:
    at_s: float
    shared: bool
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    shared: bool
    first_token_s: float
    cached_tokens: int
    prompt_tokens: int
    locate_s: float
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """The results of one router, in seconds and tokens.

    ``most_ahead``: the largest difference in requests between the busiest and the least busy worker. ``spread``:
    requests answered by each worker.
    """

    router: str
    requests: int
    failed: int
    p50_first_token_s: float
    p99_first_token_s: float
    p50_shared_s: float
    p99_shared_s: float
    p50_unique_s: float
    p99_unique_s: float
    p99_locate_s: float
    fetched_chunks: int
    hit_tokens: int
    prompt_tokens: int
    spread: tuple[int, ...]
    most_ahead: int


def plan(args: argparse.Namespace) -> list[Request]:
    rng = random.Random(args.seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, VOCABULARY) for _ in range(count))

    beginnings = [tokens(args.prefix_tokens) for _ in range(args.prefixes)]
    requests, at_s = [], 0.0
    for number in range(args.requests):
        shared = number % 2 == 0
        prompt = rng.choice(beginnings) + tokens(64) if shared else tokens(args.unique_tokens)
        requests.append(Request(at_s, shared, prompt))
        at_s += rng.expovariate(args.rate)
    return requests


class Clients:
    """Sends every request at its scheduled time."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._client = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))
        self._max_tokens = max_tokens
        self.seen: list[Seen] = []

    def ask(self, request: Request) -> None:
        body = {
            "model": "tiny", "prompt": list(request.prompt), "max_tokens": self._max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        start_s, first_s, usage, error = time.monotonic(), 0.0, {}, ""
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    error = error or (event["error"]["message"] if "error" in event else "")
                    if not first_s and any(choice["text"] for choice in event.get("choices", [])):
                        first_s = time.monotonic() - start_s
                    usage = event.get("usage") or usage
                error = error or ("" if usage else f"status {response.status_code}, no usage")
        except httpx.HTTPError as failure:
            error = repr(failure)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        locate_s = usage.get("forecache", {}).get("locate_s", 0.0)
        self.seen.append(Seen(request.shared, first_s, cached, len(request.prompt), locate_s, error))

    def run(self, requests: list[Request]) -> None:
        start_s = time.monotonic()
        threads = []
        for request in requests:
            time.sleep(max(0.0, start_s + request.at_s - time.monotonic()))
            threads.append(threading.Thread(target=self.ask, args=(request,)))
            threads[-1].start()
        for thread in threads:
            thread.join()


class Watch:
    """Samples how many requests each worker has, from the workers' statistics."""

    def __init__(self) -> None:
        self._handle = serve.get_deployment_handle("DecodeWorker", "forecache")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.most_ahead = 0
        self._before = self.finished()
        self._fetched_before = self.fetched()

    def finished(self) -> Counter[str]:
        return Counter({worker.worker_id: worker.engine.counters.finished_requests for worker in self._stats()})

    def fetched(self) -> int:
        """Chunks fetched from other nodes since the start. Every worker runs on a separate node."""
        return sum(worker.tier.fetched_chunks for worker in self._stats() if worker.tier is not None)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def spread(self) -> tuple[int, ...]:
        """The requests that each worker has answered since the start."""
        now = self.finished()
        return tuple(sorted((now[worker] - self._before[worker] for worker in now), reverse=True))

    def fetched_chunks(self) -> int:
        """The counts since the start."""
        return self.fetched() - self._fetched_before

    def _stats(self) -> list[Any]:
        return list(self._handle.broadcast("stats").results(timeout_s=60))

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            loads = [worker.engine.running + worker.engine.waiting for worker in self._stats()]
            self.most_ahead = max(self.most_ahead, max(loads) - min(loads))


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else 0.0


def measure(args: argparse.Namespace, router: str, model: Path, directory: Path) -> Figures:
    arena_dir = directory / router
    arena_dir.mkdir()
    cluster: Any = Cluster(initialize_head=True, head_node_args={**HEAD, "num_cpus": 0})
    for _ in range(args.workers):
        cluster.add_node(**NODE)
    config = ServeConfig.model_validate(
        {
            "address": cluster.address, "port": 0, "workers": args.workers, "proxy_location": "HeadOnly",
            "router": router,
            "engine": {
                "model": str(model), "chunk_tokens": 64, "hot_bytes": args.hot_bytes, "threads": 1,
                "max_batch_size": 8, "keep_ratio": 0.2, "min_resident_tokens": 0,
            },
            "memory": {"cold_bytes": args.cold_bytes, "arena_dir": arena_dir},
            "indexer": {"manifest": "none"},
        }
    )  # fmt: skip
    try:
        with running(config, lambda text: print(f"{router}: {text}", flush=True)) as served:
            clients = Clients(served.url, args.max_tokens)
            clients.run([Request(0.0, False, (7,) * 200)] * (2 * args.workers))  # every worker has computed something
            clients.seen.clear()
            with Watch() as watch:
                clients.run(plan(args))
                spread, fetched = watch.spread(), watch.fetched_chunks()
    finally:
        cluster.shutdown()
    good = [seen for seen in clients.seen if not seen.error]
    for seen in clients.seen:
        if seen.error:
            print(f"{router}: {seen.error}", flush=True)
    times = {
        kind: [seen.first_token_s for seen in good if shared is None or seen.shared is shared]
        for kind, shared in (("all", None), ("shared", True), ("unique", False))
    }
    return Figures(
        router,
        len(clients.seen),
        len(clients.seen) - len(good),
        *(percentile(times[kind], percent) for kind in ("all", "shared", "unique") for percent in (50, 99)),
        p99_locate_s=percentile([seen.locate_s for seen in good], 99),
        fetched_chunks=fetched,
        hit_tokens=sum(seen.cached_tokens for seen in good),
        prompt_tokens=sum(seen.prompt_tokens for seen in good),
        spread=spread,
        most_ahead=watch.most_ahead,
    )


def table(found: list[Figures]) -> str:
    names = (
        "router",
        "p50 s",
        "p99 s",
        "shared p50",
        "p99",
        "unique p50",
        "p99",
        "locate p99",
        "fetched",
        "hit tokens",
        "spread",
        "ahead",
        "failed",
    )
    rows = ["".join(f"{name:>13}" for name in names)]
    for f in found:
        numbers = [
            f.p50_first_token_s, f.p99_first_token_s, f.p50_shared_s, f.p99_shared_s, f.p50_unique_s, f.p99_unique_s,
            f.p99_locate_s,
        ]  # fmt: skip
        cells = [
            f.router,
            *(f"{n:.3f}" for n in numbers),
            str(f.fetched_chunks),
            f"{f.hit_tokens / max(f.prompt_tokens, 1):.0%}",
        ]
        cells += ["/".join(map(str, f.spread)), str(f.most_ahead), str(f.failed)]
        rows.append("".join(f"{cell:>13}" for cell in cells))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="each on a separate node")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--prefixes", type=int, default=12, help="beginnings that are shared")
    parser.add_argument("--prefix-tokens", type=int, default=3072)
    parser.add_argument("--unique-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hot-bytes", default="64MiB")
    parser.add_argument("--cold-bytes", default="160MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forecache-routing-", dir="/dev/shm") as directory:
        model = Path(directory) / "tiny"
        make_model(model, args.hidden_size, args.layers)
        found: list[Figures] = []
        for router in ROUTERS:
            found.append(measure(args, router, model, Path(directory)))
            print(table(found), flush=True)
    if args.out is not None:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.write_text(json.dumps({"settings": settings, "routers": [asdict(f) for f in found]}, indent=1) + "\n")
    return int(any(f.failed for f in found))


if __name__ == "__main__":
    sys.exit(main())
