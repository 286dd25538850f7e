"""One request's events → an answer at once, or a server-sent event stream."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from forecache.cluster.errors import ApiError, WorkerLostError, from_exception
from forecache.cluster.openai_types import usage
from forecache.workers.decode.messages import SequenceStats, TokenEvent
from forecache.workers.errors import ForecacheError

logger = logging.getLogger(__name__)


class TokenStream(Protocol):
    """Events of one request, from a worker. ``cancel`` may be called at any time and never waits."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    def cancel(self) -> None: ...


class EventStream:
    """A :class:`TokenStream` whose silence is seen, whose start can be awaited, and which ends with a last event.

    ``close`` is synchronous, since the task that runs it may be one that is being cancelled and can't await.
    """

    def __init__(
        self, source: TokenStream, *, silence_s: float, observe: Callable[[TokenEvent], None] | None = None
    ) -> None:
        self._source = source
        self._silence_s = silence_s
        self._observe = observe
        self._next: asyncio.Task[TokenEvent] | None = None
        self._finished = False

    async def start(self, wait_s: float) -> None:
        """Wait for the first event, ``wait_s`` at most: a request that is refused then fails before any answer."""
        self._next = asyncio.ensure_future(self._pull())
        await asyncio.wait({self._next}, timeout=wait_s)
        if self._next.done():
            self._next.result()

    async def events(self) -> AsyncIterator[TokenEvent | None]:
        """Events to the last; ``None`` after each ``silence_s`` without one. Raises what went wrong, typed."""
        while not self._finished:
            if self._next is None:
                self._next = asyncio.ensure_future(self._pull())
            await asyncio.wait({self._next}, timeout=self._silence_s)
            if not self._next.done():
                yield None
                continue
            pulled, self._next = self._next, None
            event = pulled.result()
            self._finished = event.finish_reason is not None
            if self._observe is not None:
                self._observe(event)
            if event.finish_reason == "error":
                raise ForecacheError(event.error or "the worker failed without saying why")
            if event.finish_reason == "cancelled":
                raise WorkerLostError("the worker gave the request up: it is being stopped")
            yield event

    def close(self) -> None:
        """Stop the request on its worker unless it is over."""
        if self._next is not None:
            self._next.cancel()
        if not self._finished:
            self._finished = True
            self._source.cancel()

    async def _pull(self) -> TokenEvent:
        try:
            return await anext(self._source)
        except StopAsyncIteration:
            raise WorkerLostError("the worker ended the answer early; send the request again") from None


@dataclass(frozen=True)
class AnswerFormat:
    """The objects of `/v1/chat/completions` (``chat``) or `/v1/completions`."""

    id: str
    created: int
    model: str
    chat: bool
    prompt_tokens: int
    include_usage: bool = False

    def whole(self, text: str, finish_reason: str, stats: SequenceStats) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(stats)}

    def chunk(self, text: str | None, finish_reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        said: dict[str, Any]
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            said = {"delta": delta if text is None else {**delta, "content": text}}
        else:
            said = {"text": text or ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._chunk_head(), "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def usage_chunk(self, stats: SequenceStats) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": usage(stats)}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def collect(stream: EventStream, answer: AnswerFormat) -> dict[str, Any]:
    """The whole answer. Stops the request on its worker when the caller is cancelled."""
    pieces: list[str] = []
    try:
        async for event in stream.events():
            if event is None:
                continue
            pieces.append(event.text)
            if event.finish_reason is not None:
                return answer.whole("".join(pieces), event.finish_reason, event.stats or SequenceStats())
    finally:
        stream.close()
    raise WorkerLostError("the worker ended the answer early; send the request again")


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def server_sent_events(
    stream: EventStream, answer: AnswerFormat, failed: Callable[[ApiError], None]
) -> AsyncIterator[str]:
    """The answer piece by piece. Comment lines tell of prefill (``: prefill 1024/6500``) and of waiting.

    An error after the start can't change the status any more: it is sent as an event with an ``error`` object.
    """
    try:
        if answer.chat:
            yield _data(answer.chunk("", first=True))
        async for event in stream.events():
            if event is None:
                yield ": waiting\n\n"
                continue
            if event.text:
                yield _data(answer.chunk(event.text))
            elif not event.token_ids and event.finish_reason is None:
                yield f": prefill {event.prefill_tokens_done}/{answer.prompt_tokens}\n\n"
            if event.finish_reason is not None:
                yield _data(answer.chunk(None, event.finish_reason))
                if answer.include_usage:
                    yield _data(answer.usage_chunk(event.stats or SequenceStats()))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if not isinstance(error, ForecacheError):
            logger.exception("request %s failed", answer.id)
        said = from_exception(error)
        failed(said)
        yield _data(said.body())
    finally:
        stream.close()


class EventStreamResponse(StreamingResponse):
    """Server-sent events that stop their request whenever the response ends, even before its first byte."""

    def __init__(self, stream: EventStream, body: AsyncIterator[str]) -> None:
        super().__init__(
            body,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
