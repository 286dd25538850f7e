"""Channels between clients and workers: real engines and both ends, with calls that end as Ray Serve's do."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_workers import Reader, Workers, stream_over

from forecache.cluster.config import ResumeConfig
from forecache.cluster.dispatch.channels import Channels as ClientChannels
from forecache.cluster.dispatch.channels import RequestCall
from forecache.cluster.errors import WorkerLostError
from forecache.workers.core.requests import (
    ChannelRequest,
    EventBatch,
    GenerateRequest,
    Moved,
    RequestNews,
    SamplingParams,
    TokenEvent,
)
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.channels import Channels as WorkerChannels
from forecache.workers.errors import EngineDeadError, InvalidRequestError
from forecache.workers.llm import LLM

pytestmark = pytest.mark.anyio
Reference = Callable[[list[int], int], list[int]]
CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
TOKENS = 60
LONG = 150
ENDLESS = 1500
DEADLINE_S = 60.0


@pytest.fixture
def llms(tiny_model: Path, arena_dir: Path) -> Iterator[list[LLM]]:
    """Two LLMs; the tests close their engines."""
    made = []
    for name in ("a", "b"):
        (arena_dir / name).mkdir()
        made.append(
            LLM(
                str(tiny_model),
                skip_tokenizer=True,
                keep_ratio=1.0,
                chunk_tokens=16,
                hot_bytes=400 * CHUNK_BYTES,
                cold_bytes=8 << 20,
                arena_dir=arena_dir / name,
            )
        )
    yield made
    for llm in made:
        llm._indexer.close()
        llm.memory.arena.unlink()


class Call:
    """A call of a worker's method, as Ray Serve makes it: it runs whether it is read or not, and can be cancelled."""

    def __init__(self, said: AsyncGenerator[Any, None]) -> None:
        self._came: asyncio.Queue[Any] = asyncio.Queue()
        self.seen: list[Any] = []
        self._task = asyncio.create_task(self._read(said))

    async def _read(self, said: AsyncGenerator[Any, None]) -> None:
        end: Exception = StopAsyncIteration()
        try:
            async with aclosing(said):
                async for news in said:
                    self.seen.append(news)
                    self._came.put_nowait(news)
        except EngineDeadError as error:
            end = WorkerLostError(str(error))
        except InvalidRequestError as error:
            end = error
        except asyncio.CancelledError:
            end = WorkerLostError("the call was cancelled")
        self._came.put_nowait(end)

    def __aiter__(self) -> AsyncIterator[RequestNews | EventBatch]:
        return self

    async def __anext__(self) -> RequestNews | EventBatch:
        news: RequestNews | EventBatch | Exception = await self._came.get()
        if isinstance(news, Exception):
            self._came.put_nowait(news)
            raise news
        return news

    @property
    def assigned(self) -> bool:
        return True

    def cancel(self) -> None:
        self._task.cancel()


class Worker:
    """An in-process worker with the methods of :class:`DecodeWorker`."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.llm = llm
        self.engine = AsyncEngine(llm.engine)
        self.channels = WorkerChannels(name)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestNews, None]:
        async with (
            aclosing(self.engine.generate(request)) as events,
            aclosing(self.channels.carry(request.client_id, events)) as carried,
        ):
            async for news in carried:
                yield news


class Client:
    """An ingress' client: sends requests to ``chosen``, and channels to the worker that they name or to ``chosen``."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        self.workers = workers
        self.chosen = next(iter(workers))
        self.misled = False
        self.opened: list[Call] = []
        self.calls: dict[str, Call] = {}
        self.channels = OpenedBy(self)

    def open(self, asked: ChannelRequest) -> Call:
        name = self.chosen if self.misled or asked.worker_id not in self.workers else asked.worker_id
        self.opened.append(Call(self.workers[name].channels.batches(asked)))
        return self.opened[-1]

    def start(self, request: GenerateRequest) -> RequestCall:
        call = Call(self.workers[self.chosen].generate(request))
        self.calls[request.request_id] = call
        return RequestCall(call, self.channels, request.request_id)

    def ask(self, name: str, prompt: list[int], tokens: int = TOKENS) -> Reader:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        request = GenerateRequest(name, tuple(prompt), sampling, client_id=self.channels.client_id)
        return Reader(stream_over(Workers(self.start, ResumeConfig()), request))

    def batches(self) -> list[EventBatch]:
        return [batch for call in self.opened for batch in call.seen]

    def moved(self) -> set[str]:
        return {name for name, call in self.calls.items() if any(isinstance(news, Moved) for news in call.seen)}


