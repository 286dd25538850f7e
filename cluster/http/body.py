"""Receives request bodies, within limits of size, memory and time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from forecache.cluster.config import LimitsConfig
from forecache.cluster.errors import BodyDeadlineError, BodyTooLargeError, TooManyRequestsError
from forecache.cluster.http.request_reader import parse_json

SHORT_BODY_BYTES = 4 << 10
"""Longest body that is parsed on the event loop."""
RETRY_S = 5.0
"""``Retry-After`` of a request that is refused for lack of memory for its body."""


class Bodies:
    """Counts the bytes of all request bodies that one ingress holds in memory. Use it on the event loop only."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._held = Counter[str]()

    @property
    def held_bytes(self) -> int:
        return self._held.total()

    @asynccontextmanager
    async def received(self, http: Request, tenant: str) -> AsyncIterator[bytearray]:
        """Receive the body of a request. Its bytes count against the limits until the block ends.

        Raises:
            BodyTooLargeError: the body is longer than ``max_body_bytes``.
            BodyDeadlineError: the body did not arrive within ``body_deadline_s``.
            TooManyRequestsError: all bodies together, or this tenant's, would exceed their limit.
        """
        counted_bytes = 0
        body = bytearray()
        try:
            async with _in_time(self._limits):
                async for part in http.stream():
                    self._count(tenant, len(part))
                    counted_bytes += len(part)
                    body += part
                    if len(body) > self._limits.max_body_bytes:
                        raise _too_long(self._limits.max_body_bytes)
            yield body
        finally:
            self._held[tenant] -= counted_bytes
            if not self._held[tenant]:
                del self._held[tenant]

    def _count(self, tenant: str, length: int) -> None:
        most = max(self._limits.max_bodies_bytes, self._limits.max_body_bytes)
        if self._held.total() + length > most:
            raise TooManyRequestsError(f"{most} bytes of requests are being read already; try again later", RETRY_S)
        if tenant and self._held[tenant] + length > max(most // 2, self._limits.max_body_bytes):
            raise TooManyRequestsError("too many bytes of your key's requests are being read already", RETRY_S)
        self._held[tenant] += length


def check_headers(http: Request, limits: LimitsConfig) -> None:
    """Raise :class:`BodyTooLargeError` if path, query and headers, or the ``Content-Length``, exceed their limits."""
    scope = http.scope
    target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
    length = target + sum(len(name) + len(value) + 4 for name, value in http.headers.raw)
    if length > limits.max_header_bytes:
        raise BodyTooLargeError(f"path and headers are longer than {limits.max_header_bytes} bytes", "headers")
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise _too_long(limits.max_body_bytes)


async def read_short_json(http: Request, limits: LimitsConfig, *, empty: Any) -> Any:
    """Receive and parse a JSON body of a few fields. Returns ``empty`` if there is no body.

    Raises:
        BodyTooLargeError: the body is longer than ``SHORT_BODY_BYTES``.
        BodyDeadlineError: the body did not arrive within ``body_deadline_s``.
        InvalidRequestError: the body is not UTF-8, or not JSON.
    """
    body = bytearray()
    async with _in_time(limits):
        async for part in http.stream():
            body += part
            if len(body) > SHORT_BODY_BYTES:
                raise _too_long(SHORT_BODY_BYTES)
    return parse_json(bytes(body), SHORT_BODY_BYTES) if body else empty


@asynccontextmanager
async def _in_time(limits: LimitsConfig) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limits.body_deadline_s):
            yield
    except TimeoutError as error:
        raise BodyDeadlineError(f"the body did not come within {limits.body_deadline_s:g} s") from error


def _too_long(most_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is longer than {most_bytes} bytes")
