"""Turns the events of a request's choices into a JSON response, or into server-sent events.

The event loop serves all streams, so long work on it is done in pieces, with turns for other tasks between them.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from forecache.cluster.dispatch.completion_stream import CompletionStream, Turns
from forecache.cluster.errors import log_exception
from forecache.cluster.http.logprobs import (
    TextOffsets,
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    extend,
)
from forecache.cluster.http.openai_types import usage
from forecache.cluster.http.tool_calls import ToolCall, ToolCallParser
from forecache.cluster.observe.metrics import Metrics
from forecache.workers.core.requests import ChunkView, SequenceStats, TokenEvent, TokenLogprobs

PIECE_TOKENS = 64
"""Tokens whose log-probabilities are formatted before other tasks get a turn."""
PIECE_ITEMS = 64
"""Items of a list that are written before other tasks get a turn."""
EVENTS_AT_ONCE = 16
"""Events of a stream that are written before other tasks get a turn."""
TOKEN_CHARS = 1024
"""Characters of JSON that cost about as much as formatting the log-probabilities of one token."""
CHOICE_DEPTH, CHUNK_DEPTH = 2, 4
"""Levels above the lists of log-probabilities in a choice, and in a chunk of a stream."""
COMMENT_PERIOD_S = 5.0
"""Shortest time between two comment lines of a stream: some clients give up after 300 lines in a row without data."""

T = TypeVar("T")

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""JSON may contain these characters, but some clients, such as httpx's `iter_lines`, split lines at them."""
_NO_CHOICES = '"choices":[]'
"""Where :func:`collect` inserts the choices. No string of JSON contains this text, since quotes are escaped there."""


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its answers: its text, and its first token's id."""

    text: str
    first_token: int


