"""The Ray Serve replica around one engine, and the actors of its node that it needs: memory tier and indexer."""

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
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.fallback import SharedIndexers
from forecache.indexer.serving.protocol import Indexer
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.core.requests import (
    ChannelRequest,
    EventBatch,
    GenerateRequest,
    Refused,
    RequestNews,
    TokenEvent,
)
from forecache.workers.core.settings import WorkerSettings
from forecache.workers.core.stats import ScorerStats, WorkerStats
from forecache.workers.core.worker_report import Reporter
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.channels import Channels
from forecache.workers.engine.engine import Engine
from forecache.workers.errors import ArenaError, ChunkLostError, InvalidRequestError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.format.layout import chunk_fingerprint, cold_layout
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.memory.tier.actor import TierSettings, gives_memory, start_tier
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.loader import model_name, resolve_model
from forecache.workers.models.registry import architecture_of
from forecache.workers.models.step.architecture import ChosenScorer
from forecache.workers.models.tokenizer import load_tokenizer
from forecache.workers.models.verify import verify_backbone

logger = logging.getLogger(__name__)

ACTOR_START_DEADLINE_S = 60.0
CPU_NICENESS = 5
"""Of a model that computes on the cores that HTTP needs too: tokens on their way, and refusals, come before it."""


class DecodeWorker:
    """One engine behind Ray Serve. Its node's memory tier and indexer are made by the first worker there."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Loads the model. Raises a :class:`ForecacheError` that says what is in the way."""
        config = settings.engine
        # Ray limits OpenMP to the replica's logical CPUs; those are for placement, these are for the model
        cores = len(os.sched_getaffinity(0))
        # ingress, tier and indexer need a core too: a team as large as the machine would wait for each of them
        torch.set_num_threads(config.threads or (cores - 1 if cores > 2 else cores))
        self._node_id = ray.get_runtime_context().get_node_id()
        self._worker_id = serve.get_replica_context().replica_id.unique_id
        path = resolve_model(config.model, load_format=config.load_format)
        architecture = architecture_of(load_config(path).model_type)
        architecture.refuse_settings(config, config.model)
        config = config.for_model(architecture.chunk_tokens)
        backbone = load_backbone(
            path,
            dtype=config.dtype,
            device=config.device,
            chunk_tokens=config.chunk_tokens,
            max_model_len=config.max_model_len,
            load_format=config.load_format,
            seed=config.seed,
            kv_dtype=config.kv_dtype,
        )
        cold = cold_layout(backbone.layout, settings.memory.cold_dtype)
        self._scorer = chosen = architecture.choose_scorer(settings.indexer, model_name(config.model), backbone)
        spec = chosen.spec
        verify_backbone(backbone, spec)
        self._tier_id = settings.actor_name("tier", self._node_id)
        fingerprint = chunk_fingerprint(backbone.layout, cold)
        self._reporter = Reporter(fingerprint, self._tier_id, cold.nbytes, config.max_batch_size)
        memory = settings.memory
        [node] = [node for node in ray.nodes() if node["NodeID"] == self._node_id]  # type: ignore[no-untyped-call]
        if not gives_memory(node, memory):
            raise ArenaError(f"this node has no memory tier: it lacks the Ray resource {memory.tier_resource!r}")
        tiers = TierSettings(
            memory, cold, spec.nbytes, spec.fingerprint, settings.namespace, settings.redis_url, settings.telemetry
        )
        self._memory = RemoteMemory(
            lambda: start_tier(tiers, self._tier_id, self._node_id),
            memory.call_deadline_s,
            fetch_deadline_s=memory.fetch_deadline_s,
            peers=RemotePeers(settings.namespace, memory.call_deadline_s) if settings.redis_url is not None else None,
        )
        self._indexer = self._make_indexer(
            settings, chosen, backbone.device, config.graph_chunks(backbone.max_model_len)
        )
        engine = Engine(
            backbone,
            load_tokenizer(path),
            config,
            settings.selection,
            self._memory,
            self._indexer,
            spec,
            self._worker_id,
            cold,
            chosen.query_encoder,
        )
        self._channels = Channels(self._worker_id)
        self._engine = AsyncEngine(engine, niceness=CPU_NICENESS if backbone.device.type == "cpu" else 0)
        self._telemetry = settings.telemetry.start("worker", self._worker_id, self._node_id, self._own_stats)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestNews]:
        """Events of one request, or that they go by a channel; it is cancelled when the caller stops listening.

        A request that is not taken ends with :class:`Refused`, which is no exception: Serve would write that to the
        log as a failure of this worker, with a traceback.
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
        """Events of all requests of a client, each step's together."""
        async with aclosing(self._channels.batches(request)) as batches:
            async for batch in batches:
                yield batch

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Those of one request, with its span and its lines in the log."""
        name, who = "worker.generate", {"request_id": request.request_id}
        logger.info("request came", extra=who | {"prompt_tokens": len(request.prompt_token_ids)})
        with self._telemetry.span(name, request.traceparent, **who) as span:
            span.set(finish_reason="cancelled")  # unless it comes to another end
            traced = replace(request, traceparent=span.traceparent)
            async with aclosing(self._engine.generate(traced)) as events:
                async for event in events:
                    if event.stats is not None:
                        told = {name: value for name, value in asdict(event.stats).items() if value is not None}
                        span.set(finish_reason=str(event.finish_reason), **told)
                        logger.info("request done", extra=who | {"finish_reason": event.finish_reason} | told)
                    yield event

    async def stats(self) -> WorkerStats:
        """This worker's numbers now."""
        return replace(self._own_stats(), tier=await asyncio.to_thread(self._tier_stats))

    def metrics_target(self) -> MetricsTarget | None:
        return self._telemetry.target

    async def integrity(self) -> str:
        """What the engine's check finds wrong, made between two steps; empty if nothing."""
        try:
            await self._engine.check_integrity()
        except AssertionError as error:
            return f"{self._worker_id}: {error}"
        return ""

    def holders(self) -> tuple[str, list[str]]:
        """This worker's id, and the names of its holders that may hold something at memory tiers."""
        return self._worker_id, self._memory.holders()

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router reads every few seconds: a :class:`WorkerReport`."""
        tier = await asyncio.to_thread(self._tier_stats)
        return asdict(self._reporter.report(self._engine.stats(), tier))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler reads, where a policy asks for it."""
        stats = self._engine.stats()
        return {"hot_pool_usage": stats.hot_slots_referenced / stats.hot_slots if stats.hot_slots else 0.0}

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises: the engine's thread has ended, or hangs. It does so too when
        this does not answer: the event loop hangs, on which all events of requests are."""
        self._engine.check_health()

    def __del__(self) -> None:
        """Serve calls it when the replica stops."""
        if hasattr(self, "_engine"):
            self._engine.close()
            self._indexer.close()
            self._memory.close()

    def _make_indexer(
        self, settings: WorkerSettings, chosen: ChosenScorer, device: torch.device, graph_chunks: int
    ) -> Indexer:
        """On a GPU its own; else the node's actors, made by whoever asks first."""
        config, spec, lookahead = settings.indexer, chosen.spec, chosen.lookahead
        if config.device_type(device.type) == "cuda":
            gpu = device if device.type == "cuda" else torch.device("cuda")
            budget, arena = config.device_bytes, self._memory.arena
            return CudaIndexer(spec, arena, gpu, budget, RegisteredMemory, lookahead, graph_chunks=graph_chunks)
        actors = [
            self._on_this_node(
                IndexerActor, name, settings, spec, config.threads, Arena.attach, lookahead, settings.telemetry, name
            )
            for number in range(config.num_indexers)
            for name in [settings.actor_name(f"indexer{number}", self._node_id)]
        ]
        try:
            # else the first predictions would wait for their processes to start, and be counted as fallbacks
            ray.get([actor.ready.remote() for actor in actors], timeout=ACTOR_START_DEADLINE_S)
        except (GetTimeoutError, RayActorError) as error:
            logger.warning("the node's indexer actors are not up, the worker scores until they are: %s", error)
        return SharedIndexers(
            [RemoteIndexer(actor, config.deadline_s) for actor in actors],
            lambda: LocalIndexer(spec, config.threads, Arena.attach, lookahead),
        )

    def _own_stats(self) -> WorkerStats:
        """Without the tier's."""
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
        """The node's actor ``name``, made by whoever asks first. It outlives this worker, and is restarted by Ray."""
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
