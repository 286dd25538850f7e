"""Decode speed of a session whose chunks are on another node, compared with one whose chunks are local.

    python tests/benchmarks/bench_remote_session.py --out DIR

Two nodes of one machine, each with a memory tier and a decode worker (an engine, without Serve). The chunks of one
session are stored on the first node under their true keys: one chunk of random K/V stands for all. The first node's
worker resumes it from its own arena (`local`), then the second one's, whose arena holds at most a tenth of the chunks
(`remote`). In every window a share of the chunks that scores bring in is replaced by those longest away (`turnover`).
`decode_tokens_per_s` counts from the first token to the last; `loopback_gb_per_s` is one TCP connection on this host,
`ray_gb_per_s` an object of one batch from node to node, both measured in the same run.
"""

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from client import Client
from harness import SHAPES, append_row, machine_facts, now, write_model
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from synthetic import SyntheticIndexer, make_template

from forecache.cluster.launch.cluster import RAY_SYSTEM_CONFIG
from forecache.cluster.launch.redis_server import EmbeddedRedis
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.core.config import EngineConfig
from forecache.workers.engine.build import build_engine
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.keys import prefix_keys, root_key
from forecache.workers.memory.format.layout import chunk_fingerprint
from forecache.workers.memory.tier.actor import TierSettings, start_tier
from forecache.workers.memory.tier.catalog import Catalog
from forecache.workers.memory.tier.fetch import BATCH_BYTES
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.step.architecture import Backbone

NAMESPACE = "bench"
CHUNK_TOKENS = 64


@dataclass(frozen=True)
class RemoteSession:
    """``here``: the most of the session's chunks that the worker's arena can hold / all; ``turnover``: what was asked
    for; ``late_windows`` of ``windows``: sets that came after their boundary."""

    where: str
    shape: str
    chunks: int
    chunk_bytes: int
    here: float
    keep_ratio: float
    turnover: float
    tokens: int
    first_token_s: float
    decode_tokens_per_s: float
    recalled_chunks: int
    fetched_chunks: int
    late_windows: int
    loopback_gb_per_s: float
    ray_gb_per_s: float
    threads: int
    facts: str
    date: str


def load(directory: Path, threads: int) -> tuple[Backbone, IndexSpec]:
    torch.set_num_threads(threads)
    backbone = load_backbone(
        directory, dtype="float32", device="cpu", chunk_tokens=CHUNK_TOKENS, load_format="dummy", seed=0
    )
    indexer = IndexerConfig(manifest=str(directory / "heads.json"), checkpoint="none")
    return backbone, backbone.architecture.choose_scorer(indexer, "bench", backbone).spec


class Worker:
    """An engine over the tier of its node, asked for one answer at a time."""

    def __init__(self, tier: Any, directory: Path, keep_ratio: float, hot_chunks: int, threads: int, name: str) -> None:
        backbone, spec = load(directory, threads)
        self._spec = spec
        self._memory = RemoteMemory(lambda: tier, deadline_s=60, peers=RemotePeers(NAMESPACE, 60))
        self._indexer = SyntheticIndexer(LocalIndexer(spec, 1, Arena.attach), keep_ratio, SelectionConfig())
        config = EngineConfig(
            model=str(directory), dtype="float32", chunk_tokens=CHUNK_TOKENS, keep_ratio=keep_ratio,
            min_resident_tokens=0, threads=threads,
            hot_bytes=hot_chunks * backbone.layout.nbytes,
        )  # fmt: skip
        self._engine = build_engine(
            backbone, None, config, SelectionConfig(), self._memory, self._indexer, spec, name
        )  # fmt: skip
        self._layout = backbone.layout

    def store(self, prompt: list[int]) -> int:
        """Put a chunk into cold memory as each full one of ``prompt``; returns how many."""
        template, arena = make_template(self._layout, self._spec), self._memory.arena
        root = root_key(chunk_fingerprint(self._layout, self._layout))
        keys = list(prefix_keys(root, prompt[:-1], CHUNK_TOKENS))
        for start in range(0, len(keys), 16):
            places = self._memory.reserve_slots("w/store", keys[start : start + 16])
            for place in places:
                arena.chunks[place.ref.slot] = torch.from_numpy(template.chunk)
                arena.index[place.ref.slot] = torch.from_numpy(template.record)
                arena.seal(place.ref, place.key, arena.digests(place.ref.slot), template.device_checksum)
            self._memory.commit("w/store", [(place.key, place.ref) for place in places])
        self._memory.release("w/store")
        return len(keys)

    def answer(self, prompt: list[int], tokens: int, turnover: float) -> dict[str, float]:
        """Resume ``prompt`` with nothing hot, and decode."""
        self._engine.flush()
        self._engine.pool.evict_all()
        self._indexer.impose(turnover)
        client = Client(self._engine)
        track = client.add(prompt, tokens)
        client.finish()
        first, last = track.token_s[0], track.token_s[-1]
        self._engine.flush()
        return {
            "first_token_s": first - track.added_s,
            "decode_tokens_per_s": (len(track.token_s) - 1) / (last - first),
            "recalled_chunks": track.account.recalled_chunks,
            "late_windows": track.account.late_windows,
        }


