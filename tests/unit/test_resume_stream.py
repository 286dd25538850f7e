"""A stream that fails over: which request each worker gets, when, and the events that the client receives.

The event loop's clock jumps to its next timer, and pauses have no chance in them.
"""

import asyncio
from typing import Any

import pytest
from fake_workers import Reader, Record, Workers, stream_over
from pydantic import ValidationError
from virtual_time import run

from forecache.cluster.config import ResumeConfig
from forecache.cluster.dispatch import failover as resume
from forecache.cluster.dispatch.failover import first_try_id, try_id
from forecache.cluster.errors import AnswerFailedError, WorkerLostError, WorkerSilentError
from forecache.workers.core.requests import GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.errors import OverloadedError

REQUEST = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=9), resume_token_ids=(7,))
LOST = WorkerLostError("it died")


def token(number: int, position: int | None = None, **more: Any) -> TokenEvent:
    """The ``number``-th token, counted from 1, as a worker sends it."""
    return TokenEvent("some try", (number,), str(number), position=number - 1 if position is None else position, **more)


class Worker:
    """A worker that sends the given events; an exception is raised, a number is a pause in seconds.

    Then its stream ends, or with ``hangs`` stays silent.
    """

    def __init__(self, *steps: TokenEvent | Exception | float, hangs: bool = False) -> None:
        self._steps = list(steps)
        self._hangs = hangs
        self.cancelled = 0
        self.assigned = True

    def __aiter__(self) -> "Worker":
        return self

    async def __anext__(self) -> TokenEvent:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, TokenEvent):
                return step
            if isinstance(step, Exception):
                raise step
            await asyncio.sleep(step)
        if self._hangs:
            await asyncio.Event().wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled += 1


class Answer:
    """A client's events, and the requests to workers with their times in seconds."""

    def __init__(self, *workers: Worker, **settings: Any) -> None:
        self.workers = workers
        self.requests: list[GenerateRequest] = []
        self.asked_s: list[float] = []
        self.record = Record()
        self.heard: list[TokenEvent] = []
        self._config = ResumeConfig(**settings)

    def _start(self, request: GenerateRequest) -> Worker:
        self.requests.append(request)
        self.asked_s.append(asyncio.get_running_loop().time())
        return self.workers[len(self.requests) - 1]

    @property
    def resumes(self) -> int:
        return self.record.resumes

    def stream(self) -> Reader:
        return Reader(stream_over(Workers(self._start, self._config), REQUEST, record=self.record))

    def hear(self) -> list[int]:
        """Read all events; returns the tokens. Raises the client's error."""

        async def hear() -> None:
            stream = self.stream()
            try:
                async for event in stream:
                    self.heard.append(event)
            finally:
                stream.close()

        run(hear())
        assert all(event.request_id == "r" for event in self.heard)
        return [number for event in self.heard for number in event.token_ids]

    def fail(self, match: str) -> WorkerLostError:
        with pytest.raises(WorkerLostError, match=match) as failure:
            self.hear()
        return failure.value


@pytest.fixture(autouse=True)
def _longest_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "uniform", lambda low, high: high)


END = token(3, finish_reason="length")


def test_ids_of_tries() -> None:
    assert try_id("r", 2) == "r~2"
    assert first_try_id("r~2") == first_try_id("r") == "r"


def test_settings_have_bounds_and_do_not_change() -> None:
    assert ResumeConfig() == ResumeConfig(token_deadline_s=130, resume_attempts=8, max_silent_workers=3, max_resumes=32)
    least = ResumeConfig(token_deadline_s=0.5, resume_attempts=0, max_silent_workers=1, max_resumes=0)
    with pytest.raises(ValidationError, match="frozen"):
        least.max_resumes = 3
    for wrong in (
        {"token_deadline_s": 0},
        {"resume_attempts": -1},
        {"max_silent_workers": 0},
        {"max_resumes": -1},
        {"attempts": 3},
    ):
        with pytest.raises(ValidationError):
            ResumeConfig(**wrong)


