"""Lists the processes that serve `/metrics`, for Prometheus' service discovery, and merges their pages into one."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from forecache.cluster.broadcast import SharedAnswer, answers_in_time
from forecache.cluster.observe.metrics import CONTENT_TYPE
from forecache.cluster.tiers import Tiers
from forecache.indexer.serving.telemetry import MetricsTarget

logger = logging.getLogger(__name__)

DEADLINE_S = 5.0


class ProcessDirectory:
    """Finds the processes of the cluster by asking Ray and Serve each time, so that no list is out of date."""

    def __init__(self, workers: "DeploymentHandle[Any]", tiers: Tiers) -> None:
        self._workers = workers
        self._tiers = replace(tiers, deadline_s=min(tiers.deadline_s, DEADLINE_S))

    async def targets(self) -> list[MetricsTarget]:
        """All processes that answer within ``DEADLINE_S``, sorted by component and id."""
        here = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(here.deployment, here.app_name)
        node_actors = asyncio.to_thread(lambda: self._tiers.ask("metrics_target", only=self._tiers.node_actors()))
        answers = await asyncio.gather(_ask(self._workers), _ask(ingresses), node_actors)
        found = [*answers[0], *answers[1], *answers[2].values()]
        return sorted((one for one in found if one is not None), key=lambda one: (one.component, one.process))


async def _ask(handle: "DeploymentHandle[Any]") -> list[MetricsTarget]:
    try:
        answers = await answers_in_time(handle.broadcast("metrics_target"), DEADLINE_S)
    except (TimeoutError, DeploymentUnavailableError) as error:
        logger.warning("no metrics targets of %s: %s", handle.deployment_id.name, error)
        return []
    return [answer for answer in answers if isinstance(answer, MetricsTarget)]


def service_discovery(targets: Iterable[MetricsTarget]) -> list[dict[str, Any]]:
    """The targets in the format of Prometheus' ``http_sd_configs``."""
    return [
        {"targets": [one.address], "labels": {"component": one.component, "process": one.process, "node": one.node}}
        for one in targets
    ]


class MergedPages(Collector):
    """The series of several processes on one page, with the labels ``component`` and ``process`` on each sample.

    Sums nothing, since a sum of counters falls when a process ends. ``up`` is 0 for a process whose page is ``None``.
    """

    def __init__(self, pages: Sequence[tuple[MetricsTarget, str | None]]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("up", "Whether the process answered.", labels=["component", "process"])
        merged: dict[str, Metric] = {}
        for target, page in self._pages:
            labels = {"component": target.component, "process": target.process}
            up.add_metric(list(labels.values()), float(page is not None))
            for family in text_string_to_metric_families(page or ""):
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels=sample.labels | labels) for sample in family.samples]
        yield up
        yield from merged.values()


async def read_pages(targets: Sequence[MetricsTarget]) -> list[tuple[MetricsTarget, str | None]]:
    """Each process' `/metrics`; ``None`` if it does not answer in time."""

    async def read(target: MetricsTarget) -> str | None:
        try:
            answer = await client.get(f"http://{target.address}/metrics")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            logger.warning("no metrics of %s: %r", target.process, error)
            return None
        return answer.text

    async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False) as client:
        return list(zip(targets, await asyncio.gather(*map(read, targets)), strict=True))


class MetricsRoutes:
    """`/metrics/targets` and `/metrics/cluster`. They need no API key, so they ask each process at most once a second,
    whatever the number of clients."""

    def __init__(self, directory: ProcessDirectory) -> None:
        self._targets = SharedAnswer(directory.targets)
        self._page = SharedAnswer(self._merge)

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/metrics/targets", self.targets, methods=["GET"])
        app.add_api_route("/metrics/cluster", self.cluster, methods=["GET"])

    async def targets(self) -> Response:
        return JSONResponse(service_discovery(await self._targets.get()))

    async def cluster(self) -> Response:
        return PlainTextResponse(await self._page.get(), headers={"Content-Type": CONTENT_TYPE})

    async def _merge(self) -> bytes:
        pages = await read_pages(await self._targets.get())
        return await asyncio.to_thread(generate_latest, MergedPages(pages))
