"""The events of a request's choices → an answer at once, or a server-sent event stream."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from forecache.cluster.dispatch.choices import ChoiceStreams
from forecache.cluster.dispatch.turns import Turns, in_pieces
from forecache.cluster.errors import ApiError, WorkerLostError, tell
from forecache.cluster.http.logprobs import (
    TextOffsets,
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    extend,
)
from forecache.cluster.http.openai_types import usage
from forecache.cluster.http.response_json import dumps, json_pieces
from forecache.cluster.http.tool_calls import ToolCall, ToolCallParser
from forecache.workers.core.requests import ChunkView, SequenceStats, TokenEvent, TokenLogprobs

logger = logging.getLogger(__name__)

PIECE_TOKENS = 64
"""Tokens whose log-probabilities are laid out without a turn for others."""
TOKEN_CHARS = 1024
"""Text of JSON that is as much work as a token's log-probabilities."""
CHOICE_DEPTH, CHUNK_DEPTH = 2, 4
"""How deep the lists of log-probabilities are in a choice, and in a chunk of a stream."""
EVENTS_AT_ONCE = 16
"""Events that are written so."""


@dataclass(frozen=True)
class Echo:
    """A prompt that its answers begin with: its text, and its ``first_token``."""

    text: str
    first_token: int


@dataclass(frozen=True)
class AnswerFormat:
    """The objects of `/v1/chat/completions` (``chat``) or `/v1/completions`.

    ``texts`` is there when log-probabilities were asked for, ``tools`` when calls are to be looked for;
    ``prompt_tokens`` has each prompt's length, ``echo`` what stands before its answers.
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

    def choice(self, index: int, said: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self, choices: list[dict[str, Any]], stats: SequenceStats) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(stats)}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def usage_chunk(self, stats: SequenceStats) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": usage(stats)}

    def view_chunk(self, index: int, view: ChunkView) -> dict[str, Any]:
        """Where the chunks of choice ``index`` are."""
        told = {"index": index, "chunks": view.states, "keep_ratio": view.keep_ratio, "coverage": view.coverage}
        return {**self._chunk_head(), "choices": [], "forecache": told}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class Piece:
    """What one event adds to a choice."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass
