"""The HTTP protocol of Serve's proxies: offers of other protocols, slow headers, and invalid HTTP."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn import config as uvicorn_config
from uvicorn.server import ServerState

from forecache.cluster.config import MAX_HEAD_BYTES
from forecache.cluster.http import server as http_server
from forecache.cluster.http.server import HttpProtocol

DEADLINE_S = 75
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: "
JAVA = OFFER + b"AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
CURL = OFFER + b"AAMAAABkAAQCAAAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n"


class Timer:
    """A timer that the test fires, unless it was cancelled."""

    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self._call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        assert not self.cancelled
        self.cancelled = True
        self._call()


class Loop:
    """A fake event loop whose timers the test fires."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(delay_s, call))
        return self.timers[-1]

    def create_task(self, coroutine: Any) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(coroutine)

    @property
    def running(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.cancelled]


class Wire(asyncio.Transport):
    """A fake transport of the server; ``sent`` holds the bytes that the client received."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.sent.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    """A client's connection to an application that returns path, query and length of the body."""

    def __init__(self) -> None:
        self.loop, self.wire = Loop(), Wire()
        self.answer_now = asyncio.Event()
        self.answer_now.set()
        config = uvicorn.Config(
            *(self._app, "x", 0),
            http=HttpProtocol,
            interface="asgi3",
            timeout_keep_alive=DEADLINE_S,
            lifespan="off",
            proxy_headers=False,
            log_config=None,
        )
        config.load()
        loop: Any = self.loop
        self.protocol = HttpProtocol(config, ServerState(), {}, _loop=loop)
        self.protocol.connection_made(self.wire)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        await self.answer_now.wait()
        told = f"{scope['method']} {scope['path']}?{scope['query_string'].decode()} {len(body)}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
        await send({"type": "http.response.body", "body": told})

    async def sends(self, data: bytes) -> None:
        self.protocol.data_received(data)
        await self.waits()

    async def waits(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def request(body: bytes, *headers: bytes, target: bytes = b"/v1/chat/completions") -> bytes:
    head = b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    return head + b"".join(headers) + b"\r\n" + body


@pytest.mark.parametrize("offer", [JAVA, CURL, WEBSOCKET, b""], ids=["java", "curl", "websocket", "none"])
@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_who_offers_another_protocol_is_answered_in_http_1_1(offer: bytes, pieces: int) -> None:
    """The body arrives whole, in pieces of any size, and the connection stays open."""

    async def talk() -> None:
        client = Client()
        for number in range(1, 3):
            data = request(b"x" * 300, offer)
            step = -(-len(data) // pieces)
            for start in range(0, len(data), step):
                await client.sends(data[start : start + step])
            assert client.wire.sent.count(b"HTTP/1.1 200 OK") == number
            assert client.wire.sent.endswith(b"POST /v1/chat/completions? 300")
        assert not client.wire.closed

    asyncio.run(talk())


def test_pipelined_offers_are_answered_in_turn() -> None:
    async def talk() -> None:
        client = Client()
        await client.sends(b"".join(request(b"x" * size, JAVA) for size in (1, 22, 333)))
        assert [client.wire.sent.count(b"completions? %d" % size) for size in (1, 22, 333)] == [1, 1, 1]

    asyncio.run(talk())


def test_headers_that_do_not_come_are_not_waited_for() -> None:
    async def talk() -> None:
        silent = Client()
        [timer] = silent.loop.running
        assert timer.delay_s == DEADLINE_S
        timer.fire()
        assert silent.wire.closed and not silent.wire.sent

        slow = Client()
        for letter in b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ":
            await slow.sends(bytes([letter]))
        assert slow.loop.running == slow.loop.timers[:1], "no byte buys time"
        slow.loop.timers[0].fire()
        assert slow.wire.sent.startswith(b"HTTP/1.1 408 ") and slow.wire.closed
        assert slow.wire.error["code"] == "request_timeout" and "75 s" in slow.wire.error["message"]

    asyncio.run(talk())


def test_no_deadline_runs_while_a_request_is_read_or_answered() -> None:
    """The body has a separate deadline."""

    async def talk() -> None:
        client = Client()
        client.answer_now.clear()
        data = request(b"x" * 10)
        await client.sends(data[:-4])
        assert not client.loop.running
        await client.sends(data[-4:])
        assert not client.loop.running
        client.answer_now.set()
        await client.waits()
        assert client.wire.sent.endswith(b" 10")

    asyncio.run(talk())


def test_a_kept_connection_has_the_deadline_from_its_next_byte() -> None:
    async def talk() -> None:
        client = Client()
        await client.sends(request(b""))
        [idle] = client.loop.running
        await client.sends(b"GET ")
        assert idle.cancelled
        [timer] = client.loop.running
        await client.sends(b"/health HTTP/1.1\r\n")
        assert client.loop.running == [timer]
        timer.fire()
        assert b"HTTP/1.1 408 " in client.wire.sent and client.wire.closed

    asyncio.run(talk())


def test_the_rest_of_a_body_whose_answer_is_over_has_the_deadline_too() -> None:
    async def talk() -> None:
        client = Client()

        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        client.protocol.app = refuse
        await client.sends(request(b"x" * 10_000)[:200])
        assert client.wire.sent.startswith(b"HTTP/1.1 413 ")
        await client.sends(b"x")
        [timer] = client.loop.running
        await client.sends(b"x")
        assert client.loop.running == [timer]
        timer.fire()
        assert client.wire.closed and client.wire.sent.count(b"HTTP/1.1") == 1

    asyncio.run(talk())


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET foo HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (MAX_HEAD_BYTES + 1),
    ],
    ids=[
        *("tls", "http2", "connect", "no host", "not ascii", "length", "chunk"),
        *("half an address", "star", "no path", "long"),
    ],
)
def test_what_is_no_request_gets_one_error_object_and_no_line_in_the_log(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk() -> Client:
        client = Client()
        await client.sends(data)
        return client

    with caplog.at_level(logging.ERROR):
        client = asyncio.run(talk())
    assert client.wire.closed and client.wire.sent.count(b"HTTP/1.1 4") == 1
    assert client.wire.error["type"] == "invalid_request_error"
    assert client.wire.sent.startswith(b"HTTP/1.1 431" if len(data) > MAX_HEAD_BYTES else b"HTTP/1.1 400")
    assert not client.loop.running and not caplog.records


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HEAD foo HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"HEAD http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=["no path", "half an address", "chunk"],
)
def test_a_refused_head_request_gets_headers_alone(data: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    async def talk() -> Client:
        client = Client()
        await client.sends(data)
        return client

    with caplog.at_level(logging.ERROR):
        client = asyncio.run(talk())
    head, end, body = client.wire.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and end and not body
    assert client.wire.closed and not caplog.records


def test_a_refusal_after_a_head_request_has_its_body() -> None:
    async def talk() -> Client:
        client = Client()

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        client.protocol.app = answer
        await client.sends(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        first, client.wire.sent = client.wire.sent, b""
        assert first.startswith(b"HTTP/1.1 200 ")
        await client.sends(b"nonsense\r\n\r\n")
        return client

    client = asyncio.run(talk())
    assert client.wire.error["code"] == "invalid_http" and client.wire.closed


def test_options_of_the_whole_server_reach_the_application() -> None:
    async def talk() -> bytes:
        client = Client()
        await client.sends(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        return client.wire.sent

    assert asyncio.run(talk()).endswith(b"OPTIONS /? 0")


def test_a_body_that_breaks_while_it_is_answered_ends_the_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def talk() -> Client:
        client = Client()

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body", "body": b"too late"})

        client.protocol.app = answer
        await client.sends(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await client.sends(b"zz\r\n")
        return client

    with caplog.at_level(logging.ERROR):
        client = asyncio.run(talk())
    assert client.wire.closed and client.wire.sent.count(b"HTTP/1.1") == 1 and b"too late" not in client.wire.sent
    assert not caplog.records


@pytest.mark.parametrize(
    ("target", "seen"),
    [(b"http://x:8000/a/b?c=d", b"/a/b?c=d"), (b"http://x", b"/?"), (b"/a?http://x", b"/a?http://x")],
)
def test_a_whole_uri_names_a_path(target: bytes, seen: bytes) -> None:
    """Clients send absolute URIs when they take the server for a proxy."""

    async def talk() -> bytes:
        client = Client()
        await client.sends(request(b"", target=target))
        return client.wire.sent

    assert asyncio.run(talk()).endswith(b"POST " + seen + b" 0")


def test_serves_proxies_take_this_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_config, "HTTP_PROTOCOLS", dict(uvicorn_config.HTTP_PROTOCOLS))
    assert http_server.use_protocol() == []
    config = uvicorn.Config(lambda: None, factory=True)  # as Serve makes it, which names no protocol
    config.load()
    assert config.http_protocol_class is HttpProtocol
