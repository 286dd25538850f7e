"""Long work on an ingress' event loop is done in pieces, so that other tasks run in between."""

import asyncio
import json
from typing import Any

import pytest
from fake_workers import Errors, Workers, stream_over
from hypothesis import given
from hypothesis import strategies as st

from forecache.cluster.dispatch.completion_stream import MAX_RUNNING, OPENED_AT_ONCE, CompletionStream, Turns
from forecache.cluster.http import responses as answers_module
from forecache.cluster.http.logprobs import TokenTexts
from forecache.cluster.http.responses import (
    PIECE_TOKENS,
    AnswerFormat,
    ChoiceWriter,
    Echo,
    collect,
    json_pieces,
    server_sent_events,
)
from forecache.workers.core.requests import GenerateRequest, SequenceStats, TokenEvent, TokenLogprobs

pytestmark = pytest.mark.anyio
TOKENS = 3


class SameText(TokenTexts):
    """Every token's text is one character."""

    def __init__(self) -> None:
        pass

    def text_bytes(self, token: int) -> bytes:
        return b"t"


class Ready:
    """A stream whose events are all available."""

    def __init__(self, gauge: "Gauge", tokens: int = TOKENS, prompt_logprobs: int = 0) -> None:
        self._gauge = gauge
        self.assigned = True
        self._tokens = self._left = tokens
        self._prompt_logprobs = prompt_logprobs

    def __aiter__(self) -> "Ready":
        return self

    async def __anext__(self) -> TokenEvent:
        self._left -= 1
        stats = None
        if not self._left:
            self._gauge.open -= 1
            stats = SequenceStats(3, completion_tokens=TOKENS)
        scored = (TokenLogprobs(5, -1.0, ((5, -1.0), (6, -2.0))),)
        before, self._prompt_logprobs = scored * self._prompt_logprobs, 0
        return TokenEvent(
            "r",
            (5,),
            "x",
            "length" if stats else None,
            stats,
            position=self._tokens - self._left - 1,
            logprobs=scored,
            prompt_logprobs=before,
        )

    def cancel(self) -> None: ...


class Gauge:
    """Measures the most work between two turns of another task, and the most open streams."""

    def __init__(self) -> None:
        self.open = self.most_open = self.opened = 0
        self.most: dict[str, int] = {}
        self._now: dict[str, int] = {}
        self.turns = 0

    def count(self, what: str, times: int = 1) -> None:
        self._now[what] = self._now.get(what, 0) + times
        self.most[what] = max(self.most.get(what, 0), self._now[what])

    async def others(self) -> None:
        """The other task, which runs whenever the event loop lets it."""
        while True:
            self._now.clear()
            self.turns += 1
            await asyncio.sleep(0)

    def stream(self, prompts: int, per_prompt: int = 1, **settings: int) -> CompletionStream:
        def start(_: GenerateRequest) -> Ready:
            self.count("opened")
            self.opened += 1
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            return Ready(self, **settings)

        return stream_over(Workers(start), prompts=prompts, per_prompt=per_prompt)


async def run_with_other_task(gauge: Gauge, work: Any) -> Any:
    task = asyncio.ensure_future(gauge.others())
    try:
        return await work
    finally:
        task.cancel()


def answer(**settings: Any) -> AnswerFormat:
    return AnswerFormat("id", 0, "m", settings.pop("chat", True), (3,) * 1024, **settings)


@pytest.mark.parametrize("per_prompt", [1, 4])
async def test_many_choices_are_opened_a_few_at_a_time(per_prompt: int) -> None:
    gauge, prompts = Gauge(), 512 // per_prompt
    whole = json.loads(await run_with_other_task(gauge, collect(gauge.stream(prompts, per_prompt), answer())))
    assert [choice["index"] for choice in whole["choices"]] == list(range(512))
    assert all(choice["message"]["content"] == "x" * TOKENS for choice in whole["choices"])
    assert gauge.opened == 512 and gauge.open == 0
    assert gauge.most_open <= MAX_RUNNING
    assert gauge.most["opened"] <= 2 * OPENED_AT_ONCE


async def test_each_event_costs_as_much_however_many_choices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event does not cost time for every waiting task."""
    gauge = Gauge()

    async def no_wait(tasks: Any, **settings: Any) -> Any:
        raise AssertionError("asyncio.wait looks at each of its tasks")

    monkeypatch.setattr(asyncio, "wait", no_wait)
    events = [news[0] async for news in gauge.stream(300).events() if news is not None]
    assert sorted(events) == sorted(list(range(300)) * TOKENS)


async def test_events_that_are_there_together_are_written_with_turns_between(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge, take = Gauge(), ChoiceWriter.take

    def counted(self: ChoiceWriter, event: TokenEvent) -> Any:
        gauge.count("taken")
        return take(self, event)

    monkeypatch.setattr(ChoiceWriter, "take", counted)

    async def read() -> int:
        body = server_sent_events(gauge.stream(300), answer(), Errors())
        return len([line async for line in body])

    assert await run_with_other_task(gauge, read()) >= 300 * (TOKENS + 1)
    assert gauge.most["taken"] <= 2 * OPENED_AT_ONCE


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_long_prompt_are_laid_out_in_pieces(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge, lay_out, tokens = Gauge(), answers_module.completion_logprobs, 40 * PIECE_TOKENS

    def counted(tokens: Any, *more: Any) -> Any:
        gauge.count("laid out", len(tokens))
        return lay_out(tokens, *more)

    monkeypatch.setattr(answers_module, "completion_logprobs", counted)
    echoed = answer(chat=False, texts=SameText(), echo=(Echo("t" * (tokens + 1), 5),))
    stream_of_one = gauge.stream(1, prompt_logprobs=tokens)

    async def streamed() -> list[str]:
        return [line async for line in server_sent_events(stream_of_one, echoed, Errors())]

    if stream:
        told = [
            json.loads(line.removeprefix("data: "))
            for line in await run_with_other_task(gauge, streamed())
            if "{" in line
        ]
        logprobs = next(chunk["choices"][0]["logprobs"] for chunk in told if chunk["choices"][0]["logprobs"])
        assert len(logprobs["tokens"]) == tokens + 1
    else:
        logprobs = json.loads(await run_with_other_task(gauge, collect(stream_of_one, echoed)))["choices"][0][
            "logprobs"
        ]
        assert len(logprobs["tokens"]) == tokens + 1 + TOKENS
    assert logprobs["token_logprobs"][:2] == [None, -1.0]
    assert logprobs["text_offset"] == list(range(len(logprobs["tokens"])))
    assert gauge.most["laid out"] <= 2 * PIECE_TOKENS
    assert gauge.turns >= 40


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)


@given(JSON, st.integers(0, 4), st.integers(0, 200))
def test_pieces_are_the_json_of_the_whole(value: Any, depth: int, repeated: int) -> None:
    whole = {"a": [value], "b": [value] * repeated, "c": list(range(repeated))}
    assert json.loads("".join(json_pieces(whole, depth))) == whole


async def test_turns_come_after_so_much_work() -> None:
    gauge, turns = Gauge(), Turns(10)

    async def work() -> None:
        for _ in range(100):
            gauge.count("work")
            await turns.did()

    await run_with_other_task(gauge, work())
    assert gauge.most["work"] <= 10
    assert OPENED_AT_ONCE <= MAX_RUNNING
