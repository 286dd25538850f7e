"""Which worker gets a request: the one with the longest part of its prompt, then the least loaded."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from forecache.workers.decode.messages import ChannelRequest, GenerateRequest
from forecache.workers.decode.settings import actor_name
from forecache.workers.errors import CatalogUnavailableError
from forecache.workers.memory.catalog import Catalog
from forecache.workers.memory.keys import ChunkKey, prefix_keys, root_key

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked", ChannelRequest, GenerateRequest)

CATALOG_RETRY_S = 5.0


class PrefixMemory:
    """Where chunks went: chunk key → names of workers, the least recently used forgotten first."""

    def __init__(self, capacity_chunks: int = 200_000) -> None:
        self._capacity_chunks = capacity_chunks
        self._workers: OrderedDict[ChunkKey, frozenset[str]] = OrderedDict()

    def record(self, keys: Sequence[ChunkKey], worker: str) -> None:
        """``worker`` computes, so will hold, the chunks ``keys``."""
        for key in keys:
            self._workers[key] = self._workers.get(key, frozenset()) | {worker}
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity_chunks:
            self._workers.popitem(last=False)

    def prefix_chunks(self, keys: Sequence[ChunkKey]) -> dict[str, int]:
        """Worker → how many of ``keys``, from the first without a gap, it has seen."""
        chunks: dict[str, int] = {}
        holding: frozenset[str] | None = None
        for at, key in enumerate(keys, start=1):
            holding = (
                self._workers.get(key, frozenset())
                if holding is None
                else holding & self._workers.get(key, frozenset())
            )
            if not holding:
                break
            chunks.update(dict.fromkeys(holding, at))
        return chunks


def rank(
    loads: Mapping[str, int], hot_chunks: Mapping[str, int], stored_chunks: Mapping[str, int], imbalance: int
) -> list[list[str]]:
    """Workers in ranks, best first; inside a rank Ray Serve takes the shortest queue.

    The first rank has the longest prefix on the GPU, among equals the longest in their node's memory. Who has
    ``imbalance`` more requests than the least loaded worker is not preferred for its prefix: a prefix can be computed
    again, a queue can't be jumped.
    """
    least = min(loads.values())
    willing = [name for name in loads if loads[name] - least < imbalance]
    best = max((hot_chunks.get(name, 0), stored_chunks.get(name, 0)) for name in willing)
    if best == (0, 0):
        return [list(loads)]
    first = [name for name in willing if (hot_chunks.get(name, 0), stored_chunks.get(name, 0)) == best]
    rest = [name for name in loads if name not in first]
    return [first, rest] if rest else [first]


class PrefixAffinityRouter(RequestRouter):
    """Ray Serve's request router over decode workers, in the process of the handle that sends to them.

    What is on which GPU it knows from its own routing; what is stored on which node from the catalog, a hint that it
    does without when Redis does not answer.
    """

    def initialize_state(  # type: ignore[override]
        self, chunk_tokens: int, namespace: str, run: str, redis_url: str | None = None, imbalance: int = 8
    ) -> None:
        self._namespace, self._run = namespace, run
        self._chunk_tokens = chunk_tokens
        self._imbalance = imbalance
        self._memory = PrefixMemory()
        self._catalog = Catalog(redis_url) if redis_url else None
        self._catalog_asleep_until_s = 0.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if (channel := _argument(pending_request, ChannelRequest)) is not None:
            # to its worker; where that is gone, to anyone, who says that it has nothing
            meant = [r for r in candidate_replicas if _name(r.replica_id) == channel.worker_id]
            return [meant or candidate_replicas]
        request = _argument(pending_request, GenerateRequest)
        if request is None or len(candidate_replicas) < 2:
            return [candidate_replicas]
        replicas = {_name(replica.replica_id): replica for replica in candidate_replicas}
        keys = self._keys(request, candidate_replicas)
        stored = await self._stored_chunks(keys, candidate_replicas)
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        ranks = rank(loads, self._memory.prefix_chunks(keys), stored, self._imbalance)
        return [[replicas[name] for name in names] for names in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = _argument(pending_request, GenerateRequest)
        if request is not None:
            self._memory.record(self._keys(request, list(self.curr_replicas.values())), _name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        left = [replica for name, replica in self.curr_replicas.items() if name not in {r.replica_id for r in replicas}]
        super().update_replicas(replicas)
        for replica in left:
            self._reclaim(replica)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        replica = self.curr_replicas.get(replica_id)
        super().on_replica_actor_died(replica_id)
        if replica is not None:
            self._reclaim(replica)

    def _reclaim(self, replica: RunningReplica) -> None:
        """What a worker that is gone held in its node's memory tier can be evicted again."""
        try:
            tier = ray.get_actor(actor_name(self._run, "tier", replica.node_id), namespace=self._namespace)
        except ValueError:
            return  # the node is gone too
        tier.release_worker.remote(_name(replica.replica_id))

    def _keys(self, request: GenerateRequest, replicas: Sequence[RunningReplica]) -> list[ChunkKey]:
        """Chunk keys of the prompt: those of the catalog once a worker has told its layout."""
        layouts = (replica.routing_stats.get("layout_fingerprint") for replica in replicas)
        layout = next((layout for layout in layouts if layout), "")
        root = root_key(layout, request.cache.cache_salt)
        return list(prefix_keys(root, request.prompt_token_ids, self._chunk_tokens))

    async def _stored_chunks(self, keys: list[ChunkKey], replicas: Sequence[RunningReplica]) -> dict[str, int]:
        """Worker → chunks of the longest prefix in its own node's memory tier."""
        if self._catalog is None or not keys or time.monotonic() < self._catalog_asleep_until_s:
            return {}
        try:
            chunks = await asyncio.to_thread(self._catalog.prefixes, keys)
        except CatalogUnavailableError as error:
            logger.warning("routing without the catalog for %.0f s: %s", CATALOG_RETRY_S, error)
            self._catalog_asleep_until_s = time.monotonic() + CATALOG_RETRY_S
            return {}
        return {
            _name(replica.replica_id): chunks.get(str(replica.routing_stats.get("tier_id")), 0) for replica in replicas
        }


def _argument(pending: PendingRequest | None, kind: type[Asked]) -> Asked | None:
    """What a worker is asked, if it is of this kind."""
    if pending is None or not pending.args or not isinstance(pending.args[0], kind):
        return None
    return pending.args[0]


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
