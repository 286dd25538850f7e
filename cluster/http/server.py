"""HTTP connections of Serve's proxies: which protocol reads them, and how long a client may take for its headers."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.middleware import Middleware
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from forecache.cluster.config import MAX_HEAD_BYTES
from forecache.cluster.errors import ApiError, BodyTooLargeError, from_exception, invalid_request


def use_protocol() -> list[Middleware]:
    """Let uvicorn read connections with :class:`HttpProtocol`; adds no middleware.

    Serve calls it in each of its proxies before they listen (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``), and
    leaves the choice of the protocol to uvicorn, whose table this changes.
    """
    uvicorn_config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HttpProtocol.__name__}"
    return []


class _Connection(h11.Connection):
    """h11's, whose requests name a path: of a whole URI, as for a forward proxy, what stands behind the host.

    ``answers_head``: the request that is to be answered is a HEAD, whose answer has no body.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.answers_head = False

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self.answers_head = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        self.answers_head = event.method == b"HEAD"
        if event.target.startswith(b"/"):
            return event
        # Serve knows no application for "*", and RFC 9110 (7.1) has no path mean the same
        whole_server = event.method == b"OPTIONS" and event.target == b"*"
        target = b"/" if whole_server else _path_and_query(event.target)
        return h11.Request(
            method=event.method, target=target, headers=list(event.headers), http_version=event.http_version
        )


def _path_and_query(uri: bytes) -> bytes:
    """Of a whole URI. Raises ``h11.RemoteProtocolError`` if it is none of HTTP."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:  # such as half an IPv6 address
        raise h11.RemoteProtocolError(f"no URI: {uri!r}") from error
    if parts.scheme not in (b"http", b"https"):
        raise h11.RemoteProtocolError(f"no path: {uri!r}")
    return (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")


class HttpProtocol(H11Protocol):
    """HTTP/1.1, also for a client that offers another protocol, and within a deadline for the headers.

    uvicorn's usual parser, httptools, ends a request at its headers when they offer an upgrade (``Upgrade: h2c``), so
    the body is lost. h11 reads on, as RFC 9110 (7.8) wants of a server that stays with HTTP/1.1.

    The deadline is ``timeout_keep_alive`` of the server. It runs from the connection, and on a kept connection from the
    first byte after an answer, to the end of the headers. It also bounds the rest of a body whose answer is over.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _Connection = _Connection()
        self._headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self._stop_watching()  # the first byte since the last answer
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP/1.1, by an answer where none has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its own answer can't follow this one
            self.cycle.message_event.set()
        if len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
            self._refuse(from_exception(BodyTooLargeError("the headers are too long", "headers")))
        else:
            self._refuse(invalid_request("the request is not valid HTTP/1.1", code="invalid_http"))

    def _watch(self) -> None:
        """Run the timer exactly while no request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop_watching()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.timeout_keep_alive, self._late)

    def _stop_watching(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _late(self) -> None:
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun:
            message = f"the headers did not come within {self.timeout_keep_alive:g} s"
            self._refuse(ApiError(408, message, "invalid_request_error", code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer with ``error`` if nothing of an answer was sent yet, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body()).encode()
            length = str(len(body)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
            phrase = STATUS_PHRASES[error.status]
            events: list[h11.Event] = [h11.Response(status_code=error.status, headers=headers, reason=phrase)]
            if not self.conn.answers_head:
                events.append(h11.Data(data=body))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
