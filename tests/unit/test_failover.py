"""Workers that hang or fall silent are noticed, failovers are limited, and clients get a typed error.

Clocks are the tests' own: event loops jump to their next timer, engines ask a clock that is set by hand.
"""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from fake_workers import Errors, Reader, Workers, stream_over
from virtual_time import now_s, run

from forecache.cluster.config import ResumeConfig, ServeConfig
from forecache.cluster.dispatch.channels import Channels, RequestCall
from forecache.cluster.dispatch.completion_stream import CompletionStream
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.errors import NoWorkerError, WorkerLostError, WorkerSilentError, from_exception
from forecache.cluster.http.responses import AnswerFormat, collect, server_sent_events
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import (
    SIGN_OF_LIFE_S,
    Accepted,
    ChannelRequest,
    GenerateRequest,
    RequestNews,
    SamplingParams,
    SequenceStats,
    TokenEvent,
)
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.channels import Channels as WorkerChannels
from forecache.workers.engine.chunk_lifecycle import ChunkLifecycle
from forecache.workers.engine.pulse import Pulse
from forecache.workers.errors import ChunkLostError, EngineHungError, OverloadedError
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot import prefix_search as locator
from forecache.workers.memory.hot.completions import Completion, PrefixHeld, Recalled
from forecache.workers.memory.hot.copies import Copied, CopyItem
from forecache.workers.memory.hot.remote_chunks import RemoteTransfers
from forecache.workers.models.dense import attention

T = TypeVar("T")
CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
DEADLINE_S = 60.0
REQUEST = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=3))
LAST = SequenceStats(prompt_tokens=2, completion_tokens=3)


def token(number: int, **more: Any) -> TokenEvent:
    return TokenEvent("r", (number,), str(number), position=number - 1, **more)


WAITING = TokenEvent("r", (), "", waiting=True)
END = token(3, finish_reason="length", stats=LAST)


class Told:
    """A worker's stream of given events, then silence: an exception is raised, a number is a pause in seconds."""

    def __init__(self, *steps: TokenEvent | Exception | float) -> None:
        self._steps = list(steps)
        self.cancelled = False
        self.assigned = True

    def __aiter__(self) -> "Told":
        return self

    async def __anext__(self) -> TokenEvent:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                return step
        await asyncio.Event().wait()
        raise AssertionError

    def cancel(self) -> None:
        self.cancelled = True


class Asked:
    """Workers that get the request one after another; the last one gets all further tries."""

    def __init__(self, *workers: Callable[[], Told]) -> None:
        self._workers = workers
        self.requests: list[GenerateRequest] = []
        self.streams: list[Told] = []

    def __call__(self, request: GenerateRequest) -> Told:
        self.requests.append(request)
        self.streams.append(self._workers[min(len(self.streams), len(self._workers) - 1)]())
        return self.streams[-1]


async def events_of(asked: Asked, config: ResumeConfig) -> list[TokenEvent]:
    stream = Reader(stream_over(Workers(asked, config), REQUEST))
    try:
        return [event async for event in stream]
    finally:
        stream.close()


def tokens_of(asked: Asked, config: ResumeConfig | None = None) -> list[int]:
    events = run(events_of(asked, config or ResumeConfig(token_deadline_s=DEADLINE_S)))
    assert not any(event.waiting for event in events)
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("begun", [(), (token(1),), (TokenEvent("r", (), "", prefill_tokens_done=1),)])
def test_every_worker_is_watched_from_when_it_has_the_request(begun: tuple[TokenEvent, ...]) -> None:
    """Deadlines apply before the first token too, and to the second worker after a failover."""
    silent = Asked(lambda: Told(*begun), lambda: Told())

    async def fails() -> float:
        with pytest.raises(WorkerLostError, match="3 workers hung or fell silent on it") as failure:
            await events_of(silent, ResumeConfig(token_deadline_s=DEADLINE_S))
        assert f"sent nothing for {DEADLINE_S:g} s" in str(failure.value)
        return now_s()

    took_s = run(fails())
    assert [request.request_id for request in silent.requests] == ["r", "r~1", "r~2"]
    assert all(stream.cancelled for stream in silent.streams)
    assert 3 * DEADLINE_S <= took_s < 3 * DEADLINE_S + 1  # and two pauses before another worker is asked


