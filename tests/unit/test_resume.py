"""An answer that outlives its worker: other engines continue it with the same tokens."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from fake_workers import Reader, Record, Workers, stream_over

from forecache.cluster.config import ResumeConfig
from forecache.cluster.errors import WorkerLostError
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.errors import EngineDeadError, InvalidRequestError, OverloadedError
from forecache.workers.llm import LLM
from forecache.workers.residency.window import PROBE_TOKENS

CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4


@contextmanager
def open_llm(model: Path, **settings: Any) -> Iterator[LLM]:
    """An LLM with 16-token chunks and a hot pool that is too small for everything."""
    defaults = {"chunk_tokens": 16, "cold_bytes": 4 << 20, "window_steps": 16, "hot_bytes": 40 * CHUNK_BYTES}
    defaults["min_resident_tokens"] = 0
    with (
        TemporaryDirectory(prefix="resume-test-", dir="/dev/shm") as directory,
        LLM(str(model), skip_tokenizer=True, arena_dir=Path(directory), **(defaults | settings)) as llm,
    ):
        yield llm


def tokens_of(llm: LLM, request: GenerateRequest) -> list[int]:
    tokens: list[int] = []
    llm.engine.add_request(request)
    while True:
        for event in llm.engine.step():
            assert event.position == len(request.resume_token_ids) + len(tokens) or not event.token_ids
            tokens += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason == "length" and event.stats is not None
                assert event.stats.completion_tokens == request.sampling.max_tokens
                return tokens


def request_for(prompt: list[int], tokens: int, resume: tuple[int, ...] = (), **cache: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.7, seed=3)
    return GenerateRequest("r", tuple(prompt), sampling, CacheOptions(**cache), resume)


@pytest.mark.parametrize(
    "cache", [{"keep_ratio": 1.0}, {"policy": "full"}, {"keep_ratio": 0.2}, {"keep_ratio": 0.2, "policy": "random"}]
)
@pytest.mark.parametrize("sent", [1, 15, 40])
def test_another_engine_goes_on_where_one_stopped(
    tiny_model: Path, prompts: list[list[int]], cache: dict[str, Any], sent: int
) -> None:
    """Also over partial sets: with ``late_policy="wait"`` earlier steps are replayed over the same sets."""
    settings: dict[str, Any] = {"late_policy": "wait", "seed": 0}
    with open_llm(tiny_model, **settings) as llm:
        whole = tokens_of(llm, request_for(prompts[2], 60, **cache))
    with open_llm(tiny_model, **settings) as llm:
        resumed = tokens_of(llm, request_for(prompts[2], 60, tuple(whole[:sent]), **cache))
        assert whole[:sent] + resumed == whole
        with pytest.raises(InvalidRequestError, match="complete"):
            llm.engine.add_request(request_for(prompts[2], 60, tuple(whole), **cache))
        llm.engine.flush()
        llm.engine.check_integrity()


@pytest.mark.parametrize("sent", [1, 20])
def test_what_is_streamed_through_a_small_pool_is_gone_on_with(
    tiny_model: Path, prompts: list[list[int]], sent: int
) -> None:
    """The answer so far was computed over all chunks, so nothing has to be replayed."""
    settings: dict[str, Any] = {"late_policy": "wait", "hot_bytes": 16 * CHUNK_BYTES}
    with open_llm(tiny_model, **settings) as llm:
        whole = tokens_of(llm, request_for(prompts[2], 40, keep_ratio=0.5))
        request = request_for(prompts[2], 40, tuple(whole[:sent]), keep_ratio=0.5)
        llm.engine.add_request(request)
        (seq,) = llm.engine._sequences.values()
        steps, resumed = 0, list[int]()
        while not llm.engine.idle:
            events = llm.engine.step()
            assert seq.replayed_tokens == 0
            steps += any(event.token_ids for event in events)
            resumed += [token for event in events for token in event.token_ids]
        assert seq.residency.streamed and whole[:sent] + resumed == whole and steps == 40 - sent


def test_where_runs_need_not_be_reproducible_the_beginning_is_prefilled(
    tiny_model: Path, prompts: list[list[int]]
) -> None:
    with open_llm(tiny_model, keep_ratio=0.2) as llm:
        whole = tokens_of(llm, request_for(prompts[2], 60))
    with open_llm(tiny_model, keep_ratio=0.2) as llm:
        llm.engine.add_request(request_for(prompts[2], 60, tuple(whole[:40])))
        steps, tokens = 0, 0
        while not llm.engine.idle:
            events = llm.engine.step()
            steps += any(event.token_ids for event in events)
            tokens += sum(len(event.token_ids) for event in events)
        assert tokens == steps == 20


def steps_of(llm: LLM) -> Iterator[TokenEvent]:
    while not llm.engine.idle:
        yield from llm.engine.step()


class EngineStream:
    """A worker's stream, as the ingress gets it through Ray Serve."""

    def __init__(self, engine: AsyncEngine, request: GenerateRequest) -> None:
        self.assigned = True
        self._engine = engine
        self._request = request
        self._events: AsyncGenerator[TokenEvent, None] = engine.generate(request)

    def __aiter__(self) -> "EngineStream":
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            return await anext(self._events)
        except EngineDeadError as error:
            raise WorkerLostError(str(error)) from error

    def cancel(self) -> None:
        self._engine.cancel(self._request.request_id)


