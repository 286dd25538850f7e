"""Fakes of workers and requests, for tests of completion streams."""

from collections.abc import Callable
from typing import Any

from forecache.cluster.config import LimitsConfig, ResumeConfig
from forecache.cluster.dispatch.admission import Admission
from forecache.cluster.dispatch.completion_stream import CompletionStream
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.observe.request_record import RequestRecord
from forecache.cluster.tenants import Anonymous
from forecache.indexer.serving.telemetry import SILENCE
from forecache.workers.core.requests import GenerateRequest, TokenEvent

REQUEST = GenerateRequest("r", (1, 2))
ONE_TRY = ResumeConfig(resume_attempts=0)


class Workers:
    """A fake ``ServeWorkers`` whose workers always run: ``start`` makes the call for a request."""

    def __init__(self, start: Callable[[GenerateRequest], Any], config: ResumeConfig = ONE_TRY) -> None:
        self.start = start
        self.failover_config = config

    async def check_running(self, no_worker_since_s: float | None) -> None:
        return None


class Requests:
    """A fake ``ChoiceRequests``: the request ``r`` for one choice; ``r-0``, ``r-1`` and so on for several."""

    def __init__(self, request: GenerateRequest, prompts: int, per_prompt: int) -> None:
        self._request = request
        self.count = prompts * per_prompt
        self.per_prompt = per_prompt

    def choice(self, index: int) -> GenerateRequest:
        if self.count == 1:
            return self._request
        return GenerateRequest(f"{self._request.request_id}-{index}", self._request.prompt_token_ids)


class Record(RequestRecord):
    """A fake request record that keeps everything it observes."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        super().__init__(metrics or Metrics("m"), SILENCE, "r", "/", "", 9, "")
        self.seen: list[TokenEvent] = []
        self.begun: list[int] = []
        self.resumes = 0

    def observe(self, choice: int, event: TokenEvent) -> None:
        super().observe(choice, event)
        self.seen.append(event)
        if event.token_ids:
            self.begun.append(choice)

    def resumed(self) -> None:
        super().resumed()
        self.resumes += 1


class Errors(Metrics):
    """Fake metrics that keep the kinds of errors they count."""

    def __init__(self) -> None:
        super().__init__("m")
        self.kinds: list[str] = []

    def error(self, kind: str) -> None:
        super().error(kind)
        self.kinds.append(kind)


def stream_over(
    workers: Any,
    request: GenerateRequest = REQUEST,
    *,
    prompts: int = 1,
    per_prompt: int = 1,
    record: RequestRecord | None = None,
    **settings: Any,
) -> CompletionStream:
    """A completion stream that sends its choices to ``workers``."""
    ticket = Admission(LimitsConfig(max_queued_requests=4096)).admit(Anonymous(), [9] * (prompts * per_prompt), 0)
    requests: Any = Requests(request, prompts, per_prompt)
    return CompletionStream(requests, workers, ticket, record or Record(), **settings)


class Reader:
    """Reads the events of a stream's only choice."""

    def __init__(self, stream: CompletionStream) -> None:
        self.stream = stream
        self._news = stream.events()

    def __aiter__(self) -> "Reader":
        return self

    async def __anext__(self) -> TokenEvent:
        while (news := await anext(self._news)) is None:
            pass
        return news[1]

    def close(self) -> None:
        self.stream.close()