@dataclass(frozen=True)
class AnswerFormat:
    """Builds the objects of `/v1/chat/completions` (``chat``) or `/v1/completions`.

    ``prompt_tokens`` has each prompt's length. ``texts`` is set if the request asked for log-probabilities, ``tools``
    if the answer may call tools, ``echo`` if prompts are repeated.
    """

    id: str
    created: int
    model: str
    chat: bool
    prompt_tokens: tuple[int, ...]
    include_usage: bool = False
    texts: TokenTexts | None = None
    tools: bool = False
    echo: tuple[Echo, ...] = ()

    def choice(self, index: int, body: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self, choices: list[dict[str, Any]], stats: SequenceStats) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(stats)}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def usage_chunk(self, stats: SequenceStats) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": usage(stats)}

    def view_chunk(self, index: int, view: ChunkView) -> dict[str, Any]:
        """Reports where the chunks of choice ``index`` are."""
        fields = {"index": index, "chunks": view.states, "keep_ratio": view.keep_ratio, "coverage": view.coverage}
        return {**self._chunk_head(), "choices": [], "forecache": fields}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class Piece:
    """The part of a choice that one event brings."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass
class ChoiceWriter:
    """Builds one choice from its events."""

    index: int
    answer: AnswerFormat
    echo: Echo | None = None
    stats: SequenceStats = field(default_factory=SequenceStats)
    _parser: ToolCallParser | None = None
    _offsets: TextOffsets = field(default_factory=TextOffsets)
    _calls: int = 0
    _scores: bool = False

    def __post_init__(self) -> None:
        self._parser = ToolCallParser() if self.answer.tools else None
        self._offsets = TextOffsets(len(self.before))
        self._scores = self.echo is not None and self.answer.texts is not None

    @property
    def before(self) -> str:
        return "" if self.echo is None else self.echo.text

    def take(self, event: TokenEvent) -> Piece:
        """The part that ``event`` adds. The last event also releases text that might have become a tool call."""
        content, calls = event.text, list[ToolCall]()
        if self._parser is not None:
            content, calls = self._parser.push(event.text)
        reason: str | None = event.finish_reason
        if reason is not None:
            self.stats = event.stats or self.stats
            if self._parser is not None:
                rest, last = self._parser.finish()
                content, calls = content + rest, calls + last
                reason = "tool_calls" if reason == "stop" and self._parser.found else reason
        return Piece(content, tuple(calls), event.logprobs, event.prompt_logprobs, reason)

    async def whole(self, pieces: Sequence[Piece], turns: Turns) -> dict[str, Any]:
        """The finished choice as one object, from all its ``pieces``."""
        content = "".join(piece.content for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        before = await self._echoed(tuple(token for piece in pieces for token in piece.prompt_logprobs), turns)
        answer_logprobs = tuple(token for piece in pieces for token in piece.logprobs)
        logprobs = self._logprobs(())
        async for part in _in_pieces(answer_logprobs, turns, PIECE_TOKENS):
            extend(logprobs, self._logprobs(part))
        if before is not None and logprobs is not None:
            extend(before, logprobs)
            logprobs = before
        body: dict[str, Any] = {"text": self.before + content}
        if self.answer.chat:
            body = {"message": {"role": "assistant", "content": content or (None if calls else "")}}
            if calls:
                body["message"]["tool_calls"] = [call.whole() for call in calls]
        return self.answer.choice(self.index, body, logprobs, pieces[-1].finish_reason)

    def first(self) -> dict[str, Any] | None:
        """The chunk of a stream that opens the choice, if there is one."""
        if self.answer.chat:
            opening = {"delta": {"role": "assistant", "content": ""}}
        elif self.before and not self._scores:
            opening = {"text": self.before}  # type: ignore[dict-item]
        else:
            return None
        return self.answer.chunk(self.answer.choice(self.index, opening, None, None))

    async def chunks(self, piece: Piece, turns: Turns) -> list[dict[str, Any]]:
        """``piece`` as chunks of a stream: the text, then the finish reason."""
        body: dict[str, Any] = {"text": piece.content}
        if self.answer.chat:
            body = {"delta": {"content": piece.content} if piece.content or piece.logprobs else {}}
            if piece.calls:
                first, self._calls = self._calls, self._calls + len(piece.calls)
                body["delta"]["tool_calls"] = [
                    {"index": first + i, **call.whole()} for i, call in enumerate(piece.calls)
                ]
        choices = []
        if self._scores and (piece.prompt_logprobs or piece.logprobs):
            before = await self._echoed(piece.prompt_logprobs, turns)
            choices.append(self.answer.choice(self.index, {"text": self.before}, before, None))
            self._scores = False
        if piece.content or piece.calls or piece.logprobs:
            choices.append(self.answer.choice(self.index, body, self._logprobs(piece.logprobs), None))
        if piece.finish_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.answer.chat else {"text": ""}
            choices.append(self.answer.choice(self.index, end, None, piece.finish_reason))
        return [self.answer.chunk(choice) for choice in choices]

    async def _echoed(self, tokens: tuple[TokenLogprobs, ...], turns: Turns) -> dict[str, Any] | None:
        """Log-probabilities of the prompt, if the request asked for them."""
        if not self._scores or self.echo is None or self.answer.texts is None:
            return None
        self._offsets = TextOffsets()
        echoed = echoed_logprobs(self.echo.first_token, (), self.answer.texts, self._offsets)
        async for part in _in_pieces(tokens, turns, PIECE_TOKENS):
            extend(echoed, completion_logprobs(part, self.answer.texts, self._offsets))
        return echoed

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        texts = self.answer.texts
        if texts is None:
            return None
        if self.answer.chat:
            return chat_logprobs(tokens, texts)
        return completion_logprobs(tokens, texts, self._offsets)


def _writers(stream: CompletionStream, answer: AnswerFormat) -> list[ChoiceWriter]:
    echo = answer.echo
    return [ChoiceWriter(i, answer, echo[i // stream.per_prompt] if echo else None) for i in range(stream.count)]


def _total(writers: list[ChoiceWriter], per_prompt: int) -> SequenceStats:
    """The statistics of all choices together. Choices share their prompt, so its tokens are counted once."""
    leaders = [writer.stats for writer in writers[::per_prompt]]
    choices = [writer.stats for writer in writers]
    if len(choices) == 1:
        return choices[0]
    measured = [stats.coverage for stats in choices if stats.coverage is not None]
    summed = (
        *("context_chunks", "resident_chunks", "recalled_chunks", "late_windows", "fallbacks"),
        *("context_bytes", "resident_bytes"),
    )
    return replace(
        leaders[0],
        prompt_tokens=sum(stats.prompt_tokens for stats in leaders),
        cached_tokens=sum(stats.cached_tokens for stats in leaders),
        completion_tokens=sum(stats.completion_tokens for stats in choices),
        keep_ratio=sum(stats.keep_ratio for stats in choices) / len(choices),
        coverage=sum(measured) / len(measured) if measured else None,
        queue_s=max(stats.queue_s for stats in choices),
        locate_s=max(stats.locate_s for stats in choices),
        time_to_first_token_s=max(stats.time_to_first_token_s for stats in choices),
        **{name: sum(getattr(stats, name) for stats in choices) for name in summed},
    )


async def collect(stream: CompletionStream, answer: AnswerFormat) -> bytes:
    """The whole answer as JSON, UTF-8. Closes ``stream``, also when the caller is cancelled.

    An answer may have megabytes. Each choice becomes text before the next is formatted: many live objects would make
    garbage collection stop the event loop for long.
    """
    turns = Turns(PIECE_TOKENS)
    try:
        writers = _writers(stream, answer)
        pieces: list[list[Piece]] = [[] for _ in writers]
        async for news in stream.events():
            if news is not None:
                index, event = news
                pieces[index].append(writers[index].take(event))
            await turns.did()
    finally:
        stream.close()
    choices = list[str]()
    for writer in writers:
        choice = await writer.whole(pieces[writer.index], turns)
        choices.append(await _json_in_turns(choice, turns, CHOICE_DEPTH))
        pieces[writer.index] = []
    before, after = dumps(answer.whole([], _total(writers, stream.per_prompt))).split(_NO_CHOICES, 1)
    text = f'{before}"choices":[{",".join(choices)}]{after}'
    return text.encode("utf-8")


def _data(value: dict[str, Any]) -> str:
    return f"data: {dumps(value).translate(_LINE_ENDS)}\n\n"


async def _json_in_turns(value: dict[str, Any], turns: Turns, depth: int) -> str:
    """As :func:`dumps`, for objects of megabytes."""
    pieces = []
    for piece in json_pieces(value, depth):
        pieces.append(piece.translate(_LINE_ENDS))
        await turns.did(-(-len(piece) // TOKEN_CHARS))
    return "".join(pieces)


async def _in_pieces(values: Sequence[T], turns: Turns, length: int) -> AsyncIterator[Sequence[T]]:
    """``values``, ``length`` at a time. Each value counts as one unit of work."""
    for start in range(0, len(values), length):
        piece = values[start : start + length]
        yield piece
        await turns.did(len(piece))


def dumps(value: Any) -> str:
    """``value`` as compact JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_pieces(value: Any, depth: int) -> Iterator[str]:
    """Strings that together are the JSON of ``value``. Long lists in its upper ``depth`` levels are split."""
    if depth and isinstance(value, dict) and value:
        for number, (name, one) in enumerate(value.items()):
            yield f"{',' if number else '{'}{dumps(name)}:"
            yield from json_pieces(one, depth - 1)
        yield "}"
    elif depth and isinstance(value, list) and value:
        for number, one in enumerate(value):
            yield "," if number else "["
            yield from json_pieces(one, depth - 1)
        yield "]"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        for start in range(0, len(value), PIECE_ITEMS):
            yield ("," if start else "[") + dumps(value[start : start + PIECE_ITEMS])[1:-1]
        yield "]"
    else:
        yield dumps(value)


