"""Where and in which order request bodies are parsed, their limits, and that threads and processes agree."""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forecache.cluster.config import LimitsConfig
from forecache.cluster.dispatch.admission import Admission, ResidentEstimate
from forecache.cluster.errors import PromptProcessError, RefusedError, TooManyRequestsError, from_exception
from forecache.cluster.http import prompt_process as process_module
from forecache.cluster.http import prompts as prompts_module
from forecache.cluster.http import request_reader as reader_module
from forecache.cluster.http.api import Api
from forecache.cluster.http.body import SHORT_BODY_BYTES
from forecache.cluster.http.openai_types import ChatCompletionRequest, TokenizeRequest
from forecache.cluster.http.prompts import LONG_BODY_BYTES, SMALL_BODY_BYTES, PromptEncoder
from forecache.cluster.http.request_reader import (
    Outcome,
    ReadJob,
    ReadRequest,
    Refusal,
    RequestReader,
    Wanted,
    parse_json,
)
from forecache.cluster.http.sessions import SessionRoutes
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.tenants import Tenants
from forecache.indexer.serving.config import SelectionConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.errors import ForecacheError, InvalidRequestError

pytestmark = pytest.mark.anyio
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MAX_MODEL_LEN = 200_000
MAX_VALUES = 100_000


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)
    return made


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(TOKENIZER, MAX_MODEL_LEN, processes=1, max_values=MAX_VALUES)
    yield encoder
    encoder.close()


@pytest.fixture
def reader() -> RequestReader:
    return RequestReader(TOKENIZER, MAX_MODEL_LEN, MAX_VALUES)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def messages(count: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"message {number}"} for number in range(count)]


LARGE: dict[str, tuple[Wanted, bytes]] = {
    "chat": (Wanted.CHAT, body(messages=messages(2000), max_tokens=7, seed=1, logprobs=True)),
    "ids": (Wanted.COMPLETION, body(prompt=[n % 250 for n in range(50_000)], n=2, seed=1)),
    "prompts": (Wanted.COMPLETION, body(prompt=["word " * 20] * 1000, echo=True, seed=1, stream=True)),
    "tokenize": (Wanted.TOKENS, body(prompt="ü " * 9000)),
    "detokenize": (Wanted.TEXT, body(tokens=[n % 250 for n in range(20_000)])),
    "too long": (Wanted.COMPLETION, body(prompt="x" * (MAX_MODEL_LEN + 1))),
    "far too long": (Wanted.COMPLETION, body(prompt="x" * (17 * MAX_MODEL_LEN))),
    "unknown field": (Wanted.CHAT, body(messages=messages(2000), nonsense=1)),
    "no such model": (Wanted.CHAT, body(messages=messages(2000)) + b" "),
    "values": (Wanted.COMPLETION, body(prompt=[7] * (MAX_VALUES + 1))),
    "broken": (Wanted.COMPLETION, b"[" * 50_000),
    "not UTF-8": (Wanted.COMPLETION, b"\xff" * 20_000),
    "not in the vocabulary": (Wanted.TEXT, body(tokens=[300] * 20_000)),
}


