"""The Serve deployment that speaks HTTP, and its way to the decode workers."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from contextvars import Context
from dataclasses import replace
from typing import Any, Self

import grpc
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from forecache.cluster.config import ResumeConfig, ServeConfig
from forecache.cluster.dispatch.channels import ChanneledStream, Channels, Replacement
from forecache.cluster.dispatch.failover import ResumingStream
from forecache.cluster.dispatch.replica_answers import answers_in_time
from forecache.cluster.dispatch.shared_answer import SharedAnswer
from forecache.cluster.errors import WorkerLostError, WorkerSilentError
from forecache.cluster.http.admission import Admission, Usage
from forecache.cluster.http.api import Api
from forecache.cluster.http.page import add_page
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.sessions import SessionDirectory, SessionRoutes
from forecache.cluster.http.tenants import Tenants
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.observe.metrics_targets import MetricsRoutes, ProcessDirectory
from forecache.cluster.observe.telemetry import ClusterTelemetry
from forecache.cluster.tiers import Tiers
from forecache.indexer.serving.selection import budget_chunks
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.core.requests import (
    CacheOptions,
    ChannelRequest,
    EventBatch,
    GenerateRequest,
    Refused,
    RequestNews,
)
from forecache.workers.core.stats import WorkerStats
from forecache.workers.errors import EngineDeadError, EngineHungError
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

STATS_DEADLINE_S = 5.0
SHARING_PERIOD_S = 0.5


class ServeCall:
    """What a worker says, through Ray Serve, with Ray's errors turned into ours."""

    def __init__(self, response: "DeploymentResponseGenerator[Any]") -> None:
        self._response = response

    def __aiter__(self) -> AsyncIterator[RequestNews | EventBatch]:
        return self

    async def __anext__(self) -> RequestNews | EventBatch:
        try:
            said: RequestNews | EventBatch = await self._response.__anext__()
        except RayTaskError as error:
            # Ray hands over the worker's exception as a class of both kinds
            cause = getattr(error, "cause", error)
            if isinstance(cause, EngineDeadError):
                raise _lost(cause) from error
            raise cause from None
        except EngineDeadError as error:
            raise _lost(error) from error
        except (RayActorError, TaskCancelledError, grpc.aio.AioRpcError) as error:
            raise WorkerLostError("the worker of this request died; send the request again") from error
        except DeploymentUnavailableError as error:
            raise WorkerLostError("no worker is running") from error
        if isinstance(said, Refused):
            raise said.error
        return said

    @property
    def assigned(self) -> bool:
        """Whether Serve has found a worker with a place for it."""
        return bool(self._response._replica_result_future.done())

    def cancel(self) -> None:
        self._response.cancel()  # type: ignore[no-untyped-call]


def _lost(error: EngineDeadError) -> WorkerLostError:
    kind = WorkerSilentError if isinstance(error, EngineHungError) else WorkerLostError
    return kind(f"the worker of this request failed: {error}")


class ServeWorkers:
    """All replicas of the decode deployment."""

    def __init__(self, handle: "DeploymentHandle[Any]", resume: ResumeConfig, metrics: Metrics) -> None:
        # By value: a token comes by gRPC, for less than half of what an object of Ray's costs
        self._handle = handle
        self._streaming = handle.options(stream=True, _by_reference=False)
        self._resume = resume
        self._metrics = metrics
        self._stats = SharedAnswer(self._ask_stats)
        self._channels = Channels(lambda asked: self._call(self._streaming.channel, asked))
        self._replacement = Replacement(self._running, resume.replacement_deadline_s)

    def generate(self, request: GenerateRequest) -> ResumingStream:
        """The request's events, from as many workers as it takes."""
        return ResumingStream(request, self._start, self._resume, self._metrics.resumed)

    def _start(self, request: GenerateRequest) -> ChanneledStream:
        asked = replace(request, client_id=self._channels.client_id)
        call = self._call(self._streaming.generate, asked)
        return ChanneledStream(call, self._channels, request.request_id, self._replacement)

    def _call(self, method: "DeploymentHandle[Any]", asked: GenerateRequest | ChannelRequest) -> ServeCall:
        # Serve knows a call that waits for a replica by the id of the HTTP request it is made in, so that of several
        # calls of one request all but one would wait for ever: outside of that context each has an id of its own
        response = Context().run(lambda: method.remote(asked))
        assert isinstance(response, DeploymentResponseGenerator)
        return ServeCall(response)

    async def stats(self) -> Sequence[WorkerStats]:
        """Stats of the replicas that answer within ``STATS_DEADLINE_S``, a second old at most: who asks needs no key.

        Raises:
            WorkerLostError: no replica is up, or none answers.
        """
        return await self._stats.get()

    async def _running(self) -> bool:
        """Whether a worker answers."""
        try:
            await self.stats()
        except WorkerLostError:
            return False
        return True

    async def _ask_stats(self) -> Sequence[WorkerStats]:
        try:
            answers = await answers_in_time(self._handle.broadcast("stats"), STATS_DEADLINE_S)
        except (TimeoutError, DeploymentUnavailableError) as error:
            logger.warning("no worker answers: %s", error)
            raise WorkerLostError("no worker answers") from error
        reached = [answer for answer in answers if isinstance(answer, WorkerStats)]
        if not reached:
            raise WorkerLostError("no worker answers")
        return reached


