"""A refused request leaves nothing behind, wherever it is refused.

The steps of taking a request in are not listed here: a test makes each call that is made on the way fail in turn.
"""

import asyncio
import gc
import importlib.util
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, ModuleType
from typing import Any

import pytest
from fake_workers import ONE_TRY, Reader, Workers, stream_over
from starlette.requests import Request

from forecache.cluster.config import LimitsConfig, ResumeConfig
from forecache.cluster.dispatch.admission import Admission, ResidentEstimate
from forecache.cluster.dispatch.channels import Channels, RequestCall
from forecache.cluster.errors import WorkerLostError
from forecache.cluster.http.api import Api
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.request_reader import ReadJob, ReadRequest, RequestReader, Wanted
from forecache.cluster.http.responses import AnswerFormat
from forecache.cluster.http.responses import collect as collect_answer
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.tenants import Tenants
from forecache.indexer.serving.config import SelectionConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.grammar import Matcher
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.engine import engine as engine_module
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.channels import Channels as WorkerChannels
from forecache.workers.errors import ForecacheError, InvalidRequestError
from forecache.workers.llm import LLM
from forecache.workers.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.anyio
CHUNK_BYTES = 2 * 2 * 2 * 16 * 16 * 4
ROOT = Path(engine_module.__file__).parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("cluster", "workers", "indexer", "kernels"))
GRAMMAR = r"start: /[a-z]{1,200}/"
MOST_CALLS = 500


class InjectedError(Exception):
    """Raised by the call whose turn it is to fail."""


class Breaking:
    """Makes the ``at``-th call of this project's functions fail, while it is entered."""

    def __init__(self, at: int) -> None:
        self._left = at
        self._begun: set[FrameType] = set()
        self.broke = ""

    def __enter__(self) -> "Breaking":
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGES):
            return
        if frame in self._begun or frame.f_code.co_name in ("_deliver", "_forget", "answered", "_give_signs"):
            return  # a coroutine that goes on; what the event loop calls
        self._begun.add(frame)
        if self._left == 0:
            sys.settrace(None)
            self.broke = f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"
            raise InjectedError(self.broke)
        self._left -= 1