def test_engines_that_end_one_after_the_other_give_one_answer(tiny_model: Path, prompts: list[list[int]]) -> None:
    request = request_for(prompts[1], 90, keep_ratio=1.0)
    with open_llm(tiny_model) as llm:
        whole = tokens_of(llm, request)

    async def through_three() -> list[int]:
        with ExitStack() as stack:
            engines = []
            for _ in range(3):
                engines.append(AsyncEngine(stack.enter_context(open_llm(tiny_model)).engine))
                stack.callback(engines[-1].close)
            asked: list[GenerateRequest] = []

            def start(asked_for: GenerateRequest) -> EngineStream:
                asked.append(asked_for)
                return EngineStream(engines[len(asked) - 1], asked_for)

            record, tokens = Record(), list[int]()
            stream = Reader(stream_over(Workers(start, ResumeConfig()), request, record=record))
            async for event in stream:
                tokens += event.token_ids
                assert event.request_id == "r"
                if len(tokens) in (20, 50) and event.token_ids:
                    await asyncio.to_thread(engines[len(asked) - 1].close)
            assert [a.request_id for a in asked] == ["r", "r~1", "r~2"]
            assert all(list(a.resume_token_ids) == tokens[: len(a.resume_token_ids)] for a in asked)
            first, second, third = (len(a.resume_token_ids) for a in asked)
            # the stream may have read one event ahead before its engine was closed
            assert first == 0 and second in (20, 21) and third in (50, 51) and record.resumes == 2
            return tokens

    assert asyncio.run(through_three()) == whole


def test_a_silent_worker_is_left(tiny_model: Path, prompts: list[list[int]]) -> None:
    request = request_for(prompts[0], 30, keep_ratio=1.0)

    async def left() -> tuple[list[int], int]:
        with open_llm(tiny_model) as llm:
            engine = AsyncEngine(llm.engine)
            asked = 0

            class Silent(EngineStream):
                """A living worker that sends nothing after the fifth event."""

                events = 0

                async def __anext__(self) -> TokenEvent:
                    self.events += 1
                    if self.events > 5:
                        await asyncio.sleep(3600)
                    return await super().__anext__()

            def start(asked_for: GenerateRequest) -> EngineStream:
                nonlocal asked
                asked += 1
                return (Silent if asked == 1 else EngineStream)(engine, asked_for)

            stream = Reader(stream_over(Workers(start, ResumeConfig(token_deadline_s=0.5)), request))
            tokens = [token async for event in stream for token in event.token_ids]
            await asyncio.to_thread(engine.close)
            return tokens, asked

    tokens, asked = asyncio.run(left())
    with open_llm(tiny_model) as llm:
        assert tokens == tokens_of(llm, request)
    assert asked == 2


class Told:
    """A worker's stream of given events: an exception is raised, a number is a pause in seconds."""

    def __init__(self, *steps: TokenEvent | Exception | float) -> None:
        self._steps = list(steps)
        self.assigned = True

    def __aiter__(self) -> "Told":
        return self

    async def __anext__(self) -> TokenEvent:
        step = self._steps.pop(0)
        if isinstance(step, float):
            await asyncio.sleep(step)
            return await self.__anext__()
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        pass


def tokens_through(*workers: Told, config: ResumeConfig) -> list[int]:
    """The tokens of an answer that several workers continue in turn."""

    async def ask() -> list[int]:
        left = list(workers)
        stream = Reader(stream_over(Workers(lambda _: left.pop(0), config), request_for([1, 2], 3)))
        tokens = [token async for event in stream for token in event.token_ids]
        assert not left
        return tokens

    return asyncio.run(ask())


BEGINNING = (TokenEvent("r", (1,), "a"), WorkerLostError("gone"))
END = TokenEvent("r", (2,), "b", "length", position=1)
FULL = TokenEvent("r", (), "", "error", error="no room", overloaded=True)


def test_a_next_worker_without_room_is_not_the_end() -> None:
    config = ResumeConfig(resume_attempts=2)
    assert tokens_through(Told(*BEGINNING), Told(FULL), Told(END), config=config) == [1, 2]
    with pytest.raises(WorkerLostError, match="no room"):
        tokens_through(Told(*BEGINNING), Told(FULL), Told(FULL), config=config)

    async def first() -> TokenEvent:
        return await anext(Reader(stream_over(Workers(lambda _: Told(FULL), config), request_for([1, 2], 3))))

    with pytest.raises(OverloadedError, match="no room"):  # nothing was sent: the request is refused
        asyncio.run(first())


