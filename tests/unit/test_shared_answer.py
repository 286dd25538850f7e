"""Answers that need no key but ask every process are shared: one question a second for all callers."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from forecache.cluster.broadcast import SharedAnswer
from forecache.cluster.config import ResumeConfig
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.errors import WorkerLostError
from forecache.cluster.observe.metrics_targets import MetricsRoutes
from forecache.indexer.serving.telemetry import MetricsTarget

pytestmark = pytest.mark.anyio


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Question:
    """A question that returns its number once it may, or raises."""

    def __init__(self) -> None:
        self.asked = 0
        self.may = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.asked += 1
        number = self.asked
        await self.may.wait()
        if self.error is not None:
            raise self.error
        return number


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_asks_at_the_same_time_gets_the_same_answer_and_one_that_is_old_is_asked_for_again() -> None:
    question, clock = Question(), Clock()
    shared = SharedAnswer(question, fresh_s=1.0, clock=clock)
    callers = [asyncio.create_task(shared.get()) for _ in range(100)]
    await turn()
    clock.now_s += 60  # a slow answer is not asked for a second time
    callers += [asyncio.create_task(shared.get()) for _ in range(100)]
    await turn()
    callers[0].cancel()
    question.may.set()
    assert await asyncio.gather(*callers[1:]) == [1] * 199
    assert callers[0].cancelled() and question.asked == 1
    clock.now_s += 1.0
    assert await shared.get() == 1
    clock.now_s += 0.1
    assert await shared.get() == 2


async def test_an_error_is_shared_too_and_does_not_stay() -> None:
    question, clock = Question(), Clock()
    shared = SharedAnswer(question, fresh_s=1.0, clock=clock)
    question.may.set()
    question.error = WorkerLostError("no worker answers")
    found = await asyncio.gather(*(shared.get() for _ in range(10)), return_exceptions=True)
    assert found == [question.error] * 10 and question.asked == 1
    question.error = None
    clock.now_s += 1.1
    assert await shared.get() == 2


async def test_nobody_waits_and_the_answer_is_an_error_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    question = Question()
    shared = SharedAnswer(question)
    caller = asyncio.create_task(shared.get())
    await turn()
    caller.cancel()
    question.error = WorkerLostError("no worker answers")
    question.may.set()
    await turn()
    with pytest.raises(WorkerLostError):
        await shared.get()
    assert not caplog.records


class Directory:
    """A directory with one process that does not exist; counts how often it is asked for."""

    asked = 0

    async def targets(self) -> list[MetricsTarget]:
        self.asked += 1
        await asyncio.sleep(0)
        return [MetricsTarget(address="127.0.0.1:1", component="worker", process="one", node="node")]


async def test_the_metrics_of_all_processes_are_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    directory: Any = Directory()
    app = FastAPI()
    MetricsRoutes(directory).add_to(app)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        paths = ["/metrics/targets", "/metrics/cluster"] * 50
        answers = await asyncio.gather(*map(client.get, paths))
    assert {answer.status_code for answer in answers} == {200}
    assert directory.asked == 1
    assert answers[0].json()[0]["targets"] == ["127.0.0.1:1"]
    assert 'up{component="worker",process="one"} 0.0' in answers[1].text
    assert len({answer.content for answer in answers}) == 2


async def test_readiness_asks_the_workers_once_a_second() -> None:
    asked = []

    def broadcast(method: str) -> Any:
        async def replicas() -> list[Any]:
            asked.append(method)
            await asyncio.sleep(0)
            return []

        return SimpleNamespace(_fetch_replica_results_async=replicas)

    handle: Any = SimpleNamespace(broadcast=broadcast, options=lambda **_: None)
    workers = ServeWorkers(handle, ResumeConfig())
    found = await asyncio.gather(*(workers.stats() for _ in range(50)), return_exceptions=True)
    assert all(isinstance(error, WorkerLostError) for error in found)
    assert asked == ["stats"]