def test_each_worker_goes_on_behind_what_was_heard() -> None:
    answer = Answer(Worker(token(1), LOST), Worker(token(2)), Worker(END))
    assert answer.hear() == [1, 2, 3]
    assert [request.request_id for request in answer.requests] == ["r", "r~1", "r~2"]
    assert [request.resume_token_ids for request in answer.requests] == [(7,), (7, 1), (7, 1, 2)]
    assert {request.prompt_token_ids for request in answer.requests} == {(1, 2)}
    assert answer.resumes == 2
    assert [worker.cancelled for worker in answer.workers] == [1, 1, 0]


def test_news_without_tokens_are_passed_on_and_signs_of_life_are_not() -> None:
    progress = TokenEvent("x", (), "", prefill_tokens_done=5)
    answer = Answer(Worker(TokenEvent("x", (), "", waiting=True), progress, token(1), TokenEvent("x", (), "", "stop")))
    assert answer.hear() == [1]
    assert [event.prefill_tokens_done for event in answer.heard] == [5, 0, 0]
    assert len(answer.requests) == 1


def test_the_pause_doubles_up_to_a_bound_until_a_token_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []

    def longest(low: float, high: float) -> float:
        ranges.append((low, high))
        return high

    monkeypatch.setattr(resume, "uniform", longest)
    lost = [Worker(LOST) for _ in range(8)]
    answer = Answer(*lost, Worker(token(1), LOST), Worker(LOST), Worker(token(2), END))
    assert answer.hear() == [1, 2, 3]
    pauses_s = [after - before for before, after in zip(answer.asked_s, answer.asked_s[1:], strict=False)]
    assert pauses_s == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 0.1, 0.2])
    assert set(ranges) == {(0.5, 1)}  # a share by chance, so that not all ask at once


def test_a_pause_may_be_half_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "uniform", lambda low, high: low)
    answer = Answer(Worker(LOST), Worker(LOST), Worker(token(1), token(2), END))
    answer.hear()
    assert answer.asked_s == pytest.approx([0, 0.05, 0.15])


def test_losses_in_a_row_are_bounded() -> None:
    answer = Answer(*(Worker(LOST) for _ in range(3)), resume_attempts=2)
    error = answer.fail(r"it died. It was not tried again: 3 workers in a row .*\(--resume-attempts\)")
    assert error.__cause__ is LOST
    assert len(answer.requests) == 3 and answer.resumes == 2
    assert all(worker.cancelled for worker in answer.workers)


def test_a_token_begins_the_row_anew() -> None:
    answer = Answer(
        Worker(LOST), Worker(LOST), Worker(token(1), LOST), Worker(LOST), Worker(token(2), END), resume_attempts=2
    )
    assert answer.hear() == [1, 2, 3]
    progress = TokenEvent("x", (), "", prefill_tokens_done=5)  # is no token
    Answer(*(Worker(progress, LOST) for _ in range(3)), resume_attempts=2).fail("3 workers in a row")


def test_workers_that_hang_are_bounded_whatever_comes_between() -> None:
    answer = Answer(
        Worker(token(1), hangs=True),
        Worker(token(2), WorkerSilentError("it hangs")),
        Worker(LOST),
        token_deadline_s=60,
        max_silent_workers=2,
    )
    answer.fail(r"it hangs. It was not tried again: 2 workers hung or fell silent on it \(--max-silent-workers\)")
    assert answer.asked_s == pytest.approx([0, 60.1])
    answer = Answer(Worker(hangs=True), token_deadline_s=60, max_silent_workers=1)
    answer.fail("sent nothing for 60 s. .* 1 workers hung")
    lost = Answer(Worker(LOST), Worker(LOST), Worker(token(1), token(2), END), max_silent_workers=1)
    assert lost.hear() == [1, 2, 3]  # these did not hang


def test_a_worker_may_be_silent_for_less_than_its_deadline() -> None:
    waiting = TokenEvent("x", (), "", waiting=True)
    answer = Answer(Worker(59.0, waiting, 59.0, token(1), 59.0, token(2), 59.0, END), token_deadline_s=60)
    assert answer.hear() == [1, 2, 3]
    assert len(answer.requests) == 1


