"""The Ray Serve replica around one engine; it starts its node's memory tier and indexer actors if none run yet."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forecache.indexer.serving.actor import IndexerActor, RemoteIndexer
from forecache.indexer.serving.fallback import SharedIndexers
from forecache.indexer.serving.protocol import Indexer
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.core.config import WorkerSettings
from forecache.workers.core.requests import (
    ChannelRequest,
    EventBatch,
    GenerateRequest,
    Refused,
    RequestNews,
    TokenEvent,
)
from forecache.workers.core.stats import ScorerStats, WorkerSizes, WorkerStats
from forecache.workers.core.worker_report import Reporter
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.build import LoadedModel, build_engine, build_gpu_indexer, load_model
from forecache.workers.engine.channels import Channels
from forecache.workers.errors import ArenaError, ChunkLostError, InvalidRequestError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.cold_size import cold_share
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.format.layout import chunk_fingerprint
from forecache.workers.memory.tier.actor import TierSettings, gives_memory, start_tier

logger = logging.getLogger(__name__)

ACTOR_START_DEADLINE_S = 60.0
CPU_NICENESS = 5
"""Niceness of the engine's threads on a CPU, where the ingress needs the same cores: it should send tokens and refuse
requests without delay."""


class DecodeWorker:
    """One engine as a Ray Serve replica. The first worker on a node starts its memory tier and indexers."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Loads the model. Raises a :class:`ForecacheError` that says why the model can't be served."""
        threads = settings.engine.threads
        # Ray limits OpenMP to the replica's logical CPUs, but these only place the replica
        cores = len(os.sched_getaffinity(0))
        # one core is left for ingress, tier and indexer: with a thread on every core, each step would wait for them
        torch.set_num_threads(threads or (cores - 1 if cores > 2 else cores))
        self._node_id = ray.get_runtime_context().get_node_id()
        self._worker_id = serve.get_replica_context().replica_id.unique_id
        model = load_model(settings.engine, settings.memory, settings.indexer)
        config, backbone, cold, spec = model.config, model.backbone, model.cold_layout, model.scorer.spec
        self._scorer = model.scorer
        self._tier_id = settings.actor_name("tier", self._node_id)
        fingerprint = chunk_fingerprint(backbone.layout, cold)
        memory = settings.memory
        [node] = [node for node in ray.nodes() if node["NodeID"] == self._node_id]  # type: ignore[no-untyped-call]
        if not gives_memory(node, memory):
            raise ArenaError(
                f"this node has no memory tier, because it lacks the Ray resource {memory.tier_resource!r}: start Ray "
                "there with --resources, or unset --tier-resource"
            )
        sharers, device_type = settings.sharers(node), backbone.device.type
        weights = sum(weight.nbytes for weight in backbone.model.parameters())
        tiers = TierSettings(
            memory, cold, spec.nbytes, spec.fingerprint, settings.namespace, settings.redis_url, settings.telemetry,
            cold_share(device_type), (sharers - 1) * weights,
        )  # fmt: skip
        self._memory = RemoteMemory(
            lambda: start_tier(tiers, self._tier_id, self._node_id),
            memory.call_deadline_s,
            fetch_deadline_s=memory.fetch_deadline_s,
            peers=RemotePeers(settings.namespace, memory.call_deadline_s) if settings.redis_url is not None else None,
        )
        self._indexer = self._make_indexer(settings, model)
        engine = build_engine(
            backbone,
            model.tokenizer,
            config,
            settings.selection,
            self._memory,
            self._indexer,
            spec,
            self._worker_id,
            cold,
            model.scorer.query_encoder,
            sharers,
        )
        self._reporter = Reporter(fingerprint, self._tier_id, cold.nbytes, engine.config.batch_size)
        self._sizes = WorkerSizes(
            hot_bytes=engine.pool.num_slots * backbone.layout.nbytes,
            hot_tokens=engine.pool.num_slots * config.chunk_tokens,
            cold_bytes=self._memory.arena.description.file_bytes,
            cold_tokens=self._memory.arena.slots * config.chunk_tokens,
            batch_size=engine.config.batch_size,
        )
        self._channels = Channels(self._worker_id)
        self._engine = AsyncEngine(engine, niceness=CPU_NICENESS if backbone.device.type == "cpu" else 0)
        self._telemetry = settings.telemetry.start("worker", self._worker_id, self._node_id, self._own_stats)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestNews]:
        """Events of one request, until they move to the client's channel. Leaving the iteration cancels the request.

        A request that is refused ends with :class:`Refused`, not with an exception, which Serve would log as a failure
        of this worker, with a traceback.
        """
        try:
            async with (
                aclosing(self._events(request)) as events,
                aclosing(self._channels.carry(request.client_id, events)) as carried,
            ):
                async for news in carried:
                    yield news
        except (InvalidRequestError, OverloadedError) as error:
            yield Refused(error)

    async def channel(self, request: ChannelRequest) -> AsyncIterator[EventBatch]:
        """Events of all requests of a client; each batch has those of one step."""
        async with aclosing(self._channels.batches(request)) as batches:
            async for batch in batches:
                yield batch

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request, with its span and its log lines."""
        name, who = "worker.generate", {"request_id": request.request_id}
        logger.info("request came", extra=who | {"prompt_tokens": len(request.prompt_token_ids)})
        with self._telemetry.span(name, request.traceparent, **who) as span:
            span.set(finish_reason="cancelled")  # until another end is known
            traced = replace(request, traceparent=span.traceparent)
            async with aclosing(self._engine.generate(traced)) as events:
                async for event in events:
                    if event.stats is not None:
                        stats = {name: value for name, value in asdict(event.stats).items() if value is not None}
                        span.set(finish_reason=str(event.finish_reason), **stats)
                        logger.info("request done", extra=who | {"finish_reason": event.finish_reason} | stats)
                    yield event

    async def stats(self) -> WorkerStats:
        """This worker's numbers now."""
        return replace(self._own_stats(), tier=await asyncio.to_thread(self._tier_stats))

    def sizes(self) -> WorkerSizes:
        """What this worker's memory was sized to at its start."""
        return self._sizes

    def metrics_target(self) -> MetricsTarget | None:
        return self._telemetry.target

    async def integrity(self) -> str:
        """Check the engine between two steps; returns a description of the inconsistency, or an empty string."""
        try:
            await self._engine.check_integrity()
        except AssertionError as error:
            return f"{self._worker_id}: {error}"
        return ""

    def holders(self) -> tuple[str, list[str]]:
        """This worker's id, and the names of its holders that memory tiers may hold chunks for."""
        return self._worker_id, self._memory.holders()

    async def record_routing_stats(self) -> dict[str, Any]:
        """A :class:`WorkerReport`; Serve calls it every few seconds for the router."""
        tier = await asyncio.to_thread(self._tier_stats)
        return asdict(self._reporter.report(self._engine.stats(), tier))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Metrics for Serve's autoscaler, for policies that use them."""
        stats = self._engine.stats()
        return {"hot_pool_usage": stats.hot_slots_referenced / stats.hot_slots if stats.hot_slots else 0.0}

    async def check_health(self) -> None:
        """Raise if the engine's thread has ended or hangs: Serve then replaces the replica.

        Serve also replaces it if this call does not return, because then the event loop hangs, which sends all events.
        """
        self._engine.check_health()

    def __del__(self) -> None:
        """Release everything; Serve calls this when the replica stops."""
        if hasattr(self, "_engine"):
            self._engine.close()
            self._indexer.close()
            self._memory.close()

    def _make_indexer(self, settings: WorkerSettings, model: LoadedModel) -> Indexer:
        """On a GPU an indexer of this worker alone; else the node's indexer actors."""
        config, spec, lookahead = settings.indexer, model.scorer.spec, model.scorer.lookahead
        if config.device_type(model.backbone.device.type) == "cuda":
            return build_gpu_indexer(model, config, self._memory.arena)
        actors = [
            self._on_this_node(
                IndexerActor, name, settings, spec, config.threads, Arena.attach, lookahead, settings.telemetry, name
            )
            for number in range(config.num_indexers)
            for name in [settings.actor_name(f"indexer{number}", self._node_id)]
        ]
        try:
            # else the first predictions would wait for these processes to start, and count as fallbacks
            ray.get([actor.ready.remote() for actor in actors], timeout=ACTOR_START_DEADLINE_S)
        except (GetTimeoutError, RayActorError) as error:
            logger.warning("the node's indexer actors do not answer; the worker scores until they do: %s", error)
        return SharedIndexers(
            [RemoteIndexer(actor, config.deadline_s) for actor in actors],
            lambda: LocalIndexer(spec, config.threads, Arena.attach, lookahead),
        )

    def _own_stats(self) -> WorkerStats:
        """This worker's numbers, without those of the tier."""
        fallbacks = self._indexer.fallbacks if isinstance(self._indexer, SharedIndexers) else 0
        scorer = ScorerStats(self._scorer.name, self._scorer.digest, fallbacks)
        return WorkerStats(self._worker_id, self._node_id, self._engine.stats(), None, scorer)

    def _tier_stats(self) -> TierStats | None:
        try:
            return self._memory.stats()
        except ChunkLostError:
            return None

    def _on_this_node(
        self, kind: Any, name: str, settings: WorkerSettings, *args: object, **kwargs: object
    ) -> "ActorHandle[Any]":
        """The node's actor ``name``; the first caller starts it. It outlives this worker, and Ray restarts it."""
        actor: ActorHandle[Any] = kind.options(
            name=name,
            namespace=settings.namespace,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self._node_id, soft=False),
        ).remote(*args, **kwargs)
        return actor
