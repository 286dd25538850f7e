"""From a request's events to a JSON response or an event stream; the end of a response ends its request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from fake_workers import Errors, Record, Workers, stream_over
from starlette.types import Message

from forecache.cluster.dispatch.completion_stream import CompletionStream
from forecache.cluster.errors import DeadlineError, WorkerLostError
from forecache.cluster.http.responses import (
    COMMENT_PERIOD_S,
    AnswerFormat,
    EventStreamResponse,
    collect,
    server_sent_events,
)
from forecache.workers.core.requests import ChunkView, FinishReason, GenerateRequest, SequenceStats, TokenEvent
from forecache.workers.errors import ForecacheError, InvalidRequestError, OverloadedError


def event(
    text: str = "",
    finish: FinishReason | None = None,
    prefilled: int = 0,
    error: str | None = None,
    position: int = 0,
) -> TokenEvent:
    tokens = (1,) if text else ()
    stats = SequenceStats(prompt_tokens=9, completion_tokens=2) if finish else None
    return TokenEvent("r", tokens, text, finish, stats, error, prefilled, position=position)


class Script:
    """A stream of given events: an exception is raised, a number is a pause in seconds."""

    def __init__(self, *steps: TokenEvent | Exception | float) -> None:
        self._steps = list(steps)
        self.cancelled = False
        self.assigned = True

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                return step
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


FULL = replace(event(finish="error", error="full"), overloaded=True)
ANSWER = (
    event(prefilled=4),
    event(prefilled=9),
    event("he"),
    event("llo", position=1),
    event("!", "stop", position=2),
)


def chat(include_usage: bool = False) -> AnswerFormat:
    return AnswerFormat("id", 1, "m", chat=True, prompt_tokens=(9,), include_usage=include_usage)


def stream_of(*sources: Script, prompts: int | None = None, **settings: Any) -> CompletionStream:
    """A completion stream with these choices, one per prompt unless there are fewer ``prompts``."""

    def start(request: GenerateRequest) -> Script:
        return sources[int(request.request_id.partition("-")[2] or 0)]

    prompts = prompts or len(sources)
    return stream_over(Workers(start), prompts=prompts, per_prompt=len(sources) // prompts, **settings)


def every_second(start_s: int = 1) -> Callable[[], float]:
    """A clock that advances by a second at each reading."""
    return map(float, count(start_s)).__next__


async def sse(
    source: Script, answer: AnswerFormat, silence_s: float = 60, clock: Callable[[], float] = time.monotonic
) -> tuple[list[str], list[str]]:
    errors = Errors()
    body = server_sent_events(stream_of(source, silence_s=silence_s), answer, errors, clock)
    return [piece async for piece in body], errors.kinds


def data(lines: Sequence[str]) -> list[dict[str, Any]]:
    assert all(line.endswith("\n\n") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_collect() -> None:
    source, record = Script(*ANSWER), Record()
    whole = json.loads(asyncio.run(collect(stream_of(source, record=record), chat())))
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello!"} and choice["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == 11 and whole["object"] == "chat.completion"
    assert tuple(record.seen) == ANSWER and not source.cancelled


def test_stream() -> None:
    lines, errors = asyncio.run(sse(Script(*ANSWER), chat(include_usage=True)))
    assert [line for line in lines if line.startswith(":")] == [": prefill 4/9\n\n"]
    events = data(lines)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello!"
    assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-2]["usage"] is None
    assert events[-1]["choices"] == [] and events[-1]["usage"]["prompt_tokens"] == 9
    assert lines[-1] == "data: [DONE]\n\n" and not errors


def test_comments_come_every_few_seconds_at_most() -> None:
    """Some clients give up after 300 lines in a row without data; a comment and its empty line are two."""
    steps = [event(prefilled=done) for done in range(1, 601)]
    lines, _ = asyncio.run(sse(Script(*steps, event("a", "stop")), chat(), clock=every_second()))
    comments = [line for line in lines if line.startswith(":")]
    # the first at once, then one whenever five seconds have gone by since the last: 600 s of prefill
    assert comments == [f": prefill {done}/9\n\n" for done in range(1, 601, int(COMMENT_PERIOD_S))]
    assert 2 * len(comments) < 300


def test_silences_of_several_choices_are_told_of_together() -> None:
    """Each silent choice sends an event, but the client gets one comment for all."""

    async def told() -> list[str]:
        sources = [Script(0.5, event("a", "stop")) for _ in range(4)]
        stream = stream_of(*sources, silence_s=0.01)
        answer = replace(chat(), prompt_tokens=(9,) * 4)
        return [piece async for piece in server_sent_events(stream, answer, Errors(), clock=lambda: 1.0)]

    assert asyncio.run(told()).count(": waiting\n\n") == 1


def test_an_event_is_one_line_whatever_ends_lines() -> None:
    text = "a\x85b\u2028c\u2029d\r\n\x0b\x0c\x1c\x1d\x1ee é 😀"

    lines, _ = asyncio.run(sse(Script(event(text), event("!", "stop", position=1)), chat()))
    assert all(len(line.splitlines()) == 2 for line in lines), "and an empty one"
    deltas = [choice["delta"] for event in data(lines) for choice in event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == f"{text}!"


def test_who_watches_is_told_where_chunks_are() -> None:
    view = ChunkView("hc", 0.5, None)
    source = Script(
        replace(event(prefilled=9), view=view), event("a"), replace(event("b", "stop", position=1), view=view)
    )
    told = data(asyncio.run(sse(source, chat()))[0])
    views = [one["forecache"] for one in told if "forecache" in one]
    assert views == [{"index": 0, "chunks": "hc", "keep_ratio": 0.5, "coverage": None}] * 2
    assert all(one["choices"] == [] for one in told if "forecache" in one)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told if one["choices"]) == "ab"


def test_completions_have_text() -> None:
    answer = AnswerFormat("id", 1, "m", chat=False, prompt_tokens=(9,))
    lines, _ = asyncio.run(sse(Script(*ANSWER), answer))
    assert "".join(event["choices"][0]["text"] for event in data(lines)) == "hello!"
    assert all("usage" not in event and event["object"] == "text_completion" for event in data(lines))


def test_silence_is_filled_with_comments() -> None:
    lines, _ = asyncio.run(sse(Script(0.2, event("a", "stop")), chat(), silence_s=0.01))
    assert ": waiting\n\n" in lines and lines[-1] == "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ((event("a"), event(finish="error", error="broken")), "internal_error"),
        ((event("a"), event(finish="cancelled")), "worker_lost"),
        ((event("a"),), "worker_lost"),
        ((event("a"), InvalidRequestError("late")), "invalid_value"),
        ((event("a"), KeyError("secret")), "internal_error"),
    ],
)
def test_an_error_in_mid_stream_is_an_event(steps: tuple[Any, ...], code: str) -> None:
    lines, errors = asyncio.run(sse(Script(*steps), chat()))
    assert data(lines)[-1]["error"]["code"] == code and "[DONE]" not in lines[-1]
    assert errors == [code]
    assert "secret" not in lines[-1]


@pytest.mark.parametrize(
    ("steps", "raised"),
    [
        ((event("a"), event(finish="error", error="broken")), ForecacheError),
        ((event("a"), event(finish="cancelled")), WorkerLostError),
        ((FULL,), OverloadedError),
        ((event("a"), FULL), WorkerLostError),  # another worker would have been asked, but for the limit
        ((event("a"), InvalidRequestError("no")), InvalidRequestError),
    ],
)
def test_an_error_is_raised_for_an_answer_at_once(
    steps: tuple[TokenEvent | Exception, ...], raised: type[Exception]
) -> None:
    with pytest.raises(raised):
        asyncio.run(collect(stream_of(Script(*steps)), chat()))


@pytest.mark.parametrize(
    ("step", "raised"),
    [
        (InvalidRequestError("no"), InvalidRequestError),
        (FULL, OverloadedError),
        (event(finish="error", error="broken"), ForecacheError),
    ],
)
def test_start_raises_what_refuses_the_request(step: TokenEvent | Exception, raised: type[Exception]) -> None:
    """A refusal by an exception or by an event: before the first byte the response can still have a status."""
    record = Record()
    with pytest.raises(raised):
        asyncio.run(stream_of(Script(step), record=record).start(wait_s=60))
    assert record.seen == ([step] if isinstance(step, TokenEvent) else [])


@pytest.mark.parametrize("wait_s", [0.001, 60])
def test_start_loses_no_event_and_waits_no_longer_than_told(wait_s: float) -> None:
    """Also an answer with a single event."""

    async def answered(*events: TokenEvent) -> list[str]:
        record = Record()
        stream = stream_of(Script(0.05, *events), record=record)
        await stream.start(wait_s)
        said = [piece async for piece in server_sent_events(stream, chat(), Errors())]
        assert record.seen == list(events)
        return said

    for events in (ANSWER, (event("!", "stop"),)):
        said = asyncio.run(answered(*events))
        assert said[-1] == "data: [DONE]\n\n" and data(said)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_cancelled_collect_cancels_the_request() -> None:
    async def leave() -> bool:
        source = Script(event("a"), 60.0)
        task = asyncio.create_task(collect(stream_of(source), chat()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return source.cancelled

    assert asyncio.run(leave())


@pytest.mark.parametrize("after_events", [0, 1, 3])
def test_a_disconnect_cancels_the_request(after_events: int) -> None:
    """The client disconnects before the first byte, or in mid-stream."""

    async def leave() -> bool:
        source = Script(*(event(text, position=at) for at, text in enumerate("abcd")), 60.0)
        stream = stream_of(source)
        await stream.start(wait_s=60)
        response = EventStreamResponse(stream, server_sent_events(stream, chat(), Errors()))
        sent = 0
        gone = asyncio.Event()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal sent
            if sent == after_events:
                gone.set()
                await asyncio.sleep(0.05)
            sent += 1

        await response({"type": "http", "asgi": {"spec_version": "2.0"}}, receive, send)
        return source.cancelled

    assert asyncio.run(leave())


def test_closing_after_the_end_cancels_nothing() -> None:
    async def finish() -> bool:
        source = Script(*ANSWER)
        stream = stream_of(source)
        assert [news async for news in stream.events()] == [(0, event) for event in ANSWER]
        stream.close()
        return source.cancelled

    assert not asyncio.run(finish())


@pytest.mark.parametrize(("prompts", "per_prompt"), [(1, 3), (2, 1), (2, 2)])
def test_choices_of_a_prompt_follow_its_first(prompts: int, per_prompt: int) -> None:
    """Every choice is complete, and the other choices of a prompt open with its first choice's first token."""
    choices = prompts * per_prompt
    opened: list[int] = []
    record = Record()
    ends = [event(f"b{i}", "stop", position=1) for i in range(choices)]
    sources = [Script(event(prefilled=9), 0.01, event(f"a{i}"), 0.01, ends[i]) for i in range(choices)]

    def start(request: GenerateRequest) -> Script:
        index = int(request.request_id.partition("-")[2])
        assert index % per_prompt == 0 or index // per_prompt * per_prompt in record.begun
        opened.append(index)
        return sources[index]

    stream = stream_over(Workers(start), prompts=prompts, per_prompt=per_prompt, record=record)
    whole = json.loads(asyncio.run(collect(stream, chat())))
    assert [choice["message"]["content"] for choice in whole["choices"]] == [f"a{i}b{i}" for i in range(choices)]
    assert sorted(opened) == list(range(choices)) and not any(source.cancelled for source in sources)
    assert whole["usage"]["prompt_tokens"] == 9 * prompts and whole["usage"]["completion_tokens"] == 2 * choices