def loopback_gb_per_s(nbytes: int = 1 << 30) -> float:
    """One TCP connection over 127.0.0.1."""
    block = memoryview(bytearray(1 << 20))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as out:
                for _ in range(nbytes // len(block)):
                    out.sendall(block)

        sender = threading.Thread(target=send)
        sender.start()
        incoming, _ = server.accept()
        start_s, got = time.perf_counter(), 0
        with incoming:
            while count := incoming.recv_into(block):
                got += count
        sender.join()
    return got / (time.perf_counter() - start_s) / 1e9


class Sender:
    """Makes objects on its node."""

    def make(self, nbytes: int) -> np.ndarray:
        return np.ones(nbytes, np.uint8)


class Receiver:
    """Gets objects of another node."""

    def seconds(self, sender: Any, nbytes: int, repeat: int) -> list[float]:
        times = []
        for _ in range(repeat):
            ref = sender.make.remote(nbytes)
            ray.wait([ref], fetch_local=False)
            start_s = time.perf_counter()
            ray.get(ref)
            times.append(time.perf_counter() - start_s)
        return times


def measure(args: argparse.Namespace, directory: Path) -> list[RemoteSession]:
    shape = SHAPES[args.shape]
    write_model(directory, shape)
    backbone, spec = load(directory, args.threads)
    chunks = args.context // CHUNK_TOKENS
    slot_bytes = backbone.layout.nbytes + spec.nbytes + 64
    here = max(8, chunks // 10)
    slots = {"local": chunks + args.tokens // CHUNK_TOKENS + 32, "remote": here}
    hot = int(2.2 * args.keep_ratio * chunks) + 24
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 250, (chunks * CHUNK_TOKENS + 33,), generator=generator).tolist()
    node = {"num_cpus": 1, "object_store_memory": 512 << 20}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": RAY_SYSTEM_CONFIG}
    )
    cluster.add_node(**node)
    rows = []
    try:
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        with EmbeddedRedis("127.0.0.1") as server, Catalog(server.url) as catalog:
            workers, tiers, helpers = {}, {}, {}
            for (where, count), one in zip(slots.items(), cluster.list_all_nodes(), strict=True):
                arena_dir = directory / where
                arena_dir.mkdir()
                memory = MemoryConfig(
                    cold_bytes=(4 << 20) + count * slot_bytes, arena_dir=arena_dir, call_deadline_s=60,
                    remote_index_bytes=2 * chunks * (spec.nbytes + 64),
                )  # fmt: skip
                settings = TierSettings(memory, backbone.layout, spec.nbytes, spec.fingerprint, NAMESPACE, server.url)
                tiers[where] = start_tier(settings, f"bench-{where}", one.node_id)
                here_only: Any = {
                    "num_cpus": 0,
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(one.node_id, False),
                }
                worker = ray.remote(Worker).options(**here_only)
                workers[where] = worker.remote(
                    tiers[where], directory, args.keep_ratio, hot, args.threads, f"w-{where}"
                )
                helpers[where] = ray.remote(Sender if where == "local" else Receiver).options(**here_only).remote()
            stored = ray.get(workers["local"].store.remote(prompt))
            keys = list(
                prefix_keys(root_key(chunk_fingerprint(backbone.layout, backbone.layout)), prompt[:-1], CHUNK_TOKENS)
            )
            while not all(catalog.locate(keys)):
                time.sleep(0.1)
            loopback = loopback_gb_per_s()
            times = ray.get(helpers["remote"].seconds.remote(helpers["local"], BATCH_BYTES, 9))
            ray_rate = BATCH_BYTES / sorted(times)[4] / 1e9
            facts = json.dumps(machine_facts(torch.device("cpu")))
            for turnover in args.turnover:
                for where, worker in workers.items():
                    before = ray.get(tiers[where].stats.remote()).fetched_chunks
                    told = ray.get(worker.answer.remote(prompt, args.tokens, turnover), timeout=args.limit_s)
                    fetched = ray.get(tiers[where].stats.remote()).fetched_chunks - before
                    rows.append(
                        RemoteSession(
                            where=where,
                            shape=args.shape,
                            chunks=stored,
                            chunk_bytes=backbone.layout.nbytes,
                            here=min(1.0, slots[where] / stored),
                            keep_ratio=args.keep_ratio,
                            turnover=turnover,
                            tokens=args.tokens,
                            fetched_chunks=fetched,
                            loopback_gb_per_s=loopback,
                            ray_gb_per_s=ray_rate,
                            threads=args.threads,
                            facts=facts,
                            date=now(),
                            **told,
                        )
                    )
                    append_row(args.out / "remote-session.csv", rows[-1])
                    print({n: v for n, v in asdict(rows[-1]).items() if n not in ("facts", "date")}, flush=True)
            for tier in tiers.values():
                ray.get(tier.shutdown.remote())
    finally:
        ray.shutdown()
        cluster.shutdown()
    return rows


def table(rows: list[RemoteSession]) -> str:
    lines = [
        f"{'turnover':>9}{'local tok/s':>13}{'remote tok/s':>14}{'ratio':>8}{'first token, s: local':>23}{'remote':>8}"
    ]
    for turnover in sorted({row.turnover for row in rows}):
        found = {row.where: row for row in rows if row.turnover == turnover}
        local, remote = found["local"], found["remote"]
        ratio = remote.decode_tokens_per_s / local.decode_tokens_per_s
        lines.append(
            f"{turnover:>9.0%}{local.decode_tokens_per_s:>13.1f}{remote.decode_tokens_per_s:>14.1f}{ratio:>8.2f}"
            f"{local.first_token_s:>23.2f}{remote.first_token_s:>8.2f}"
        )
    row = rows[-1]
    lines.append(
        f"{row.chunks} chunks of {row.chunk_bytes / 2**20:.2f} MiB; loopback {row.loopback_gb_per_s:.2f} GB/s, "
        f"Ray from node to node {row.ray_gb_per_s:.2f} GB/s"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of remote-session.csv")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--context", type=int, default=16384, help="tokens of the stored session")
    parser.add_argument("--tokens", type=int, default=384, help="of each answer")
    parser.add_argument("--keep-ratio", type=float, default=0.135)
    parser.add_argument("--turnover", type=float, nargs="+", default=[0.2, 1.0])
    parser.add_argument("--threads", type=int, default=1, help="of a worker's model")
    parser.add_argument("--limit-s", type=float, default=600, help="longest time of one answer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="forecache-bench-", dir="/dev/shm") as directory:
        print(table(measure(args, Path(directory))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