@pytest.fixture(scope="module")
def byte_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("byte_model", Path(__file__).parents[1] / "cluster" / "byte_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory, byte_model: ModuleType) -> Path:
    path: Path = byte_model.write_byte_model(tmp_path_factory.mktemp("bytes"))
    return path


@contextmanager
def open_llm(model: Path) -> Iterator[LLM]:
    """An LLM with a tokenizer, a pool smaller than an answer's chunks, and decode steps that are replayed."""
    with (
        TemporaryDirectory(prefix="refused-test-", dir="/dev/shm") as directory,
        LLM(
            str(model),
            chunk_tokens=16,
            hot_bytes=40 * CHUNK_BYTES,
            cold_bytes=4 << 20,
            keep_ratio=0.3,
            min_resident_tokens=0,
            late_policy="wait",
            arena_dir=Path(directory),
        ) as llm,
    ):
        yield llm


def demanding(llm: LLM, name: str = "a") -> tuple[GenerateRequest, Matcher | None]:
    """A request with all features: stop strings, a grammar, an answer begun by another worker, a session."""
    sampling = SamplingParams(
        max_tokens=12,
        ignore_eos=True,
        stop=("never",),
        grammar=GRAMMAR,
        logprobs=1,
        logit_bias=((5, 1.0),),
        presence_penalty=0.1,
    )
    assert llm.tokenizer is not None
    begun = tuple(llm.tokenizer("abc", add_special_tokens=False)["input_ids"])
    prompt = tuple(llm.tokenizer("what it is asked " * 20, add_special_tokens=False)["input_ids"])
    return (
        GenerateRequest(name, prompt, sampling, CacheOptions("lookahead", session_id="s"), begun, show_chunks=True),
        llm.engine.grammars.matcher(sampling),
    )


def answer(llm: LLM, name: str) -> list[int]:
    tokens: list[int] = []
    for _ in range(400):
        for event in llm.engine.step():
            if event.request_id == name:
                tokens += event.token_ids
        if llm.engine.idle:
            return tokens
    raise AssertionError("no end")


def check_nothing_left(llm: LLM) -> None:
    engine = llm.engine
    assert engine.idle
    for _ in range(2):
        engine.flush()
    assert not engine._sequences and not engine._leaving and not engine._outputs._detokenizers
    assert not engine._scheduler.waiting and not engine._scheduler.running
    assert not engine._chunks._holders and not engine._chunks._asked and not engine._chunks._releasing
    engine.check_integrity()
    llm.memory.check_integrity()
    assert engine.pool.referenced == engine.pool.dirty == 0
    assert llm.memory.stats().held_slots == 0 and not llm.memory.holders()
    assert llm.memory.released_below(engine._name) == engine._serial, "a serial that is never released"


def test_each_call_that_adds_a_request_may_fail(text_model: Path) -> None:
    with open_llm(text_model) as llm:
        request, matcher = demanding(llm)
        llm.engine.add_request(request, matcher=matcher)
        whole = answer(llm, "a")
        assert len(whole) == 12 - len(request.resume_token_ids)
        broken = list[str]()
        for at in range(MOST_CALLS):
            request, matcher = demanding(llm)
            breaking = Breaking(at)
            try:
                with breaking:
                    llm.engine.add_request(request, matcher=matcher)
            except InjectedError:
                broken.append(breaking.broke)
                check_nothing_left(llm)
                llm.engine.cancel("a")
                assert llm.engine.step() == []
                continue
            assert not breaking.broke
            assert answer(llm, "a") == whole  # the last one found nothing left to break
            check_nothing_left(llm)
            break
        else:
            raise AssertionError("it never ends")
        said = "\n".join(broken)
        for step in (
            "check_request",
            "TokenSequence.__init__",
            "OutputProcessor.begin",
            "advance",
            "Scheduler.add",
            "wake",
        ):
            assert step in said, step


@pytest.mark.parametrize("where", ["the first token", "the third"])
def test_a_grammar_that_does_not_allow_what_another_worker_said(text_model: Path, where: str) -> None:
    with open_llm(text_model) as llm:
        request, matcher = demanding(llm)
        assert llm.tokenizer is not None
        said = llm.tokenizer("1" if where == "the first token" else "ab1", add_special_tokens=False)["input_ids"]
        other = GenerateRequest("a", request.prompt_token_ids, request.sampling, resume_token_ids=tuple(said))
        with pytest.raises(InvalidRequestError, match="the grammar can't be followed"):
            llm.engine.add_request(other, matcher=matcher)
        check_nothing_left(llm)
        llm.engine.cancel("a")
        assert llm.engine.step() == []
        llm.engine.add_request(*demanding(llm)[:1], matcher=demanding(llm)[1])
        assert len(answer(llm, "a")) == 9


@pytest.mark.parametrize("token", [-1, 257, 2**40])
def test_tokens_of_another_worker_are_checked_as_the_prompts(text_model: Path, token: int) -> None:
    """Invalid ones would make the tokenizer raise, or the model in a step that others share."""
    with open_llm(text_model) as llm:
        bad = GenerateRequest("a", (5, 6), SamplingParams(max_tokens=8), resume_token_ids=(7, token))
        with pytest.raises(InvalidRequestError, match="vocabulary") as refused:
            llm.engine.add_request(bad)
        assert refused.value.param == "resume_token_ids"
        check_nothing_left(llm)


def test_a_second_request_of_an_id_leaves_the_first_as_it_is(text_model: Path) -> None:
    with open_llm(text_model) as llm:
        request, matcher = demanding(llm)
        llm.engine.add_request(request, matcher=matcher)
        llm.engine.step()
        twin, its_matcher = demanding(llm)
        with pytest.raises(InvalidRequestError, match="running already"):
            llm.engine.add_request(twin, matcher=its_matcher)
        assert len(answer(llm, "a")) == 9
        check_nothing_left(llm)


async def test_each_call_may_fail_in_the_engines_thread(text_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure ends its own request with a typed error; engine and other requests continue."""
    with open_llm(text_model) as llm:
        add, breaking = llm.engine.add_request, Breaking(MOST_CALLS)

        def breaks(*args: Any) -> None:
            with breaking:
                add(*args)

        llm.engine.add_request = breaks  # type: ignore[method-assign]
        engine = AsyncEngine(llm.engine)
        whole = await collect(engine, demanding(llm)[0])
        for at in range(0, MOST_CALLS, 5):
            breaking = Breaking(at)
            try:
                assert await collect(engine, demanding(llm)[0]) == whole
            except ForecacheError as error:
                assert isinstance(error.__cause__, InjectedError) and "log" in str(error)
                assert breaking.broke and breaking.broke in caplog.text
                assert not engine._streams and engine.alive
            else:
                break
        assert at > 30
        await closed(engine, llm)


async def collect(engine: AsyncEngine, request: GenerateRequest) -> list[int]:
    return [token async for event in engine.generate(request) for token in event.token_ids]


async def test_each_call_may_fail_before_the_engines_thread(text_model: Path) -> None:
    """Failures in the event loop: until the request is posted, and until its refusal or first event arrives."""
    with open_llm(text_model) as llm:
        engine = AsyncEngine(llm.engine)
        request = GenerateRequest("a", demanding(llm)[0].prompt_token_ids, SamplingParams(max_tokens=6))
        whole = await collect(engine, request)
        for at in range(MOST_CALLS):
            events, breaking = engine.generate(request), Breaking(at)
            try:
                with breaking:
                    first = await anext(events)
            except InjectedError:
                await events.aclose()
                assert not engine._streams
                await until(lambda: not llm.engine._sequences)
                continue
            rest = [token async for event in events for token in event.token_ids]
            assert [*first.token_ids, *rest] == whole
            break
        assert at >= 3
        await closed(engine, llm)


async def closed(engine: AsyncEngine, llm: LLM) -> None:
    """Close it, and check that nothing is left."""
    await until(lambda: llm.engine.idle)
    await engine.check_integrity()
    await asyncio.to_thread(engine.close)
    assert not llm.engine._outputs._detokenizers and not llm.engine._scheduler.waiting
    assert llm.engine.pool.referenced == 0 and not llm.memory.holders()
    llm.memory.check_integrity()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


class DirectCall:
    """A direct call of a worker; ``cancel`` ends it."""

    assigned = True

    def __init__(self, said: AsyncGenerator[Any, None]) -> None:
        self._said = said

    def __aiter__(self) -> "DirectCall":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._said)

    def cancel(self) -> None:
        self.ending = asyncio.ensure_future(self._said.aclose())


async def test_each_call_may_fail_on_the_way_through_both_ends_of_the_channels(text_model: Path) -> None:
    """Failures of the stream that fails over, of the client's channels and of the worker's; then the client leaves."""
    with open_llm(text_model) as llm:
        engine, worker = AsyncEngine(llm.engine), WorkerChannels("w")
        client = Channels(None)  # opens none: one request alone needs none
        request = GenerateRequest("a", (5, 6, 7), SamplingParams(max_tokens=6, ignore_eos=True), client_id="c")
        calls: list[DirectCall] = []

        def start(asked: GenerateRequest) -> RequestCall:
            calls.append(DirectCall(worker.carry(asked.client_id, engine.generate(asked))))
            return RequestCall(calls[-1], client, asked.request_id)

        whole = await collect(engine, request)
        for at in range(MOST_CALLS):
            calls.clear()
            stream, breaking = None, Breaking(at)
            try:
                with breaking:
                    stream = Reader(stream_over(Workers(start, ResumeConfig()), request))
                    first = await anext(stream)
            except InjectedError:
                if stream is not None:
                    stream.close()
                for call in calls:
                    await call._said.aclose()
                gc.collect()  # closes abandoned iterators
                await until(lambda: not engine._streams and not llm.engine._sequences)
                if stream is not None:  # else there is no stream to leave
                    client.check_idle()
                worker.check_idle()
                continue
            tokens = list(first.token_ids)
            async for event in stream:
                tokens += event.token_ids
                if event.finish_reason is not None:
                    break
            assert tokens == whole
            break
        assert at > 8
        await asyncio.sleep(0)
        client.check_idle()
        await calls[-1]._said.aclose()
        worker.check_idle()
        await closed(engine, llm)


RESIDENT = ResidentEstimate(EngineConfig(), SelectionConfig(), 1000)


class NoWorkers:
    """Workers that are never called, because the request fails before."""

    failover_config = ONE_TRY

    def start(self, request: GenerateRequest) -> Any:
        raise WorkerLostError("no worker is running")

    async def stats(self) -> list[Any]:
        return []


def test_each_call_may_fail_while_the_server_lets_a_request_in(text_model: Path) -> None:
    """Its place in the queue and its tenant's share are released, also if no stream can be opened."""
    admission = Admission(LimitsConfig(max_queued_requests=4))
    tokenizer = load_tokenizer(text_model)
    api = Api(NoWorkers(), PromptEncoder(tokenizer, 4096), Metrics("m"), admission, Tenants.load(None), RESIDENT)
    http = Request({"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""})
    body = b'{"model": "m", "prompt": "abc", "max_tokens": 4, "n": 2}'
    request = RequestReader(tokenizer, 4096, 100).read(ReadJob(Wanted.COMPLETION, "m"), body)
    assert isinstance(request, ReadRequest)
    answer = AnswerFormat("id", 1, "m", chat=False, prompt_tokens=(3,))
    tenant = Tenants.load(None).of(None)
    for at in range(MOST_CALLS):
        breaking = Breaking(at)
        try:
            with breaking:
                streams = api._admit(http, request, answer, tenant)
        except InjectedError:
            assert admission.in_flight == admission.queued_requests == admission.queued_tokens == 0, breaking.broke
            admission.check_integrity()
            continue
        assert admission.in_flight == 1 and admission.queued_requests == 2
        with pytest.raises(WorkerLostError):
            asyncio.run(collect_answer(streams, answer))
        assert admission.in_flight == admission.queued_requests == admission.queued_tokens == 0
        admission.check_integrity()
        break
    assert at > 10
