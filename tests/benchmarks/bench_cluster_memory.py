"""Cost of catalog look-ups in growing clusters, and of fetching chunks from another node instead of this one.

    python tests/benchmarks/bench_cluster_memory.py --out DIR [--rows growth fetch] [--chunks N …] [--tiers N …]

`growth`: a real Redis with entries of so many chunks on so many living tiers, simulated, each chunk on two of them. Per
window of a fixed budget of chunks: where are they (`locate_ms`), the longest stored prefix of as many (`prefix_ms`), in
which order tiers hold them (`placement_ms`); and, linear in the chunks of a sequence, the choice among all of them
(`select_ms`). `fetch`: two nodes of one machine, each with a memory tier, and a client on the second: the time until a
stored prefix is held there, its chunks on the other node (`remote`), then on its own (`local`), and verified.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from harness import append_row, machine_facts, now, percentiles
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forecache.cluster.launch.cluster import RAY_SYSTEM_CONFIG
from forecache.cluster.launch.redis_server import EmbeddedRedis
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import select
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.tier.actor import TierSettings, start_tier
from forecache.workers.memory.tier.catalog import Catalog, TierRecord
from forecache.workers.memory.tier.fetch import rendezvous

BUDGET = 128
REPEAT = 50
COPIES = 2
LAYOUT = attention_layout("m", layers=30, kv_heads=3, head_dim=64, chunk_tokens=64, dtype=torch.float32)
INDEX_NBYTES = 32 << 10


@dataclass(frozen=True)
class Growth:
    """Milliseconds, p50 of as many repetitions; ``publish_us``: microseconds for one entry, in batches."""

    chunks: int
    tiers: int
    budget: int
    locate_ms: float
    prefix_ms: float
    placement_ms: float
    select_ms: float
    publish_us: float
    repeat: int
    facts: str
    date: str


@dataclass(frozen=True)
class Fetch:
    """``gb_per_s`` is of chunk and index bytes; ``local`` verifies the bytes it finds, as a worker does."""

    where: str
    chunks: int
    chunk_bytes: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gb_per_s: float
    repeat: int
    facts: str
    date: str


def key_of(number: int) -> ChunkKey:
    return number.to_bytes(16, "little")


def milliseconds(run: Callable[[int], object], repeat: int = REPEAT) -> list[float]:
    """Of each call; it gets its number."""
    times = []
    for number in range(repeat):
        start_s = time.perf_counter()
        run(number)
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def growth(chunks: int, tiers: int, facts: str) -> Growth:
    rng = np.random.default_rng(0)
    tier_ids = [f"run-tier-{number:016x}" for number in range(tiers)]
    with EmbeddedRedis() as server, Catalog(server.url, timeout_s=60) as catalog:
        for tier_id in tier_ids:
            catalog.heartbeat(TierRecord(tier_id, "life", "node", chunks, chunks), expiry_s=3600)
        of_tier: dict[str, list[ChunkKey]] = {tier_id: [] for tier_id in tier_ids}
        for number in range(chunks):
            for copy in range(min(COPIES, tiers)):
                of_tier[tier_ids[(number + copy) % tiers]].append(key_of(number))
        start_s = time.perf_counter()
        for tier_id, keys in of_tier.items():
            catalog.publish(tier_id, "life", keys)
        publish_us = 1e6 * (time.perf_counter() - start_s) / sum(map(len, of_tier.values()))
        windows = [[key_of(int(n)) for n in rng.choice(chunks, BUDGET, replace=False)] for _ in range(REPEAT)]
        starts = rng.integers(0, chunks - BUDGET, REPEAT)
        prefixes = [[key_of(int(start) + n) for n in range(BUDGET)] for start in starts]
        assert all(len(places) == min(COPIES, tiers) for places in catalog.locate(windows[0]))
        locate = milliseconds(lambda number: catalog.locate(windows[number]))
        prefix = milliseconds(lambda number: catalog.stored_run(prefixes[number]))
    placement = milliseconds(lambda number: [rendezvous(key, tier_ids) for key in windows[number]])
    scores = rng.random(chunks, dtype=np.float32)
    config = SelectionConfig()
    choice = milliseconds(
        lambda _: select(scores, policy="lookahead", chunks=chunks, budget=BUDGET, config=config), min(REPEAT, 10)
    )
    p50 = [percentiles(times)[1] for times in (locate, prefix, placement, choice)]
    return Growth(chunks, tiers, BUDGET, *p50, publish_us, REPEAT, facts, now())


class Client:
    """A worker's memory client on a tier's node."""

    def __init__(self, tier: Any) -> None:
        self._memory = RemoteMemory(lambda: tier, deadline_s=60)

    def write(self, keys: list[ChunkKey]) -> None:
        for key in keys:
            [place] = self._memory.reserve_slots("w/write", [key])
            self._memory.arena.chunks[place.ref.slot].random_(256)
            self._memory.arena.seal(place.ref, key, self._memory.arena.digests(place.ref.slot))
            self._memory.commit("w/write", [(key, place.ref)])
        self._memory.release("w/write")

    def hold_ms(self, keys: list[ChunkKey]) -> float:
        start_s = time.perf_counter()
        refs = self._memory.hold_prefix("w/hold", keys)
        assert len(refs) == len(keys)
        assert all(self._memory.arena.check(ref, key) for ref, key in zip(refs, keys, strict=True))
        took_ms = 1e3 * (time.perf_counter() - start_s)
        self._memory.release("w/hold")
        return took_ms


def fetch(chunks: int, repeat: int, facts: str) -> list[Fetch]:
    node = {"num_cpus": 1, "object_store_memory": 256 << 20}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": RAY_SYSTEM_CONFIG}
    )
    cluster.add_node(**node)
    try:
        ray.init(address=cluster.address, namespace="bench", log_to_driver=False)
        with EmbeddedRedis("127.0.0.1") as server, tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            slots = chunks * repeat + 64
            memory = MemoryConfig(
                cold_bytes=(4 << 20) + slots * (LAYOUT.nbytes + INDEX_NBYTES + 64), arena_dir=Path(directory)
            )
            settings = TierSettings(memory, LAYOUT, INDEX_NBYTES, "index", "bench", server.url)
            clients, tiers = [], []
            for number, one in enumerate(cluster.list_all_nodes()):
                tiers.append(start_tier(settings, f"bench-{number}", one.node_id))
                here = NodeAffinitySchedulingStrategy(one.node_id, soft=False)
                clients.append(ray.remote(Client).options(num_cpus=0, scheduling_strategy=here).remote(tiers[-1]))
            times: dict[str, list[float]] = {"remote": [], "local": []}
            with Catalog(server.url) as catalog:
                for number in range(repeat):
                    keys = [key_of(number * chunks + n) for n in range(chunks)]
                    ray.get(clients[0].write.remote(keys))
                    while not all(catalog.locate(keys)):
                        time.sleep(0.05)
                    for where in times:
                        times[where].append(ray.get(clients[1].hold_ms.remote(keys)))
            for tier in tiers:
                ray.get(tier.shutdown.remote())
                ray.kill(tier)
    finally:
        ray.shutdown()
        cluster.shutdown()
    nbytes = chunks * (LAYOUT.nbytes + INDEX_NBYTES)
    rows = []
    for where, taken in times.items():
        p20, p50, p80 = percentiles(taken)
        rows.append(Fetch(where, chunks, LAYOUT.nbytes, p20, p50, p80, nbytes / p50 / 1e6, repeat, facts, now()))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the CSV files")
    parser.add_argument("--rows", nargs="+", choices=["growth", "fetch"], default=["growth", "fetch"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--tiers", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--fetch-chunks", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--repeat", type=int, default=5, help="of each fetch")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(machine_facts(torch.device("cpu")))
    if "growth" in args.rows:
        for chunks in args.chunks:
            for tiers in args.tiers:
                row = growth(chunks, tiers, facts)
                append_row(args.out / "cluster-memory-growth.csv", row)
                print({name: value for name, value in asdict(row).items() if name != "facts"}, flush=True)
    if "fetch" in args.rows:
        for chunks in args.fetch_chunks:
            for fetched in fetch(chunks, args.repeat, facts):
                append_row(args.out / "cluster-memory-fetch.csv", fetched)
                print({name: value for name, value in asdict(fetched).items() if name != "facts"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