def test_tokens_that_are_decoded_again_are_told_of(tiny_model: Path, prompts: list[list[int]]) -> None:
    """While tokens are replayed, an event without tokens for each shows that the worker lives."""
    with open_llm(tiny_model, late_policy="wait", keep_ratio=0.2) as llm:
        whole = tokens_of(llm, request_for(prompts[2], 42))
    with open_llm(tiny_model, late_policy="wait", keep_ratio=0.2) as llm:
        llm.engine.add_request(request_for(prompts[2], 42, tuple(whole[:40])))
        events = [event for event in steps_of(llm) if event.prefill_tokens_done >= len(prompts[2])]
    assert [len(event.token_ids) for event in events if event.finish_reason is None][-41:] == [0] * 40 + [1]


def test_no_worker_at_all_is_an_error_in_the_end(tiny_model: Path, prompts: list[list[int]]) -> None:
    async def nobody() -> int:
        with open_llm(tiny_model) as llm:
            engine = AsyncEngine(llm.engine)
            await asyncio.to_thread(engine.close)
            asked = 0

            def start(request: GenerateRequest) -> EngineStream:
                nonlocal asked
                asked += 1
                return EngineStream(engine, request)

            stream = Reader(stream_over(Workers(start, ResumeConfig(resume_attempts=2)), request_for(prompts[0], 5)))
            with pytest.raises(WorkerLostError):
                await anext(stream)
            return asked

    assert asyncio.run(nobody()) == 3


@pytest.mark.parametrize("lost_by_itself", [False, True])
def test_what_a_client_has_left_is_begun_nowhere_else(lost_by_itself: bool) -> None:
    """A cancelled call ends like one whose worker is lost; a worker may also be lost just before the cancellation."""
    begun: list[GenerateRequest] = []

    class Source:
        def __init__(self) -> None:
            self.over = asyncio.Event()
            if lost_by_itself:
                self.over.set()

        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> TokenEvent:
            await self.over.wait()
            raise WorkerLostError("it is gone")

        def cancel(self) -> None:
            self.over.set()

    def start(request: GenerateRequest) -> Source:
        begun.append(request)
        return Source()

    async def leave() -> None:
        stream = Reader(stream_over(Workers(start, ResumeConfig()), request_for([1, 2, 3], 4)))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.02)  # less than the first pause before another worker is asked
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await asyncio.sleep(0.2)

    asyncio.run(leave())
    assert len(begun) == 1


def test_a_session_is_gone_on_with_over_what_it_decoded(tiny_model: Path, prompts: list[list[int]]) -> None:
    """The second turn finds the chunks of the first answer.

    Requests outside the session, or with exact answers, find only those of the prompt.
    """
    with open_llm(tiny_model, late_policy="wait", keep_ratio=0.2) as llm:

        def cached(prompt: list[int], **options: Any) -> tuple[int, list[int]]:
            [answer] = llm.generate([prompt], max_tokens=70, ignore_eos=True, **options)
            return answer.stats.cached_tokens // 16, answer.token_ids

        _, answer = cached(prompts[2], session_id="s")
        llm.engine.flush()
        following = [*prompts[2], *answer, *range(7, 7 + PROBE_TOKENS)]
        assert cached(following)[0] == len(prompts[2]) // 16
        stored = (len(following) - PROBE_TOKENS) // 16
        assert cached(following, session_id="other")[0] == stored  # prefilled just now, exact
        branch = [*prompts[2], *answer, *range(99, 99 + PROBE_TOKENS)]
        assert cached(branch, session_id="s")[0] == stored
        llm.engine.flush()
        llm.engine.check_integrity()
        assert llm.memory.stats().held_slots == 0


@pytest.mark.parametrize("options", [{"keep_ratio": 1.0}, {"policy": "full"}])
def test_an_exact_request_of_a_session_takes_no_approximate_chunk(
    tiny_model: Path, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    with open_llm(tiny_model, late_policy="wait", keep_ratio=0.2) as llm:
        [first] = llm.generate([prompts[2]], max_tokens=70, ignore_eos=True, session_id="s")
        llm.engine.flush()
        following = [*prompts[2], *first.token_ids, *range(7, 7 + PROBE_TOKENS)]
        [again] = llm.generate([following], max_tokens=4, session_id="s")
        [exact] = llm.generate([following[:-1]], max_tokens=4, session_id="s", **options)
        assert again.stats.cached_tokens // 16 == (len(following) - PROBE_TOKENS) // 16
        assert exact.stats.cached_tokens // 16 == len(prompts[2]) // 16