def test_the_second_and_the_third_worker_go_on() -> None:
    second = lambda: Told(token(2))  # noqa: E731
    asked = Asked(lambda: Told(token(1)), second, lambda: Told(DEADLINE_S - 1, END))
    assert tokens_of(asked) == [1, 2, 3]
    assert [request.resume_token_ids for request in asked.requests] == [(), (1,), (1, 2)]


def test_a_request_that_waits_for_its_turn_is_not_silent() -> None:
    """A queued request may wait for any time, as long as its worker sends waiting events."""
    signs = [step for _ in range(500) for step in (SIGN_OF_LIFE_S, WAITING)]
    asked = Asked(lambda: Told(*signs, token(1), *signs, token(2), END))
    assert tokens_of(asked) == [1, 2, 3] and len(asked.requests) == 1


def test_a_token_between_two_silences_does_not_make_tries_endless() -> None:
    tokens = iter(range(1, 100))
    asked = Asked(lambda: Told(token(next(tokens))))
    with pytest.raises(WorkerLostError, match="--max-silent-workers"):
        tokens_of(asked)
    assert len(asked.requests) == 3


def test_a_token_between_two_losses_does_not_make_tries_endless() -> None:
    tokens = iter(range(1, 100))
    asked = Asked(lambda: Told(token(next(tokens)), WorkerLostError("it died")))
    with pytest.raises(WorkerLostError, match=r"it died.*5 times \(--max-resumes\)"):
        tokens_of(asked, ResumeConfig(max_resumes=5))
    assert len(asked.requests) == 6


def test_losses_in_a_row_are_bounded_and_those_that_hang_are_counted_apart() -> None:
    asked = Asked(lambda: Told(WorkerLostError("it died")))
    with pytest.raises(WorkerLostError, match=r"it died.*3 workers in a row.*--resume-attempts"):
        tokens_of(asked, ResumeConfig(resume_attempts=2))
    assert len(asked.requests) == 3
    asked = Asked(lambda: Told(WorkerSilentError("it hangs")))  # its worker knows it
    with pytest.raises(WorkerLostError, match="2 workers hung"):
        tokens_of(asked, ResumeConfig(resume_attempts=8, max_silent_workers=2))
    assert len(asked.requests) == 2


@pytest.mark.parametrize("wrong", [0, 2, 5])
def test_a_token_of_the_wrong_position_is_not_passed_on(wrong: int) -> None:
    """A worker that continues at a wrong position is left, and its tokens are dropped."""
    other = TokenEvent("r", (99,), "x", position=wrong)
    asked = Asked(lambda: Told(token(1), WorkerLostError("gone")), lambda: Told(other), lambda: Told(token(2), END))
    assert tokens_of(asked) == [1, 2, 3]
    assert asked.requests[2].resume_token_ids == (1,)


class ClientChannels(Channels):
    """The client's channels; ``opened`` makes the call of one."""

    def __init__(self, opened: Callable[[ChannelRequest], Any] | None = None) -> None:
        super().__init__(None)
        self._opened = opened

    def open(self, request: ChannelRequest) -> Any:
        assert self._opened is not None
        return self._opened(request)


class Call:
    """A call without a worker until ``assigned``; then it sends ``Accepted``, and nothing else."""

    def __init__(self) -> None:
        self.assigned = False
        self.cancelled = False
        self._said = False
        self.accepted = asyncio.Event()

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> RequestNews:
        await self.accepted.wait()
        if self._said:
            await asyncio.Event().wait()
        self._said = True
        return Accepted("w")

    def cancel(self) -> None:
        self.cancelled = True


def test_the_queue_before_the_workers_is_no_silence_and_a_worker_that_took_it_is_watched() -> None:
    async def wait() -> None:
        calls: list[Call] = []

        channels = ClientChannels()  # opens none: one request alone needs none

        def start(request: GenerateRequest) -> RequestCall:
            calls.append(Call())
            return RequestCall(calls[-1], channels, request.request_id)

        config = ResumeConfig(token_deadline_s=DEADLINE_S, max_silent_workers=2)
        stream = Reader(stream_over(Workers(start, config), REQUEST))
        pulled = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(100 * DEADLINE_S)
        assert not pulled.done() and len(calls) == 1
        calls[0].assigned = True
        calls[0].accepted.set()
        await asyncio.sleep(DEADLINE_S - SIGN_OF_LIFE_S)
        assert len(calls) == 1
        await asyncio.sleep(2 * SIGN_OF_LIFE_S)
        assert len(calls) == 2 and calls[0].cancelled
        calls[1].assigned = True  # the second one takes it and never says a word
        with pytest.raises(WorkerLostError, match="2 workers hung or fell silent"):
            await pulled
        assert calls[1].cancelled
        channels.check_idle()

    run(wait())