@pytest.mark.parametrize("name", LARGE)
async def test_a_large_body_is_read_elsewhere_and_as_here(
    name: str, encoder: PromptEncoder, reader: RequestReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, text = LARGE[name]
    served = "another" if name == "no such model" else "m"
    assert len(text) > SMALL_BODY_BYTES
    here: Outcome = reader.outcome(ReadJob(wanted, served), text)

    def never(*_: object) -> None:
        raise AssertionError("a large body was read in this process")

    monkeypatch.setattr(RequestReader, "read", never)
    if isinstance(here, Refusal):
        with pytest.raises(RefusedError) as refused:
            await encoder.read(wanted, text, served=served)
        assert from_exception(refused.value) == here.error
        assert 400 <= here.error.status < 500 and here.error.message
    else:
        assert await encoder.read(wanted, text, served=served) == here


async def test_a_small_body_is_read_here_but_not_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    read = RequestReader.read

    def watched(self: RequestReader, *asked: Any) -> ReadRequest | bytes:
        threads.append(threading.get_ident())
        return read(self, *asked)

    monkeypatch.setattr(RequestReader, "read", watched)
    encoder = PromptEncoder(TOKENIZER, 100)
    try:
        assert json.loads(await encoder.read(Wanted.TOKENS, body(prompt="abc")))["count"] == 3
        assert threads and threading.get_ident() not in threads
        assert all(process.pid is None for process in encoder._processes), "no process is started for small bodies"
    finally:
        encoder.close()


def test_values_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json(b'["' + b"," * 100 + b'\\"[[{{", 1]', 5) == ["," * 100 + '"[[{{', 1]
    monkeypatch.setattr(reader_module.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    for text in (b"[" + b"7," * 10 + b"7]", b"[[[[[[[", b'[{"a":{}},{},{},{}]', b'["a","b","c","d","e","f"]'):
        with pytest.raises(InvalidRequestError, match="JSON values") as refused:
            parse_json(text, 5)
        assert from_exception(refused.value).status == 413


def _kill(pid: int) -> None:
    """Kill a child process and wait until it is a zombie."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_a_process_that_died_idle_costs_no_request_and_is_reaped(encoder: PromptEncoder) -> None:
    wanted, text = LARGE["tokenize"]
    first = await encoder.read(wanted, text)
    [process] = encoder._processes
    before = process.pid
    assert before is not None
    _kill(before)
    assert await encoder.read(wanted, text) == first
    assert process.pid != before
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PID, before, os.WEXITED | os.WNOHANG)


async def test_a_process_that_dies_before_it_has_a_body_is_replaced_once(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, text = LARGE["tokenize"]
    first = await encoder.read(wanted, text)
    [process] = encoder._processes
    send, killed = process_module.send_frame, list[int]()

    def killing(connection: socket.socket, head: bytes, body: bytes | bytearray) -> None:
        if body and len(killed) < times:
            assert process.pid is not None
            killed.append(process.pid)
            _kill(process.pid)
        send(connection, head, body)

    monkeypatch.setattr(process_module, "send_frame", killing)
    times = 1
    assert await encoder.read(wanted, text) == first
    assert len(killed) == 1 and process.pid not in killed
    killed.clear()
    times = 2
    with pytest.raises(PromptProcessError):
        await encoder.read(wanted, text)
    assert len(set(killed)) == 2
    assert await encoder.read(wanted, text) == first


async def test_a_process_that_dies_over_a_body_is_an_error_and_is_replaced(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not retried, because the body may be the cause."""
    wanted, text = LARGE["tokenize"]
    first = await encoder.read(wanted, text)
    [process] = encoder._processes
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # it does not answer
    with monkeypatch.context() as patch:
        receive = process_module.receive_frame

        def killing(connection: socket.socket) -> tuple[bytes, bytes]:
            assert process.pid is not None
            _kill(process.pid)
            return receive(connection)

        patch.setattr(process_module, "receive_frame", killing)
        with pytest.raises(PromptProcessError) as lost:
            await encoder.read(wanted, text)
    assert from_exception(lost.value).status == 503
    assert await encoder.read(wanted, text) == first


def test_a_process_ends_with_its_parent_whatever_it_does() -> None:
    program = """
import os, signal, time, types
from forecache.cluster.http.prompt_process import PromptProcess
from forecache.cluster.http.request_reader import ReadJob, Wanted
process = PromptProcess(types.SimpleNamespace(outcome="{0.wanted}".format))
assert process.outcome(ReadJob(Wanted.TEXT, None), b"") == str(Wanted.TEXT)
os.kill(process.pid, signal.SIGSTOP)  # it does not see that its socket is closed
print(process.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        ended = os.pidfd_open(pid)
        try:
            parent.kill()
            assert select.select([ended], [], [], 60.0)[0], "it outlives its parent"
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(ended, signal.SIGKILL)
            os.close(ended)


async def test_what_fails_for_no_fault_of_the_client_does_not_end_the_process(encoder: PromptEncoder) -> None:
    wanted, text = LARGE["tokenize"]
    first = await encoder.read(wanted, text)
    with pytest.raises(ForecacheError, match="could not be read: ") as failed:
        encoder._processes[0].outcome("no job", b"{}")  # type: ignore[arg-type]
    assert from_exception(failed.value).status == 500
    assert await encoder.read(wanted, text) == first


class Lanes:
    """An encoder's lanes whose parsing waits for ``finish``; ``begun`` lists the bodies in order."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.begun: list[bytes] = []
        self._gates: dict[int, threading.Semaphore] = {}
        self._news = threading.Condition()
        for number, lane in enumerate((encoder._thread_lane, *encoder._process_lanes)):
            self._gates[number] = threading.Semaphore(0)
            lane.reader = SimpleNamespace(outcome=self._reading(number))  # type: ignore[assignment]

    def _reading(self, number: int) -> Any:
        def read(_: ReadJob, text: bytes) -> Outcome:
            with self._news:
                self.begun.append(text[:10].strip(b"."))
                self._news.notify_all()
            assert self._gates[number].acquire(timeout=30)
            return text

        return read

    def finish(self, lane: int, jobs: int = 1) -> None:
        for _ in range(jobs):
            self._gates[lane].release()

    async def until(self, count: int) -> list[bytes]:
        """Wait until ``count`` bodies were begun; returns them."""

        def wait() -> bool:
            with self._news:
                return self._news.wait_for(lambda: len(self.begun) >= count, timeout=30)

        assert await asyncio.to_thread(wait)
        return list(self.begun)


@pytest.fixture
async def many_lanes() -> AsyncIterator[tuple[PromptEncoder, Lanes]]:
    encoder = PromptEncoder(TOKENIZER, 100, processes=2)
    lanes = Lanes(encoder)
    yield encoder, lanes
    for lane in range(3):
        lanes.finish(lane, 1000)
    encoder.close()


def sized(name: str, length: int) -> bytes:
    return name.encode().ljust(length, b".")


async def test_a_hundred_tokenize_calls_delay_another_tenants_by_the_ones_under_way(
    many_lanes: tuple[PromptEncoder, Lanes],
) -> None:
    encoder, lanes = many_lanes
    large = SMALL_BODY_BYTES + 1
    calls = [
        asyncio.ensure_future(encoder.read(Wanted.TOKENS, sized(f"many {n}", large), tenant="many")) for n in range(100)
    ]
    await lanes.until(2)
    mine = asyncio.ensure_future(encoder.read(Wanted.CHAT, sized("mine", large), tenant="me"))
    short = asyncio.ensure_future(encoder.read(Wanted.CHAT, b"short", tenant="many"))
    assert (await lanes.until(3))[2] == b"short", "the lane of small bodies is free"
    lanes.finish(1)
    assert (await lanes.until(4))[3] == b"mine"
    lanes.finish(1)
    await mine
    lanes.finish(0)
    await short
    assert sum(call.done() for call in calls) == 1
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert len(encoder._large) == len(encoder._small) == 0, "who has left is in no line"


async def test_one_process_is_kept_for_shorter_bodies(many_lanes: tuple[PromptEncoder, Lanes]) -> None:
    encoder, lanes = many_lanes
    longs = [
        asyncio.ensure_future(encoder.read(Wanted.TOKENS, sized(f"long {n}", LONG_BODY_BYTES + 1))) for n in range(3)
    ]
    assert await lanes.until(1) == [b"long 0"]
    shorter = asyncio.ensure_future(encoder.read(Wanted.TOKENS, sized("shorter", LONG_BODY_BYTES)))
    assert await lanes.until(2) == [b"long 0", b"shorter"]
    lanes.finish(2)
    await shorter
    assert lanes.begun == [b"long 0", b"shorter"], "the free process is not for the next long one"
    lanes.finish(1, 3)
    await asyncio.gather(*longs)


async def test_requests_that_were_read_elsewhere_are_encoded_too() -> None:
    encoder = PromptEncoder(TOKENIZER, 100)
    try:
        chat = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
        [prompt] = await encoder.encode(chat)
        tokens = await encoder.tokenize(TokenizeRequest(model="m", prompt="<user>hi"))
        assert prompt.token_ids.tolist() == tokens
    finally:
        encoder.close()


class NoWorkers:
    def start(self, request: Any) -> Any:
        raise AssertionError("nothing is to be computed")

    async def stats(self) -> list[Any]:
        return []


class OpenSessions:
    def pin(self, session_id: str, ttl_s: float) -> dict[str, Any]:
        return {"ttl_s": ttl_s}


@pytest.fixture
async def api(encoder: PromptEncoder) -> AsyncIterator[tuple[Api, httpx.AsyncClient]]:
    limits = LimitsConfig(max_body_bytes=1 << 20, max_bodies_bytes=1 << 20)
    api = Api(
        NoWorkers(),
        encoder,
        Metrics("m"),
        Admission(limits),
        Tenants(None),
        ResidentEstimate(EngineConfig(), SelectionConfig(), 0),
    )
    app = api.app()
    SessionRoutes(OpenSessions(), api).add_to(app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x", timeout=60) as client:
        yield api, client


async def test_a_body_of_token_ids_is_refused_and_never_parsed_on_the_loop(
    api: tuple[Api, httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_thread, loads = threading.get_ident(), json.loads

    def watched(text: Any, *args: Any, **settings: Any) -> Any:
        assert threading.get_ident() != loop_thread or len(text) <= SHORT_BODY_BYTES
        return loads(text, *args, **settings)

    monkeypatch.setattr(reader_module.json, "loads", watched)
    refused = await api[1].post("/v1/completions", content=b'{"model":"m","prompt":[' + b"7," * 300_000 + b"7]}")
    assert refused.status_code == 413
    error = loads(refused.content)["error"]
    assert error["code"] == "request_too_large" and "JSON values" in error["message"]
    assert api[0]._bodies.held_bytes == 0


async def test_answers_of_tokenize_and_detokenize(api: tuple[Api, httpx.AsyncClient]) -> None:
    _, client = api
    counted = (await client.post("/v1/tokenize", json={"model": "m", "prompt": "ab" * 10_000})).json()
    assert counted["count"] == len(counted["tokens"]) == 20_000 and counted["max_model_len"] == MAX_MODEL_LEN
    told = await client.post("/v1/detokenize", json={"model": "m", "tokens": counted["tokens"]})
    assert told.json() == {"prompt": "ab" * 10_000}
    unknown = await client.post("/v1/tokenize", json={"model": "x", "prompt": "ab"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


async def test_a_long_model_name_is_refused_and_not_repeated(api: tuple[Api, httpx.AsyncClient]) -> None:
    _, client = api
    for length, status in ((256, 404), (257, 400)):
        name = "n" * length
        for path, fields in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": messages(1)}),
            ("/v1/tokenize", {"prompt": "a"}),
            ("/v1/detokenize", {"tokens": [1]}),
        ):
            answer = await client.post(path, json={"model": name, **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, "model")
            assert "n" * 101 not in error["message"]
    asked = await client.get("/v1/models/" + "a." * 4000)
    assert asked.status_code == 404 and asked.json()["error"]["code"] == "model_not_found"
    assert len(asked.json()["error"]["message"]) < 200


async def test_the_target_of_a_request_counts_as_its_headers_do(api: tuple[Api, httpx.AsyncClient]) -> None:
    _, client = api
    most = LimitsConfig().max_header_bytes
    for target in ("/v1/models/" + "a" * most, "/v1/models/m?" + "a" * most):
        refused = await client.get(target)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (431, "request_too_large", None)
        assert error["message"] == f"path and headers are longer than {most} bytes"
    assert (await client.get("/v1/models/m?" + "a" * (most // 2))).status_code == 200


def test_strings_without_an_end_are_read_once() -> None:
    """A pattern that restarts at each quote would take hours for this text."""
    text = b"[" + b"," * 20 + b'"' + b'\\"' * (1 << 20)
    for end in (b"", b"\\"):
        with pytest.raises(InvalidRequestError, match="JSON values"):
            parse_json(text + end, 10)
    with pytest.raises(InvalidRequestError, match="is not valid JSON"):
        parse_json(b'["' + b"," * 20 + b"\\", 10)


async def test_bodies_take_so_much_memory_at_once(api: tuple[Api, httpx.AsyncClient]) -> None:
    served, client = api
    read, going = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 700_000
        read.set()
        await going.wait()
        yield b"{}"

    first = asyncio.ensure_future(client.post("/v1/completions", content=slow()))
    await read.wait()
    while served._bodies.held_bytes < 700_000:
        await asyncio.sleep(0)
    second = await client.post("/v1/completions", content=b" " * 700_000)
    assert second.status_code == 429 and int(second.headers["retry-after"]) > 0
    going.set()
    assert (await first).status_code == 400
    assert served._bodies.held_bytes == 0


async def test_a_sessions_body_is_a_few_fields(api: tuple[Api, httpx.AsyncClient]) -> None:
    _, client = api
    assert (await client.post("/v1/sessions/s")).json()["ttl_s"] == 3600
    assert (await client.post("/v1/sessions/s", json={"ttl_s": 5})).json()["ttl_s"] == 5
    assert (await client.post("/v1/sessions/s", content=b" " * (SHORT_BODY_BYTES + 1))).status_code == 413
    assert (await client.post("/v1/sessions/s", content=b"{")).status_code == 400


def test_a_tenant_that_takes_all_places_to_be_read_leaves_half_as_many_to_others() -> None:
    admission = Admission(LimitsConfig(max_queued_requests=4))
    with ExitStack() as places:
        for _ in range(4):
            places.enter_context(admission.entering("a"))  # alone, it is let in as often as there are places
        with pytest.raises(TooManyRequestsError), admission.entering("a"):
            pytest.fail("a fifth")
        for _ in range(2):
            places.enter_context(admission.entering("b"))
        with pytest.raises(TooManyRequestsError), admission.entering("b"):
            pytest.fail("a third, of another")
    with ExitStack() as places:
        for _ in range(4):
            places.enter_context(admission.entering())
        with pytest.raises(TooManyRequestsError), admission.entering():
            pytest.fail("without keys there is but one tenant")


def test_long_bodies_are_longer_than_small_ones() -> None:
    assert SMALL_BODY_BYTES < LONG_BODY_BYTES < LimitsConfig().max_body_bytes
    assert LimitsConfig().prompt_processes == prompts_module.DEFAULT_PROMPT_PROCESSES