class OpenedBy(ClientChannels):
    """A client's channels, opened through ``client``."""

    def __init__(self, client: Client) -> None:
        super().__init__(None)
        self._client = client

    def open(self, request: ChannelRequest) -> Call:
        return self._client.open(request)


@asynccontextmanager
async def serving(llms: list[LLM]) -> AsyncIterator[Client]:
    """Two workers and a client. At the end neither side may have a request or channel left."""
    workers = {name: Worker(name, llm) for name, llm in zip(("a", "b"), llms, strict=True)}
    client = Client(workers)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
            for worker in workers.values():
                await until(lambda worker=worker: is_idle(worker.channels))  # type: ignore[misc]
            await until(lambda: is_idle(client.channels))
    finally:
        for worker in workers.values():
            await asyncio.to_thread(worker.engine.close)
    for llm in llms:
        assert llm.engine.pool.referenced == 0
        assert llm.memory.stats().held_slots == 0


def is_idle(channels: ClientChannels | WorkerChannels) -> bool:
    try:
        channels.check_idle()
    except AssertionError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def answer(stream: Reader) -> list[int]:
    tokens: list[int] = []
    async for event in stream:
        tokens += event.token_ids
        if event.finish_reason is not None:
            assert event.finish_reason == "length" and event.stats is not None
            return tokens
    raise AssertionError("the stream ended without a last event")


async def until_begun(stream: Reader) -> TokenEvent:
    async for event in stream:
        if event.token_ids:
            return event
    raise AssertionError("no token came")


async def alone(client: Client, prompts: list[list[int]]) -> list[list[int]]:
    """The long answers to ``prompts``, requested one after another, so without channels."""
    return [await answer(client.ask(f"alone{n}", prompt, LONG)) for n, prompt in enumerate(prompts)]


async def test_a_steps_events_come_as_one_message(
    llms: list[LLM], prompts: list[list[int]], reference: Reference
) -> None:
    async with serving(llms) as client:
        answers = await asyncio.gather(*(answer(client.ask(str(n), prompts[n % 4])) for n in range(8)))
        assert answers == [reference(prompts[n % 4], TOKENS) for n in range(8)]
        assert len(client.opened) == 1 and len(client.moved()) == 8
        tokens = [sum(len(event.token_ids) for event in batch.events) for batch in client.batches()]
        assert sum(tokens) > 0.7 * 8 * TOKENS  # the rest came before the channel was there
        together = [len({event.request_id for event in batch.events}) for batch in client.batches()]
        assert max(together) == 8 and sum(tokens) > 3 * len(tokens)
        # and again, over another channel: the first ended with its last request
        assert len(await asyncio.gather(*(answer(client.ask(f"{n}+", prompts[n])) for n in range(4)))) == 4
        assert len(client.opened) == 2


async def test_one_request_alone_needs_no_channel(
    llms: list[LLM], prompts: list[list[int]], reference: Reference
) -> None:
    async with serving(llms) as client:
        for n in range(2):
            assert await answer(client.ask(str(n), prompts[n])) == reference(prompts[n], TOKENS)
        assert not client.opened


async def test_who_reads_late_finds_all_in_order(
    llms: list[LLM], prompts: list[list[int]], reference: Reference
) -> None:
    """One reader takes its first event long after the channel has ended."""
    async with serving(llms) as client:
        late = client.ask("late", prompts[0])
        first = await until_begun(late)
        quick = [answer(client.ask(str(n), prompts[n])) for n in range(4)]
        assert await asyncio.gather(*quick) == [reference(prompts[n], TOKENS) for n in range(4)]
        await until(lambda: client.workers["a"].engine.stats().counters.finished_requests == 5)
        await until(lambda: not client.channels._pumps)
        assert "late" in client.moved()
        assert [*first.token_ids, *await answer(late)] == reference(prompts[0], TOKENS)
        assert set(client.calls) == {"late", "0", "1", "2", "3"}  # nothing had to be asked for again