async def server_sent_events(
    stream: CompletionStream,
    answer: AnswerFormat,
    metrics: Metrics,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[str]:
    """The answer as server-sent events. Closes ``stream``.

    Comment lines report the progress of prefill (``: prefill 1024/6500``) and silence (``: waiting``), at most one in
    ``COMMENT_PERIOD_S``. ``clock`` returns monotonic seconds.

    The status is sent before the first event, so a later error becomes an event with an ``error`` object.
    """
    comments = _Comments(clock)
    turns = Turns(EVENTS_AT_ONCE)
    try:
        writers = _writers(stream, answer)
        for writer in writers:
            if (opening := writer.first()) is not None:
                yield _data(opening)
                await turns.did()
        async for news in stream.events():
            if news is None:
                if line := comments.line("waiting"):
                    yield line
                continue
            index, event = news
            if event.view is not None:
                yield _data(answer.view_chunk(index, event.view))
            for chunk in await writers[index].chunks(writers[index].take(event), turns):
                if event.prompt_logprobs:
                    yield f"data: {await _json_in_turns(chunk, turns, CHUNK_DEPTH)}\n\n"
                else:
                    yield _data(chunk)
            await turns.did()
            if not event.token_ids and not event.text and event.finish_reason is None:
                prompt_tokens = answer.prompt_tokens[index // stream.per_prompt]
                if line := comments.line(f"prefill {event.prefill_tokens_done}/{prompt_tokens}"):
                    yield line
        if answer.include_usage:
            yield _data(answer.usage_chunk(_total(writers, stream.per_prompt)))
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - `log_exception` logs it
        shown = log_exception(error, f"request {answer.id}")
        metrics.error(shown.kind)
        yield _data(shown.body())
    finally:
        stream.close()


class _Comments:
    """Limits comment lines to one in ``COMMENT_PERIOD_S``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_s = clock()

    def line(self, text: str) -> str:
        """A comment line, or an empty string if the last one is too recent."""
        now_s = self._clock()
        if now_s < self._due_s:
            return ""
        self._due_s = now_s + COMMENT_PERIOD_S
        return f": {text}\n\n"


class EventStreamResponse(StreamingResponse):
    """Server-sent events. Closes ``stream`` whenever the response ends, even before its first byte."""

    def __init__(self, stream: CompletionStream, body: AsyncIterator[str]) -> None:
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
