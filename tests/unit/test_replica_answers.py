"""A replica that does not answer does not delay or lose the answers of the others."""

import asyncio
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from forecache.cluster.broadcast import answers_in_time
from forecache.cluster.config import LimitsConfig, ResumeConfig
from forecache.cluster.dispatch import workers as workers_module
from forecache.cluster.dispatch.admission import Admission, Usage
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.errors import WorkerLostError
from forecache.cluster.http import ingress
from forecache.cluster.http.ingress import Ingress
from forecache.cluster.launch import cluster as serving
from forecache.cluster.observe import metrics_targets as targets
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.core.stats import WorkerStats

pytestmark = pytest.mark.anyio
SILENT = object()
GONE = RayActorError()


@dataclass
class Replica:
    """A replica that returns ``said``, raises it, or stays silent."""

    said: Any
    given_up: bool = False

    async def get_async(self) -> Any:
        if self.said is SILENT:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up = True
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@dataclass
class Handle:
    """A handle of a deployment with these replicas."""

    replicas: list[Replica]
    deployment_id: Any = field(default_factory=lambda: SimpleNamespace(name="D"))

    def broadcast(self, _: str) -> "Handle":
        return self

    def options(self, **_: Any) -> "Handle":
        return self

    async def _fetch_replica_results_async(self) -> list[Replica]:
        return self.replicas


def handle_of(*said: Any) -> Any:
    return Handle([Replica(one) for one in said])


async def test_the_answers_of_those_that_answer_are_kept() -> None:
    handle = handle_of(1, SILENT, GONE, 0, None)
    assert await answers_in_time(handle, 0.01) == [1, GONE, 0, None]
    await asyncio.sleep(0)
    assert handle.replicas[1].given_up
    assert await answers_in_time(handle_of(1, 2), 1000.0) == [1, 2], "the deadline is not waited for"
    assert await answers_in_time(handle_of(), 1000.0) == []


async def test_replicas_that_are_not_known_in_time_are_an_error() -> None:
    class Unknown:
        async def _fetch_replica_results_async(self) -> list[Replica]:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(TimeoutError):
        await answers_in_time(Unknown(), 0.01)


async def test_one_silent_worker_makes_the_cluster_not_unready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STATS_DEADLINE_S", 0.01)
    stats: Any = WorkerStats.__new__(WorkerStats)
    config = ResumeConfig()
    assert list(await ServeWorkers(handle_of(SILENT, stats, GONE), config).stats()) == [stats]
    with pytest.raises(WorkerLostError, match="no worker answers"):
        await ServeWorkers(handle_of(SILENT, GONE), config).stats()


async def test_one_silent_process_is_missing_in_the_directory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "DEADLINE_S", 0.01)
    target = MetricsTarget(address="127.0.0.1:1", component="worker", process="one", node="node")
    assert await targets._ask(handle_of(SILENT, target, GONE)) == [target]


async def test_one_silent_ingress_does_not_erase_what_the_others_have_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, told = list[list[str]](), asyncio.Event()

    class Heard(Admission):
        def set_remote_usage(self, usages: Any) -> None:
            heard.append([one.ingress for one in usages])
            told.set()

    here = SimpleNamespace(deployment="Ingress", app_name="a", replica_id=SimpleNamespace(unique_id="me"))
    handle = handle_of(Usage("me"), SILENT, Usage("other"))
    monkeypatch.setattr(ingress.serve, "get_replica_context", lambda: here)
    monkeypatch.setattr(ingress.serve, "get_deployment_handle", lambda *_: handle)
    monkeypatch.setattr(ingress, "SHARING_PERIOD_S", 0.0)
    monkeypatch.setattr(ingress, "STATS_DEADLINE_S", 0.01)
    one: Any = Ingress.__new__(Ingress)
    one._admission = Heard(LimitsConfig())
    sharing = asyncio.ensure_future(one._share_limits())
    await asyncio.wait_for(told.wait(), 30)
    sharing.cancel()
    assert heard[0] == ["other"]


class Draining:
    """Ingresses that return these numbers, one list per call, and the last one for all further calls."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.waits: list[float] = []

    def broadcast(self, _: str) -> "Draining":
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        self.waits.append(timeout_s)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "POLL_S", 0.0)


def drain(monkeypatch: pytest.MonkeyPatch, ingresses: Draining, hurry: threading.Event) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(serving.serve, "get_app_handle", lambda _: ingresses)
    serving._drain(1000.0, hurry, said.append)
    return said


@pytest.mark.usefixtures("quick")
def test_an_ingress_that_is_only_slow_to_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ingresses = Draining([TimeoutError(), 0], [TimeoutError(), 2], [0, 1], [0, GONE])
    said = drain(monkeypatch, ingresses, threading.Event())
    assert said == ["waiting for 1 ingresses", "waiting for 2 requests", "waiting for 1 requests"]


@pytest.mark.usefixtures("quick")
def test_a_second_signal_is_heard_while_an_ingress_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry = threading.Event()
    hurry.set()
    ingresses = Draining([TimeoutError()])
    start_s = time.monotonic()
    assert drain(monkeypatch, ingresses, hurry) == []
    assert ingresses.waits == [serving.DRAIN_ANSWER_S] and serving.DRAIN_ANSWER_S <= 1
    assert time.monotonic() - start_s < 60
