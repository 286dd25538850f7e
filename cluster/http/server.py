"""The HTTP/1.1 protocol of Ray Serve's proxies: h11 instead of httptools, with a deadline for the headers."""

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
    """Make :class:`HttpProtocol` uvicorn's default protocol. Returns no middleware.

    Serve calls this in each of its proxies before they listen (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``). It has
    no setting for the protocol, so this changes uvicorn's table of protocols.
    """
    uvicorn_config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HttpProtocol.__name__}"
    return []


class _Connection(h11.Connection):
    """An h11 connection that reduces absolute request URIs, as sent to forward proxies, to path and query.

    ``answers_head``: the current request is a HEAD, whose response has no body.
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
        # Serve has no application for "*", and by RFC 9110 (7.1) an empty path means the same
        whole_server = event.method == b"OPTIONS" and event.target == b"*"
        target = b"/" if whole_server else _path_and_query(event.target)
        return h11.Request(
            method=event.method, target=target, headers=list(event.headers), http_version=event.http_version
        )


def _path_and_query(uri: bytes) -> bytes:
    """Path and query of an absolute URI. Raises ``h11.RemoteProtocolError`` if it is not an HTTP URI."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:  # such as half an IPv6 address
        raise h11.RemoteProtocolError(f"no URI: {uri!r}") from error
    if parts.scheme not in (b"http", b"https"):
        raise h11.RemoteProtocolError(f"no path: {uri!r}")
    return (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")


class HttpProtocol(H11Protocol):
    """HTTP/1.1 that ignores offers to upgrade, and closes connections whose headers don't arrive in time.

    uvicorn's default parser, httptools, ends a request at its headers if they offer an upgrade (``Upgrade: h2c``), so
    the body is lost. h11 reads on, as RFC 9110 (7.8) requires of a server that stays with HTTP/1.1.

    The deadline is uvicorn's ``timeout_keep_alive``. It starts with the connection, or on a kept-alive connection with
    the first byte after a response, and ends with the headers. It also limits the rest of a body after its response.
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
        """Refuse input that is not valid HTTP/1.1. Sends a response unless one has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the response of the running request can't follow this one
            self.cycle.message_event.set()
        if len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
            self._refuse(from_exception(BodyTooLargeError("the headers are too long", "headers")))
        else:
            self._refuse(invalid_request("the request is not valid HTTP/1.1", code="invalid_http"))

    def _watch(self) -> None:
        """Start the timer if no request is being answered, and stop it otherwise."""
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
        """Close the connection, after a response with ``error`` if no response has begun."""
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
