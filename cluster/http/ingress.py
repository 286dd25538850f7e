"""The Ray Serve deployment of the HTTP server: builds the application in each replica."""

import asyncio
import gc
import logging
from typing import Any, Self

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from forecache.cluster.broadcast import answers_in_time
from forecache.cluster.config import ServeConfig
from forecache.cluster.dispatch.admission import Admission, ResidentEstimate, Usage
from forecache.cluster.dispatch.workers import STATS_DEADLINE_S, ServeWorkers
from forecache.cluster.http.api import Api
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.sessions import SessionDirectory, SessionRoutes
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.observe.metrics_targets import MetricsRoutes, ProcessDirectory
from forecache.cluster.observe.telemetry import ClusterTelemetry
from forecache.cluster.tenants import Tenants
from forecache.cluster.tiers import Tiers
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

SHARING_PERIOD_S = 0.5
"""How often an ingress asks the others which requests they have admitted."""


class Ingress:
    """One replica: makes the parts of the HTTP application, which Serve then requests."""

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
        # a full garbage collection would visit all objects of the libraries, and stop all streams for 0.3 s
        gc.collect()
        gc.freeze()
        self._api = Api(
            self.workers_class(workers, config.resume),
            encoder,
            metrics,
            self._admission,
            tenants,
            ResidentEstimate(config.engine, config.selection, chunk_bytes),
            self._telemetry,
        )
        self._sessions = SessionRoutes(SessionDirectory(tiers, config.engine.chunk_tokens), self._api)
        self._metrics_routes = MetricsRoutes(ProcessDirectory(workers, tiers))

    def __serve_build_asgi_app__(self: Self) -> Any:
        app = self._api.app()
        self._sessions.add_to(app)
        self._metrics_routes.add_to(app)
        return app

    async def metrics_target(self) -> MetricsTarget:
        return self._telemetry.target

    async def usage(self) -> Usage:
        """The requests that this ingress has admitted."""
        return self._admission.usage(serve.get_replica_context().replica_id.unique_id)

    async def _share_limits(self) -> None:
        """Ask the other ingresses periodically which requests they have admitted. One that is silent counts as idle."""
        here = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
        while True:
            await asyncio.sleep(SHARING_PERIOD_S)
            try:
                answers = await answers_in_time(ingresses.broadcast("usage"), STATS_DEADLINE_S)
            except Exception:
                # this task must not end: limits would then hold for each ingress alone
                logger.exception("the requests of other ingresses are not counted until they answer again")
                answers = []
            usages = [answer for answer in answers if isinstance(answer, Usage)]
            self._admission.set_remote_usage([one for one in usages if one.ingress != here.replica_id.unique_id])

    async def drain(self) -> int:
        """Refuse new requests from now on; returns how many are still running."""
        self._admission.draining = True
        return self._admission.in_flight
