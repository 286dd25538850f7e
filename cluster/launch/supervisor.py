"""Keeps a memory tier running on every node that gives memory, and the embedded Redis."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources

from forecache.cluster.launch.autoscaling import memory_nodes
from forecache.cluster.tiers import INTERNAL_HOLDERS, Tiers, actor_names
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.tier.actor import TierSettings, gives_memory, start_tier

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
AUTOSCALE_PERIOD_S = 10.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0


class Supervisor:
    """A thread that starts missing memory tiers and reclaims what dead workers held.

    It stores no list of tiers: each round asks Ray for nodes and actors, and a tier for the settings. The first worker
    creates the first tier. Ray restarts a tier whose process died; this thread starts tiers on new nodes, and those
    that failed to start. Each round also calls ``revive``, which restarts the embedded Redis.
    """

    def __init__(
        self,
        config: MemoryConfig,
        tiers: Tiers,
        revive: Callable[[], None] = lambda: None,
        period_s: float = PERIOD_S,
    ) -> None:
        self._config = config
        self._tiers = tiers
        self._revive = revive
        self._period_s = period_s
        self._settings: TierSettings | None = None
        self._failures: dict[str, tuple[float, float]] = {}  # node id -> (try again at, backoff)
        self._autoscale_again_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forecache-supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            try:
                self.tick()
            except Exception:
                # nothing else supervises the tiers, and the next round may succeed
                logger.exception("a round of the supervisor failed; it tries again")

    def tick(self) -> None:
        """One round: start what is missing, reclaim what dead workers held."""
        self._revive()
        nodes = [node["NodeID"] for node in ray.nodes() if gives_memory(node, self._config)]  # type: ignore[no-untyped-call]
        wanted = {self._tiers.name(node_id): node_id for node_id in nodes}
        tiers = self._tiers.actors()
        if self._settings is None:
            self._settings = next(iter(self._tiers.ask("settings", only=tiers).values()), None)
            if self._settings is None:
                return  # no worker has created the first one yet
        for name in wanted.keys() - tiers.keys():
            self._start(name, wanted[name], self._settings)
        self._reclaim(tiers)
        if self._config.node_resource is not None and self._config.max_memory_nodes:
            self._autoscale(tiers, self._config.node_resource)

    def _start(self, name: str, node_id: str, settings: TierSettings) -> None:
        again_s, backoff_s = self._failures.get(node_id, (0.0, FIRST_BACKOFF_S / 2))
        if time.monotonic() < again_s:
            return
        logger.info("starting the memory tier of node %s", node_id)
        # if it fails, the next round finds it missing
        self._failures[node_id] = time.monotonic() + 2 * backoff_s, min(MAX_BACKOFF_S, 2 * backoff_s)
        start_tier(settings, name, node_id)

    def _autoscale(self, tiers: "dict[str, ActorHandle[Any]]", resource: str) -> None:
        """Ask Ray's autoscaler for memory nodes, including those that run: Ray counts no use of them, and would remove
        them as idle."""
        if time.monotonic() < self._autoscale_again_s:
            return
        self._autoscale_again_s = time.monotonic() + AUTOSCALE_PERIOD_S
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        now = sum(1 for node in nodes if node["Alive"] and node["Resources"].get(resource, 0) > 0)
        wanted = memory_nodes(now, self._tiers.ask("stats", only=tiers).values(), self._config.max_memory_nodes)
        if wanted > now:
            logger.info("%d memory nodes run, asking for %d", now, wanted)
        request_resources(bundles=[{resource: 1}] * wanted)

    def _reclaim(self, tiers: "dict[str, ActorHandle[Any]]") -> None:
        """Release what workers hold that have ended."""
        holding = self._tiers.ask("holding_workers", only=tiers)
        # list actors after that: a worker that holds something exists already
        living = {name.rpartition("#")[2] for name in actor_names()}
        dead = {name: [worker for worker in workers if worker not in living] for name, workers in holding.items()}
        for name, workers in dead.items():
            for worker in workers:
                if worker not in INTERNAL_HOLDERS:
                    logger.info("worker %s is gone: %s reclaims what it held", worker, name)
                    tiers[name].release_worker.remote(worker)
