"""A cheap HTTP/1.1 client over asyncio sockets, for event streams from a server on the same machine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Response:
    """``lines``: the lines of a stream, when they came (seconds of ``time.monotonic``), as they come."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection:
    """One connection that is used again and again; requests on it follow each other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def post(self, path: str, body: bytes) -> Response:
        """Send, and read the head; and all of the body unless it is a stream of events."""
        if self._writer is None or self._writer.is_closing():
            await self.open()
        assert self._reader is not None and self._writer is not None
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        first, *rest = (await self._reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
        response = Response(int(first.split()[1]), headers)
        if "content-length" in headers:
            response.body = await self._reader.readexactly(int(headers["content-length"]))
        elif not headers.get("content-type", "").startswith("text/event-stream"):
            response.body = b"".join([part async for part in self._chunks()])
        if headers.get("connection") == "close":
            self.close()
        return response

    async def events(self) -> AsyncIterator[tuple[float, Any]]:
        """(when it came, what it says) for each event of the stream that :meth:`post` has begun."""
        rest = b""
        async for part in self._chunks():
            now_s = time.monotonic()
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    yield now_s, json.loads(event.removeprefix(b"data: "))

    async def _chunks(self) -> AsyncIterator[bytes]:
        assert self._reader is not None
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()
