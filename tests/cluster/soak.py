"""Runs a cluster of several nodes at 80 % of its capacity, and checks that no process grows. A script:

    python tests/cluster/soak.py --minutes 10 --out tests/benchmarks/results/soak.json

First as many requests as are answered side by side tell the capacity, then requests come at random (Poisson) at a part
of that rate. They are of a fixed set, larger than the arenas: chunks are stored, moved, evicted and fetched all along,
and what remembers prompts has seen them all when the second quarter begins. The anonymous memory (RssAnon) of every
process is sampled. Exit status 1 unless that of each is flat (mean of the last quarter at most 3 % above that of the
second) and every request is answered.
"""

import argparse
import json
import os
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
from processes import processes_below
from ray.cluster_utils import Cluster
from ray_nodes import HEAD, NODE

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import running

ROLES = {
    "ray::MemoryTier": "memory tier",
    "ray::IndexerActor": "indexer",
    "DecodeWorker": "decode worker",
    "ServeReplica:forecache:": "ingress",
    "ray::ProxyActor": "HTTP proxy",
    "ServeController": "Serve controller",
    "redis-server": "Redis",
    "gcs_server": "Ray GCS",
    "raylet": "raylet",
}
FLOOR_BYTES = 1 << 20
"""Growth by less than that is none: Ray's smallest helpers have a few MiB in all."""
CAPACITY_S, SAMPLE_S = 20.0, 2.0


@dataclass(frozen=True)
class Growth:
    """Mean RssAnon of a process in bytes, over its samples of the second and of the last quarter."""

    role: str
    pid: int
    second_quarter: float
    last_quarter: float

    @property
    def share(self) -> float:
        return self.last_quarter / self.second_quarter - 1

    def is_flat(self, allowed: float) -> bool:
        return self.last_quarter - self.second_quarter <= max(allowed * self.second_quarter, FLOOR_BYTES)


class Load:
    """Sends requests from a fixed set, and counts the answers."""

    def __init__(self, url: str, prompts: int, max_tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        shared = [rng.randrange(1, VOCABULARY) for _ in range(320)]
        self._rng = rng
        self._prompts = [
            (shared if number % 2 else []) + [rng.randrange(1, VOCABULARY) for _ in range(rng.choice((60, 150, 400)))]
            for number in range(prompts)
        ]
        self._max_tokens = max_tokens
        self._client = httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200))
        self._lock = threading.Lock()
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self.slowest_s = 0.0

    def ask(self) -> None:
        with self._lock:
            number = self._rng.randrange(len(self._prompts))
        body = {
            "model": "tiny", "prompt": self._prompts[number], "max_tokens": self._max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "forecache": {"session_id": f"s{number}"},
        }  # fmt: skip
        start_s, failure = time.monotonic(), ""
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                text = "".join(response.iter_text())
                if response.status_code != 200 or "data: [DONE]" not in text:
                    failure = f"{response.status_code}: {text[-200:]}"
        except httpx.HTTPError as error:
            failure = repr(error)
        with self._lock:
            self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)
            if failure:
                self.failures[failure] += 1
            else:
                self.answered += 1

    def side_by_side(self, clients: int, duration_s: float) -> float:
        """Requests per second with so many clients that each send one after the other."""
        end_s, before, start_s = time.monotonic() + duration_s, self.answered, time.monotonic()

        def client() -> None:
            while time.monotonic() < end_s:
                self.ask()

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (self.answered - before) / (time.monotonic() - start_s)

    def at_rate(self, requests_per_s: float, duration_s: float) -> int:
        """Send requests at random times; returns how many. Returns when all are answered."""
        start_s, asked = time.monotonic(), 0
        under_way: list[threading.Thread] = []
        due_s = start_s
        while due_s < start_s + duration_s:
            time.sleep(max(0.0, due_s - time.monotonic()))
            under_way = [thread for thread in under_way if thread.is_alive()]
            under_way.append(threading.Thread(target=self.ask))
            under_way[-1].start()
            asked += 1
            due_s += self._rng.expovariate(requests_per_s)
        for thread in under_way:
            thread.join()
        return asked