def test_a_request_does_not_wait_without_end_where_no_worker_runs_at_all() -> None:
    """The request is not retried then. While a worker runs, even a full one, it waits, and the deadline restarts."""

    async def wait() -> None:
        calls, up = list[Call](), True

        class Served(ServeWorkers):
            def __init__(self) -> None:
                self.failover_config = ResumeConfig(token_deadline_s=DEADLINE_S, replacement_deadline_s=600)

            async def stats(self) -> list[Any]:
                await asyncio.sleep(1)
                if not up:
                    raise WorkerLostError("no worker answers")
                return []

            def start(self, request: GenerateRequest) -> RequestCall:
                calls.append(Call())
                return RequestCall(calls[-1], channels, request.request_id)

        channels = ClientChannels()
        stream = Reader(stream_over(Served(), REQUEST))
        pulled = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(10_000)
        for _ in range(3):
            up = False
            await asyncio.sleep(550)
            up = True
            await asyncio.sleep(50)
        assert not pulled.done()
        up, gone_s = False, now_s()
        with pytest.raises(NoWorkerError, match=r"no worker is running.*--replacement-deadline-s") as failure:
            await pulled
        assert 600 <= now_s() - gone_s < 600 + 3 * SIGN_OF_LIFE_S
        stream.close()
        assert len(calls) == 1 and calls[0].cancelled
        assert from_exception(failure.value).status == 503
        channels.check_idle()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(wait())


@pytest.mark.parametrize("assigned", [False, True])
def test_who_leaves_while_no_worker_has_answered_leaves_nothing(assigned: bool) -> None:
    async def leave() -> None:
        channels = ClientChannels()
        call = Call()
        call.assigned = assigned
        stream = RequestCall(call, channels, "r")
        pulled = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(1)
        pulled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulled
        stream.cancel()
        channels.check_idle()
        assert call.cancelled
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(leave())


def answer_of(asked: Asked) -> CompletionStream:
    return stream_over(Workers(asked, ResumeConfig(token_deadline_s=DEADLINE_S)), REQUEST)


FORMAT = AnswerFormat("id", 1, "m", chat=True, prompt_tokens=(2,))


def test_the_client_hears_an_error_in_the_end() -> None:
    """In a stream an event with an error object; before its first byte a status."""

    async def streamed() -> list[str]:
        failed = Errors()
        asked = Asked(lambda: Told(token(1)), lambda: Told())
        lines = [line async for line in server_sent_events(answer_of(asked), FORMAT, failed)]
        assert failed.kinds == ["worker_lost"]
        return lines

    lines = run(streamed())
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and error["code"] == "worker_lost" and "fell silent" in error["message"]

    with pytest.raises(WorkerLostError) as failure:
        run(collect(answer_of(Asked(lambda: Told())), FORMAT))
    assert from_exception(failure.value).status == 503


def test_a_deadline_shorter_than_signs_of_life_come_is_refused() -> None:
    with pytest.raises(ValueError, match="--token-deadline-s 29 is too short: it must be at least 30"):
        ServeConfig(engine=EngineConfig(step_deadline_s=1), resume=ResumeConfig(token_deadline_s=29))
    ServeConfig(engine=EngineConfig(step_deadline_s=1), resume=ResumeConfig(token_deadline_s=30))


def test_a_deadline_within_which_a_healthy_worker_may_make_no_progress_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 10 more than --step-deadline-s 200"):
        ServeConfig(engine=EngineConfig(step_deadline_s=200), resume=ResumeConfig(token_deadline_s=209))
    ServeConfig(engine=EngineConfig(step_deadline_s=200), resume=ResumeConfig(token_deadline_s=210))