class ChoiceWriter:
    """One choice in the making."""

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
        """What ``event`` adds. Its last one brings what was held back."""
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
        """The finished choice, of all that it took. Others have their ``turns`` meanwhile."""
        content = "".join(piece.content for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        before = await self._echoed(tuple(told for piece in pieces for told in piece.prompt_logprobs), turns)
        said_logprobs = tuple(told for piece in pieces for told in piece.logprobs)
        logprobs = self._logprobs(())
        async for part in in_pieces(said_logprobs, turns, PIECE_TOKENS):
            extend(logprobs, self._logprobs(part))
        if before is not None and logprobs is not None:
            extend(before, logprobs)
            logprobs = before
        said: dict[str, Any] = {"text": self.before + content}
        if self.answer.chat:
            said = {"message": {"role": "assistant", "content": content or (None if calls else "")}}
            if calls:
                said["message"]["tool_calls"] = [call.whole() for call in calls]
        return self.answer.choice(self.index, said, logprobs, pieces[-1].finish_reason)

    def first(self) -> dict[str, Any] | None:
        """The chunk that opens the choice, if it has one."""
        if self.answer.chat:
            opening = {"delta": {"role": "assistant", "content": ""}}
        elif self.before and not self._scores:
            opening = {"text": self.before}  # type: ignore[dict-item]
        else:
            return None
        return self.answer.chunk(self.answer.choice(self.index, opening, None, None))

    async def chunks(self, piece: Piece, turns: Turns) -> list[dict[str, Any]]:
        """``piece`` as a stream tells it: what was said, then why it ended."""
        said: dict[str, Any] = {"text": piece.content}
        if self.answer.chat:
            said = {"delta": {"content": piece.content} if piece.content or piece.logprobs else {}}
            if piece.calls:
                first, self._calls = self._calls, self._calls + len(piece.calls)
                said["delta"]["tool_calls"] = [
                    {"index": first + i, **call.whole()} for i, call in enumerate(piece.calls)
                ]
        told = []
        if self._scores and (piece.prompt_logprobs or piece.logprobs):
            before = await self._echoed(piece.prompt_logprobs, turns)
            told.append(self.answer.choice(self.index, {"text": self.before}, before, None))
            self._scores = False
        if piece.content or piece.calls or piece.logprobs:
            told.append(self.answer.choice(self.index, said, self._logprobs(piece.logprobs), None))
        if piece.finish_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.answer.chat else {"text": ""}
            told.append(self.answer.choice(self.index, end, None, piece.finish_reason))
        return [self.answer.chunk(choice) for choice in told]

    async def _echoed(self, told: tuple[TokenLogprobs, ...], turns: Turns) -> dict[str, Any] | None:
        """Log-probabilities of the prompt, where they are to be told."""
        if not self._scores or self.echo is None or self.answer.texts is None:
            return None
        self._offsets = TextOffsets()
        echoed = echoed_logprobs(self.echo.first_token, (), self.answer.texts, self._offsets)
        async for part in in_pieces(told, turns, PIECE_TOKENS):
            extend(echoed, completion_logprobs(part, self.answer.texts, self._offsets))
        return echoed

    def _logprobs(self, told: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        texts = self.answer.texts
        if texts is None:
            return None
        if self.answer.chat:
            return chat_logprobs(told, texts)
        return completion_logprobs(told, texts, self._offsets)


def _writers(streams: ChoiceStreams, answer: AnswerFormat) -> list[ChoiceWriter]:
    echo = answer.echo
    return [ChoiceWriter(i, answer, echo[i // streams.per_prompt] if echo else None) for i in range(streams.count)]


def _total(writers: list[ChoiceWriter], per_prompt: int) -> SequenceStats:
    """The account of all choices together; a prompt that several of them share is counted once."""
    leaders = [writer.stats for writer in writers[::per_prompt]]
    everyone = [writer.stats for writer in writers]
    if len(everyone) == 1:
        return everyone[0]
    measured = [stats.coverage for stats in everyone if stats.coverage is not None]
    summed = (
        *("context_chunks", "resident_chunks", "recalled_chunks", "late_windows", "fallbacks"),
        *("context_bytes", "resident_bytes"),
    )
    return replace(
        leaders[0],
        prompt_tokens=sum(stats.prompt_tokens for stats in leaders),
        cached_tokens=sum(stats.cached_tokens for stats in leaders),
        completion_tokens=sum(stats.completion_tokens for stats in everyone),
        keep_ratio=sum(stats.keep_ratio for stats in everyone) / len(everyone),
        coverage=sum(measured) / len(measured) if measured else None,
        queue_s=max(stats.queue_s for stats in everyone),
        locate_s=max(stats.locate_s for stats in everyone),
        time_to_first_token_s=max(stats.time_to_first_token_s for stats in everyone),
        **{name: sum(getattr(stats, name) for stats in everyone) for name in summed},
    )


async def collect(streams: ChoiceStreams, answer: AnswerFormat) -> bytes:
    """The whole answer, as JSON. Stops the request on its workers when the caller is cancelled.

    It may have megabytes: others have turns meanwhile, and each choice is text before the next is laid out, since the
    garbage collector stops the event loop for as long as there are objects to look at.
    """
    turns = Turns(PIECE_TOKENS)
    try:
        writers = _writers(streams, answer)
        pieces: list[list[Piece]] = [[] for _ in writers]
        async for index, event in streams.events():
            if event is not None:
                pieces[index].append(writers[index].take(event))
            await turns.did()
    finally:
        streams.close()
    if not all(writer.stats.completion_tokens for writer in writers):
        raise WorkerLostError("the worker ended the answer early; send the request again")
    choices = list[str]()
    for writer in writers:
        choice = await writer.whole(pieces[writer.index], turns)
        choices.append(await _json_in_turns(choice, turns, CHOICE_DEPTH))
        pieces[writer.index] = []
    before, after = dumps(answer.whole([], _total(writers, streams.per_prompt))).split(_NO_CHOICES, 1)
    text = f'{before}"choices":[{",".join(choices)}]{after}'
    return text.encode("utf-8")


_NO_CHOICES = '"choices":[]'
"""Quotes are escaped in JSON's strings, so nothing before it reads the same."""


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""JSON leaves them as they are, and some clients, httpx's `iter_lines` among them, take them for the end of a line."""


def _data(value: dict[str, Any]) -> str:
    return f"data: {dumps(value).translate(_LINE_ENDS)}\n\n"


async def _json_in_turns(value: dict[str, Any], turns: Turns, depth: int) -> str:
    """As :func:`.response_json.dumps`, of what may have megabytes."""
    pieces = []
    for piece in json_pieces(value, depth):
        pieces.append(piece.translate(_LINE_ENDS))
        await turns.did(-(-len(piece) // TOKEN_CHARS))
    return "".join(pieces)


COMMENT_PERIOD_S = 5.0
"""Time between two comment lines of a stream: some clients give up after 300 lines in a row without data."""


async def server_sent_events(
    streams: ChoiceStreams,
    answer: AnswerFormat,
    failed: Callable[[ApiError], None],
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[str]:
    """The answer piece by piece. Comment lines tell of prefill (``: prefill 1024/6500``) and of waiting, one every
    ``COMMENT_PERIOD_S`` at most. ``clock`` gives seconds that never go back.

    An error after the start can't change the status any more: it is sent as an event with an ``error`` object.
    """
    comment_due_s = clock()

    def comment(text: str) -> str:
        """A comment line, or nothing if the last one was less than a period ago."""
        nonlocal comment_due_s
        now_s = clock()
        if now_s < comment_due_s:
            return ""
        comment_due_s = now_s + COMMENT_PERIOD_S
        return f": {text}\n\n"

    turns = Turns(EVENTS_AT_ONCE)
    try:
        writers = _writers(streams, answer)
        for writer in writers:
            if (opening := writer.first()) is not None:
                yield _data(opening)
                await turns.did()
        async for index, event in streams.events():
            if event is None:
                if line := comment("waiting"):
                    yield line
                continue
            if event.view is not None:
                yield _data(answer.view_chunk(index, event.view))
            for chunk in await writers[index].chunks(writers[index].take(event), turns):
                if event.prompt_logprobs:
                    yield f"data: {await _json_in_turns(chunk, turns, CHUNK_DEPTH)}\n\n"
                else:
                    yield _data(chunk)
            await turns.did()
            if not event.token_ids and not event.text and event.finish_reason is None:
                prompt_tokens = answer.prompt_tokens[index // streams.per_prompt]
                if line := comment(f"prefill {event.prefill_tokens_done}/{prompt_tokens}"):
                    yield line
        if answer.include_usage:
            yield _data(answer.usage_chunk(_total(writers, streams.per_prompt)))
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - `tell` logs it
        said = tell(error, f"request {answer.id}")
        failed(said)
        yield _data(said.body())
    finally:
        streams.close()