class MemorySampler:
    """A thread that samples RssAnon of this process and its descendants."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[int, int]]] = []
        self.roles: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        start_s = time.monotonic()
        while not self._stop.wait(SAMPLE_S):
            found = {**processes_below(os.getpid()), os.getpid(): "driver"}
            self.roles |= {pid: role_of(name) for pid, name in found.items() if pid not in self.roles}
            self.samples.append((time.monotonic() - start_s, {pid: rss_anon(pid) for pid in found}))

    def growth(self) -> list[Growth]:
        """The growth of each process that lived through the second and the last quarter, by role."""
        end_s = self.samples[-1][0]
        second = [sample for at_s, sample in self.samples if end_s / 4 <= at_s < end_s / 2]
        last = [sample for at_s, sample in self.samples if at_s >= 3 * end_s / 4]
        pids = set.intersection(*(set(sample) for sample in [*second, *last]))
        found = [
            Growth(
                self.roles[pid],
                pid,
                statistics.mean(sample[pid] for sample in second),
                statistics.mean(sample[pid] for sample in last),
            )
            for pid in pids
        ]
        return sorted((g for g in found if g.second_quarter > 0), key=lambda g: (g.role, g.pid))

    def gone(self) -> list[str]:
        """Roles of processes that lived in the second quarter and have ended since: none should."""
        end_s = self.samples[-1][0]
        before = {pid for at_s, sample in self.samples if end_s / 4 <= at_s < end_s / 2 for pid in sample}
        return sorted(self.roles[pid] for pid in before - set(self.samples[-1][1]) if self.roles[pid] in ROLES.values())


def role_of(name: str) -> str:
    for part, role in ROLES.items():
        if part in name:
            return role
    return name.strip().split("/")[-1][:24] or "?"


def rss_anon(pid: int) -> int:
    """RssAnon in bytes; 0 for a process that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return 1024 * int(line.split()[1])


def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model, arena_dir = directory / "tiny", directory / "arenas"
    make_model(model)
    arena_dir.mkdir()
    cluster: Any = Cluster(initialize_head=True, head_node_args={**HEAD, "num_cpus": 0})
    for _ in range(args.nodes):
        cluster.add_node(**NODE)
    config = ServeConfig.model_validate(
        {
            "address": cluster.address, "port": 0, "workers": args.nodes, "proxy_location": "HeadOnly",
            "engine": {
                "model": str(model), "chunk_tokens": 16, "hot_bytes": "2MiB", "threads": 1, "max_batch_size": 8,
                "keep_ratio": 0.2, "min_resident_tokens": 0,
            },
            "memory": {"cold_bytes": "16MiB", "arena_dir": arena_dir},
            "indexer": {"manifest": "none"},
        }
    )  # fmt: skip
    try:
        with running(config, lambda text: print(text, flush=True)) as served:
            load = Load(served.url, args.prompts, args.max_tokens, args.seed)
            load.side_by_side(args.clients, min(CAPACITY_S, 20 * args.minutes))  # everything is loaded and compiled
            capacity = load.side_by_side(args.clients, min(CAPACITY_S, 20 * args.minutes))
            rate = args.share * capacity
            print(f"{capacity:.2f} requests/s side by side; now {rate:.2f} requests/s", flush=True)
            with MemorySampler() as sampler:
                asked = load.at_rate(rate, 60 * args.minutes)
    finally:
        cluster.shutdown()
    growth = sampler.growth()
    return {
        "minutes": args.minutes,
        "capacity_requests_per_s": capacity,
        "rate_requests_per_s": rate,
        "asked": asked,
        "failures": dict(load.failures),
        "slowest_s": load.slowest_s,
        "processes": [asdict(g) for g in growth],
        "growing": [g.role for g in growth if not g.is_flat(args.allowed)],
        "gone": sampler.gone(),
    }


def table(result: dict[str, Any]) -> str:
    rows = [f"{'process':26}{'pid':>8}{'second quarter, MiB':>22}{'last quarter, MiB':>20}{'growth':>9}"]
    for g in (Growth(**found) for found in result["processes"]):
        second, last = g.second_quarter / 2**20, g.last_quarter / 2**20
        rows.append(f"{g.role:26}{g.pid:>8}{second:>22.1f}{last:>20.1f}{100 * g.share:>8.1f}%")
    rows += [
        f"{result['asked']} requests at {result['rate_requests_per_s']:.2f}/s "
        f"(capacity {result['capacity_requests_per_s']:.2f}/s), slowest {result['slowest_s']:.1f} s, "
        f"failures: {result['failures'] or 'none'}",
        f"grew: {result['growing'] or 'none'}; ended: {result['gone'] or 'none'}",
    ]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--allowed", type=float, default=0.03, help="growth from the second to the last quarter")
    parser.add_argument("--nodes", type=int, default=2, help="in addition to the head")
    parser.add_argument("--clients", type=int, default=8, help="that measure the capacity")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forecache-soak-", dir="/dev/shm") as directory:
        result = run(args, Path(directory))
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(result["growing"] or result["gone"] or result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