@contextmanager
def open_llm(model: Path, *, hot_chunks: int = 64, **settings: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {"keep_ratio": 1.0, "chunk_tokens": 16, "cold_bytes": 4 << 20, "window_steps": 16}
    defaults["min_resident_tokens"] = 0
    with (
        TemporaryDirectory(prefix="failover-test-", dir="/dev/shm") as directory,
        LLM(
            str(model),
            skip_tokenizer=True,
            hot_bytes=hot_chunks * CHUNK_BYTES,
            arena_dir=Path(directory),
            **(defaults | settings),
        ) as llm,
    ):
        yield llm


class Clock:
    """A clock that the test sets, in seconds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Gate:
    """Blocks the layer that reaches it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shut, self.reached, self.opened = False, threading.Event(), threading.Event()
        store = attention.ops.store_kv

        def gated(*args: Any, **kwargs: Any) -> None:
            if self.shut:
                self.reached.set()
                assert self.opened.wait(60)
            store(*args, **kwargs)

        monkeypatch.setattr(attention.ops, "store_kv", gated)


def wound(llm: LLM) -> Clock:
    """Set the engine's clock."""
    clock = Clock()
    llm.engine.pulse.clock = clock
    llm.engine.pulse.beat()
    return clock


def request(name: str, prompt: list[int], tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(name, tuple(prompt), SamplingParams(max_tokens=tokens, ignore_eos=True))


async def soon(waited: Awaitable[T]) -> T:
    async with asyncio.timeout(60):
        return await waited


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


async def all_of(events: AsyncGenerator[TokenEvent, None]) -> list[int]:
    return [token async for event in events for token in event.token_ids]


def test_a_step_that_hangs_fails_the_health_check_and_ends_all_requests(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def hang(llm: LLM) -> None:
        engine, clock = AsyncEngine(llm.engine), wound(llm)
        deadline_s = llm.config.step_deadline_s
        assert await soon(all_of(engine.generate(request("before", prompts[0]))))
        gate.shut = True
        asked = [asyncio.ensure_future(all_of(engine.generate(request(str(n), prompts[n])))) for n in range(2)]
        await until(gate.reached.is_set)
        clock.now_s += deadline_s - 1
        engine.check_health()
        clock.now_s += 2
        with pytest.raises(EngineHungError, match=r"nothing was done for 121 s.*--step-deadline-s"):
            engine.check_health()
        for one in asked:
            with pytest.raises(EngineHungError):
                await soon(one)
        assert not engine.alive
        with pytest.raises(EngineHungError):
            await soon(anext(engine.generate(request("after", prompts[2]))))
        with pytest.raises(EngineHungError):
            engine.check_health()
        await soon(asyncio.to_thread(engine.close))  # does not wait for it
        assert engine._thread.is_alive()
        gate.opened.set()
        await soon(asyncio.to_thread(engine._thread.join))  # where it gets on after all, it leaves nothing behind
        assert llm.engine.pool.referenced == 0 and llm.memory.stats().held_slots == 0

    with open_llm(tiny_model) as llm:
        asyncio.run(hang(llm))


def test_a_long_step_with_layers_that_end_is_no_hang(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, reference: Any
) -> None:
    """Neither a step of three layers of 100 s each, nor an engine that is idle for hours."""

    async def slow(llm: LLM) -> None:
        engine, clock = AsyncEngine(llm.engine), wound(llm)
        store, health = attention.ops.store_kv, list[float]()

        def takes_long(*args: Any, **kwargs: Any) -> None:
            clock.now_s += 100
            health.append(llm.engine.pulse.silent_s)
            engine.check_health()
            store(*args, **kwargs)

        monkeypatch.setattr(attention.ops, "store_kv", takes_long)
        assert await soon(all_of(engine.generate(request("a", prompts[2])))) == reference(prompts[2], 4)
        assert len(health) == 4 * 3 and max(health) == 100
        await until(lambda: engine._engine.pulse._resting)
        clock.now_s += 100_000
        engine.check_health()
        assert await soon(all_of(engine.generate(request("b", prompts[0])))) == reference(prompts[0], 4)
        await soon(asyncio.to_thread(engine.close))

    with open_llm(tiny_model) as llm:
        asyncio.run(slow(llm))


class WorkerCall:
    """A call of an in-process worker."""

    assigned = True

    def __init__(self, news: AsyncGenerator[Any, None]) -> None:
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._listen(news))

    async def _listen(self, news: AsyncGenerator[Any, None]) -> None:
        async with aclosing(news):
            async for one in news:
                self._said.put_nowait(one)
        self._said.put_nowait(None)

    def __aiter__(self) -> "WorkerCall":
        return self

    async def __anext__(self) -> Any:
        if (one := await self._said.get()) is None:
            raise StopAsyncIteration
        return one

    def cancel(self) -> None:
        self._task.cancel()


async def served(engine: AsyncEngine, worker: WorkerChannels, asked: GenerateRequest) -> AsyncGenerator[Any, None]:
    async with (
        aclosing(engine.generate(asked)) as events,
        aclosing(worker.carry(asked.client_id, events)) as carried,
    ):
        async for news in carried:
            yield news


@pytest.mark.parametrize("requests", [1, 2])
def test_a_long_step_that_gets_on_is_no_silence_and_a_hung_one_is(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """A step has a layer every 100 s for more than an hour, then none.

    This holds for requests in the step and for later ones that the engine has not admitted, with and without a channel.
    """
    gate = Gate(monkeypatch)
    deadline_s = 120.0

    async def slow(llm: LLM) -> None:
        engine, _ = AsyncEngine(llm.engine), wound(llm)
        worker, asked = WorkerChannels("w"), list[str]()
        channels = ClientChannels(lambda channel: WorkerCall(worker.batches(channel)))

        def start(request: GenerateRequest) -> RequestCall:
            asked.append(request.request_id)
            sent = replace(request, client_id=channels.client_id)
            return RequestCall(WorkerCall(served(engine, worker, sent)), channels, request.request_id)

        def ask(number: int) -> "asyncio.Future[TokenEvent]":
            config = ResumeConfig(token_deadline_s=deadline_s, max_silent_workers=1)
            asked_for = request(str(number), prompts[number])
            return asyncio.ensure_future(anext(Reader(stream_over(Workers(start, config), asked_for))))

        gate.shut = True
        pulled = [ask(0)]
        await asyncio.sleep(1)
        assert gate.reached.wait(60)  # no turn of the event loop until the engine is in the step
        pulled += [ask(number) for number in range(1, requests)]
        for _ in range(40):
            llm.engine.pulse.beat()
            await asyncio.sleep(100)
        assert not any(one.done() for one in pulled) and len(asked) == requests
        await asyncio.sleep(2 * deadline_s)
        for one in pulled:
            with pytest.raises(WorkerLostError, match="sent nothing for 120 s"):
                await one
        gate.opened.set()
        await asyncio.to_thread(engine.close)
        channels.check_idle()

    with open_llm(tiny_model) as llm:
        run(slow(llm))


def test_only_those_of_whom_there_is_no_news_hear_that_the_engine_gets_on(
    tiny_model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def listen(llm: LLM) -> None:
        engine, heard = AsyncEngine(llm.engine), dict[str, list[TokenEvent]](runs=[], waits=[])
        wound(llm)

        async def hear(name: str, number: int) -> None:
            async for event in engine.generate(request(name, prompts[number])):
                heard[name].append(event)

        gate.shut = True
        hearing = [asyncio.ensure_future(hear("runs", 0))]
        await asyncio.sleep(0)
        assert gate.reached.wait(60)
        hearing.append(asyncio.ensure_future(hear("waits", 1)))
        for _ in range(100):
            await asyncio.sleep(SIGN_OF_LIFE_S / 2)
            llm.engine.pulse.beat()
            engine._deliver([TokenEvent("runs", (1,), "")])
        await asyncio.sleep(0)
        assert len(heard["runs"]) == 100 and not any(event.waiting for event in heard["runs"])
        assert len(heard["waits"]) in (48, 49) and all(event.waiting for event in heard["waits"])
        for one in hearing:
            one.cancel()
        await asyncio.wait(hearing)
        gate.opened.set()
        await asyncio.to_thread(engine.close)
        assert engine._signs is None
        assert not engine._streams

    with open_llm(tiny_model) as llm:
        run(listen(llm))


@pytest.mark.parametrize("max_restarts", [0, 3])
@pytest.mark.parametrize("streamed", [False, True])
def test_restarts_for_lost_chunks_are_bounded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int, streamed: bool
) -> None:
    """Every stored chunk is damaged: the request ends with an error that names the cause, and holds nothing."""
    prompt = list(range(3, 253)) * 2
    kept: dict[str, Any] = {"hot_chunks": 8} if streamed else {"hot_chunks": 24, "keep_ratio": 0.2}
    with open_llm(tiny_model, max_restarts=max_restarts, cold_bytes=8 << 20, **kept) as llm:
        llm.engine.add_request(
            GenerateRequest("other", tuple(prompt[:20]), SamplingParams(max_tokens=4, ignore_eos=True))
        )
        while not llm.engine.idle:
            llm.engine.step()
        monkeypatch.setattr(Arena, "check", lambda *_: False)
        monkeypatch.setattr(ChunkLifecycle, "lost", lambda self, seq, damaged: len(seq.chunks) // 20)
        llm.engine.add_request(request("a", prompt, 120))
        (seq,) = llm.engine._sequences.values()
        last = None
        for _ in range(5000):
            for event in llm.engine.step():
                last = event
            if llm.engine.idle:
                break
        assert last is not None and last.finish_reason == "error" and last.chunks_lost and not last.overloaded
        assert seq.restarts == max_restarts
        assert f"lost {max_restarts + 1} times" in str(last.error) and "--max-restarts" in str(last.error)
        for _ in range(2):
            llm.engine.flush()
        llm.engine.check_integrity()
        llm.memory.check_integrity()
        assert llm.engine.pool.referenced == llm.engine.pool.dirty == llm.memory.stats().held_slots == 0
        assert not llm.engine._chunks._holders and not llm.memory.holders()
        monkeypatch.undo()
        llm.engine.add_request(request("a", prompt, 2))  # and its id is free
        while not llm.engine.idle:
            events = llm.engine.step()
        assert events[-1].finish_reason == "length"


def test_lost_chunks_are_an_error_of_the_memory_to_the_client() -> None:
    lost = TokenEvent("r", (), "", "error", LAST, "lost 9 times", chunks_lost=True)
    with pytest.raises(ChunkLostError, match="lost 9 times") as failure:
        run(collect(answer_of(Asked(lambda: Told(token(1), lost))), FORMAT))
    error = from_exception(failure.value)
    assert (error.status, error.code) == (503, "memory_unavailable")
    with pytest.raises(OverloadedError):
        full = TokenEvent("r", (), "", "error", LAST, "full", overloaded=True)
        run(collect(answer_of(Asked(lambda: Told(full))), FORMAT))


class Away:
    """A node that does not answer: each call to it takes 20 s of ``clock``, and fails."""

    def __init__(self, clock: Clock, pulse: Pulse) -> None:
        self._clock, self._pulse = clock, pulse
        self.silences: list[float] = []

    def _call(self) -> None:
        self._clock.now_s += 20
        self.silences.append(self._pulse.silent_s)

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        self._call()
        raise ChunkLostError("no answer")

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        self._call()
        raise ChunkLostError("no answer")

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        self._call()
        raise ChunkLostError("no answer")

    def reserve_quota(self, holder: str, chunks: int) -> None:
        self._call()
        if len(self.silences) < 10:
            raise OverloadedError("full")

    def release(self, holder: str) -> None:
        pass


def test_a_node_that_is_away_is_no_hang_of_those_who_ask_it() -> None:
    """Ten groups of two tries: 400 s in all, with a beat after every call."""
    clock = Clock()
    pulse = Pulse(clock)
    away: Any = Away(clock, pulse)
    told: list[Completion] = []
    failures: list[BaseException] = []
    far = RemoteTransfers(away, away, told.append, failures.append, pulse.progress)
    far.begin("s", SpreadQuota(local_chunks=0, max_in_flight=2), 0)
    items = tuple(CopyItem(bytes([number]) * 16, SlotRef(number, 0, remote=True), number) for number in range(20))
    far.recall(1, "s", items, lambda _: Copied((), 0.0), 1)
    far.close()
    assert not failures and told == [Recalled(1, items, 0, told[0].duration_s, 0)]  # type: ignore[union-attr]
    assert away.silences == [20.0] * 20 and pulse.silent_s == 0


def test_a_search_that_asks_many_times_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locator, "QUOTA_POLL_S", 0.0)
    monkeypatch.setattr(locator, "QUOTA_WAIT_S", 1000.0)
    clock = Clock()
    pulse = Pulse(clock)
    away: Any = Away(clock, pulse)
    away.spread = None
    told: list[PrefixHeld] = []
    failures: list[BaseException] = []
    copies: Any = SimpleNamespace(sound_prefix=lambda keys, refs: len(refs))
    found = locator.PrefixSearch(away, copies, told.append, failures.append, progress=pulse.progress)
    found.start("s", (bytes(16),), lambda _: (bytes(16),), 3)
    for search in found.unfinished():
        search.result(60)
    found.close()
    assert not failures and [held.failure for held in told] == [""]
    assert away.silences == [20.0] * 10 and pulse.silent_s == 0


def test_progress_ends_no_rest() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.rest()
    pulse.progress()
    clock.now_s += 1000
    assert pulse.silent_s == 0
    pulse.beat()
    clock.now_s += 1
    assert pulse.silent_s == 1