def test_tries_are_bounded_in_all() -> None:
    answer = Answer(*(Worker(token(number), LOST) for number in range(1, 5)), max_resumes=2)
    answer.fail(r"gone on at another worker 2 times \(--max-resumes\)")
    assert len(answer.requests) == 3
    Answer(Worker(LOST), max_resumes=0).fail("0 times")


def test_an_answer_that_ends_early_is_gone_on_with() -> None:
    Answer(Worker(token(1)), resume_attempts=0).fail("the worker ended the answer early")


@pytest.mark.parametrize("given_up", [TokenEvent("x", (), "", "cancelled"), token(2, 7)])
def test_what_a_worker_gave_up_or_went_on_with_wrongly_is_not_heard(given_up: TokenEvent) -> None:
    answer = Answer(Worker(token(1), given_up), Worker(token(2), END))
    assert answer.hear() == [1, 2, 3]
    assert len(answer.requests) == 2


def test_what_was_wrong_is_named() -> None:
    Answer(Worker(TokenEvent("x", (), "", "cancelled")), resume_attempts=0).fail("gave the request up")
    Answer(Worker(token(1), token(3)), resume_attempts=0).fail("token 2 came after 1 tokens")


@pytest.mark.parametrize("error, said", [("the arena is full", "the arena is full"), (None, "no room")])
def test_a_later_worker_without_room_is_one_that_is_lost(error: str | None, said: str) -> None:
    full = TokenEvent("x", (), "", "error", error=error, overloaded=True)
    answer = Answer(Worker(token(1), LOST), Worker(full), Worker(token(2), END))
    assert answer.hear() == [1, 2, 3]
    Answer(Worker(token(1), LOST), Worker(full), resume_attempts=1).fail(said)
    first = Answer(Worker(full))
    with pytest.raises(OverloadedError, match=said):  # nothing was sent: the request is refused
        first.hear()
    assert first.heard == [] and len(first.requests) == 1


def test_an_error_of_the_request_is_passed_on() -> None:
    answer = Answer(Worker(token(1), TokenEvent("x", (), "", "error", error="a bad grammar")))
    with pytest.raises(AnswerFailedError, match="a bad grammar"):
        answer.hear()
    assert [event.token_ids for event in answer.heard] == [(1,)] and len(answer.requests) == 1


def leave_after(answer: Answer, after_s: float) -> None:
    """A client disconnects after ``after_s`` of waiting; then a minute passes."""

    async def leave() -> None:
        stream = answer.stream()
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(after_s)
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await asyncio.sleep(60)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(leave())


def test_what_a_client_has_left_is_begun_nowhere_else() -> None:
    """A cancelled call looks like a lost one. Also: it was lost before, and the pause is not over."""
    answer = Answer(Worker(1.0, LOST), Worker(END))
    leave_after(answer, 0.5)
    assert [worker.cancelled for worker in answer.workers] == [1, 0]
    answer = Answer(Worker(LOST), Worker(END))
    leave_after(answer, 0.05)
    assert len(answer.requests) == 1 and answer.resumes == 0


class SwallowsCancellation(Worker):
    """The task that reads a cancelled call gets an error like that of a lost worker, as may happen with Ray Serve."""

    async def __anext__(self) -> TokenEvent:
        try:
            return await super().__anext__()
        except asyncio.CancelledError:
            raise LOST from None


def test_a_call_that_looks_lost_once_the_client_has_left_starts_no_other() -> None:
    started: list[GenerateRequest] = []

    def start(request: GenerateRequest) -> Worker:
        started.append(request)
        return SwallowsCancellation(token(1), hangs=True)

    async def leave() -> None:
        stream = Reader(stream_over(Workers(start, ResumeConfig()), REQUEST))
        assert (await anext(stream)).token_ids == (1,)
        await asyncio.sleep(1)
        stream.close()
        await asyncio.sleep(60)

    run(leave())
    assert len(started) == 1


def test_cancel_reaches_the_worker_that_has_the_request_now() -> None:
    async def leave() -> None:
        stream = answer.stream()
        assert (await anext(stream)).token_ids == (1,)
        assert (await anext(stream)).token_ids == (2,)
        stream.close()

    answer = Answer(Worker(token(1), LOST), Worker(token(2), hangs=True))
    run(leave())
    assert [worker.cancelled for worker in answer.workers] == [1, 1]