def test_each_prompt_is_told_of_by_its_own_length() -> None:
    lengths = (9, 4)
    sources = [Script(event(prefilled=length), event("a", "stop")) for length in lengths]
    stream = stream_of(*sources)

    async def told() -> list[str]:
        clock = map(float, count(step=10)).__next__  # no comment is left out
        answer = replace(chat(), prompt_tokens=lengths)
        return [piece async for piece in server_sent_events(stream, answer, Errors(), clock)]

    lines = asyncio.run(told())
    assert {line for line in lines if line.startswith(":")} == {": prefill 9/9\n\n", ": prefill 4/4\n\n"}


@pytest.mark.parametrize(
    ("coverages", "mean"), [((0.2, 0.4, None), 0.3), ((None, None, 0.5), 0.5), ((None, None, None), None)]
)
def test_the_account_is_of_all_choices(coverages: tuple[float | None, ...], mean: float | None) -> None:
    ends = [
        replace(event("a", "stop"), stats=SequenceStats(9, completion_tokens=2, fallbacks=i, coverage=coverage))
        for i, coverage in enumerate(coverages)
    ]
    stream = stream_of(*(Script(end) for end in ends), prompts=1)
    told = json.loads(asyncio.run(collect(stream, chat())))["usage"]
    assert told["prompt_tokens"] == 9 and told["completion_tokens"] == 6
    assert told["forecache"]["fallbacks"] == 3 and told["forecache"]["coverage"] == pytest.approx(mean)


def test_one_choice_that_fails_ends_all() -> None:
    sources = [Script(event("a"), 60.0), Script(event("a"), WorkerLostError("gone"))]
    with pytest.raises(WorkerLostError):
        asyncio.run(collect(stream_of(*sources), chat()))
    assert sources[0].cancelled and sources[1].cancelled


@pytest.mark.parametrize("steps", [(60.0,), (event("a"), 60.0)])
def test_a_deadline_ends_the_request(steps: Sequence[Any]) -> None:
    source = Script(*steps)
    with pytest.raises(DeadlineError, match=r"0\.05 s"):
        asyncio.run(collect(stream_of(source, deadline_s=0.05), chat()))
    assert source.cancelled


@pytest.mark.parametrize("wait_s", [0.05, 60])
def test_a_deadline_holds_before_a_stream_begins(wait_s: float) -> None:
    """The response can still have a status then."""
    source = Script(3600.0)
    stream = stream_of(source, deadline_s=0.05)
    with pytest.raises(DeadlineError, match=r"0\.05 s"):
        asyncio.run(asyncio.wait_for(stream.start(wait_s), 30))