class Ingress:
    """Holds what the HTTP application needs; Serve builds the application from it in the replica."""

    workers_class = ServeWorkers

    def __init__(
        self,
        config: ServeConfig,
        max_model_len: int,
        chunk_bytes: int,
        tenants: Tenants,
        workers: "DeploymentHandle[Any]",
        tiers: Tiers,
        telemetry: ClusterTelemetry,
    ) -> None:
        tokenizer = load_tokenizer(resolve_model(config.engine.model, load_format=config.engine.load_format))
        self._tiers = tiers
        metrics = Metrics(config.model_name)
        node_id, here = ray.get_runtime_context().get_node_id(), serve.get_replica_context()
        self._telemetry = telemetry.start_with(metrics.registry, "ingress", here.replica_id.unique_id, node_id)
        self._admission = Admission(config.limits)
        if config.ingress_replicas > 1:
            self._sharing = asyncio.get_running_loop().create_task(self._share_limits())
        encoder = PromptEncoder(
            tokenizer,
            max_model_len,
            processes=config.limits.prompt_processes,
            max_values=config.limits.max_body_values,
            max_grammar_bytes=config.limits.max_grammar_bytes,
        )
        encoder.start()
        # a full collection looks at each object that is there: at those of the libraries for a third of a second, in
        # which no stream goes on
        gc.collect()
        gc.freeze()
        self._api = Api(
            self.workers_class(workers, config.resume, metrics),
            encoder,
            metrics,
            self._admission,
            tenants,
            lambda tokens, cache: _resident_bytes(tokens, cache, config, chunk_bytes),
            self._telemetry,
        )
        self._sessions = SessionRoutes(
            SessionDirectory(tiers, config.engine.chunk_tokens), self._api.guarded, config.limits
        )
        self._metrics_routes = MetricsRoutes(ProcessDirectory(workers, tiers))

    def __serve_build_asgi_app__(self: Self) -> Any:
        app = self._api.app()
        self._sessions.add_to(app)
        add_page(app)
        self._metrics_routes.add_to(app)
        return app

    async def metrics_target(self) -> MetricsTarget:
        return self._telemetry.target

    async def usage(self) -> Usage:
        """What was let in here."""
        return self._admission.usage(serve.get_replica_context().replica_id.unique_id)

    async def _share_limits(self) -> None:
        """Ask the other ingresses again and again what they have let in. One that does not answer has nothing."""
        here = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
        while True:
            await asyncio.sleep(SHARING_PERIOD_S)
            try:
                answers = await answers_in_time(ingresses.broadcast("usage"), STATS_DEADLINE_S)
            except Exception:
                # whatever it was, the next time may be better, and without this all limits are of each ingress alone
                logger.exception("other ingresses' requests are not counted")
                answers = []
            usages = [answer for answer in answers if isinstance(answer, Usage)]
            self._admission.hear([one for one in usages if one.ingress != here.replica_id.unique_id])

    async def drain(self) -> int:
        """Take nothing new from now on; how many requests are still under way."""
        self._admission.draining = True
        return self._admission.in_flight


def _resident_bytes(tokens: int, cache: CacheOptions, config: ServeConfig, chunk_bytes: int) -> int:
    chunks = -(-tokens // config.engine.chunk_tokens)
    if (cache.policy or config.engine.policy) != "full":
        keep_ratio = config.engine.keep_ratio if cache.keep_ratio is None else cache.keep_ratio
        chunks = budget_chunks(chunks, keep_ratio, config.selection)
    return chunks * chunk_bytes