@pytest.mark.parametrize("stage", ["assigned", "begun", "moved"])
async def test_who_leaves_frees_all_and_harms_nobody(llms: list[LLM], prompts: list[list[int]], stage: str) -> None:
    async with serving(llms) as client:
        expected = await alone(client, prompts)
        others = [asyncio.create_task(answer(client.ask(str(n), prompts[n], LONG))) for n in range(3)]
        if stage == "moved":
            await until(lambda: len(client.moved()) == 3)
        leaving = [client.ask(f"left{n}", prompts[n], ENDLESS) for n in range(4)]
        if stage == "assigned":
            waiting = [asyncio.ensure_future(anext(stream)) for stream in leaving]
            await asyncio.sleep(0)
        else:
            waiting = []
            await asyncio.gather(*map(until_begun, leaving))
        if stage == "moved":
            await until(lambda: {"left0", "left1", "left2", "left3"} <= client.moved())
        for stream in leaving:
            stream.close()
        for task in waiting:
            with pytest.raises(StopAsyncIteration):
                await task
        assert await asyncio.gather(*others) == expected[:3]
        assert not any(name.startswith("left") for name in client.channels._mailboxes)


async def test_a_channel_that_breaks_costs_a_pause(llms: list[LLM], prompts: list[list[int]]) -> None:
    async with serving(llms) as client:
        expected = await alone(client, prompts)
        tasks = [asyncio.create_task(answer(client.ask(str(n), prompts[n], LONG))) for n in range(4)]
        await until(lambda: len(client.moved()) == 4)
        client.opened[0].cancel()
        assert await asyncio.gather(*tasks) == expected[:4]
        assert {"0~1", "1~1", "2~1", "3~1"} <= set(client.calls)
        assert len(client.opened) >= 2


async def test_an_engine_that_ends_is_gone_on_from_elsewhere(llms: list[LLM], prompts: list[list[int]]) -> None:
    async with serving(llms) as client:
        expected = await alone(client, prompts)
        tasks = [asyncio.create_task(answer(client.ask(str(n), prompts[n], LONG))) for n in range(4)]
        await until(lambda: len(client.moved()) == 4)
        client.chosen = "b"
        await asyncio.to_thread(client.workers["a"].engine.close)
        assert await asyncio.gather(*tasks) == expected[:4]
        assert {"0~1", "1~1", "2~1", "3~1"} <= set(client.calls)


async def test_a_channel_that_came_to_the_wrong_worker_is_none(
    llms: list[LLM], prompts: list[list[int]], reference: Reference
) -> None:
    """The router sent the channel to another worker because its own is gone: events come by the requests' calls."""
    async with serving(llms) as client:
        expected = await alone(client, prompts)
        first = client.ask("first", prompts[0], LONG)
        begun = await until_begun(first)
        client.chosen, client.misled = "b", True
        other = client.ask("other", prompts[1], LONG)
        client.workers["b"].channels._worker_id = "c"  # a worker that does not exist
        rest = await asyncio.gather(*(answer(stream) for stream in (first, other)), answer(client.ask("2", prompts[2])))
        assert [*begun.token_ids, *rest[0]] == expected[0]
        assert rest[1:] == [expected[1], reference(prompts[2], TOKENS)]
        assert client.moved() <= {"other", "2"}


async def test_a_request_that_is_refused_says_why_and_the_rest_goes_on(
    llms: list[LLM], prompts: list[list[int]]
) -> None:
    async with serving(llms) as client:
        expected = await alone(client, prompts)
        tasks = [asyncio.create_task(answer(client.ask(str(n), prompts[n], LONG))) for n in range(3)]
        await until(lambda: len(client.moved()) == 3)
        with pytest.raises(InvalidRequestError):
            await answer(client.ask("bad", [1, 256]))
        assert await asyncio.gather(*tasks) == expected[:3]
