"""Reads requests off the event loop: each tenant in turn, small ones in a thread, large ones in processes.

The event loop carries everybody's streams, and code that holds the interpreter's lock stops them from any thread:
parsing, validation, templates. So only bodies too small to matter are read in this process.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from forecache.cluster.config import DEFAULT_BODY_VALUES, DEFAULT_GRAMMAR_BYTES, DEFAULT_PROMPT_PROCESSES
from forecache.cluster.dispatch.choice_requests import EncodedPrompt
from forecache.cluster.errors import RefusedError
from forecache.cluster.http.fair_queue import FairQueue
from forecache.cluster.http.logprobs import TokenTexts
from forecache.cluster.http.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from forecache.cluster.http.prompt_process import PromptProcess, ReadJob
from forecache.cluster.http.request_reader import Outcome, ReadRequest, Refusal, RequestReader, Wanted
from forecache.workers.core.grammar import Grammars
from forecache.workers.errors import InvalidRequestError

SMALL_BODY_BYTES = 16 << 10
"""A body that is read in a thread of this process: some milliseconds of work."""
LONG_BODY_BYTES = 512 << 10
"""Bodies beyond this may take seconds: where there are several processes, one is kept for shorter ones."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A body in line, and who waits for what comes of it."""

    job: ReadJob
    body: bytes | bytearray
    outcome: "asyncio.Future[Outcome]"


class _Lane:
    """Where one body at a time is read: the thread of ``read``."""

    def __init__(self, name: str, read: Callable[[ReadJob, bytes | bytearray], Outcome]) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.read = read
        self.busy = False


class PromptEncoder:
    """Reads the requests of one model. Its async methods belong to one event loop.

    ``processes``: most processes for large bodies, each started when it is first needed; ``max_values``: most JSON
    values in a body; ``max_grammar_bytes``: most bytes of a request's schemas.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_model_len: int,
        *,
        processes: int = DEFAULT_PROMPT_PROCESSES,
        max_values: int = DEFAULT_BODY_VALUES,
        max_grammar_bytes: int = DEFAULT_GRAMMAR_BYTES,
    ) -> None:
        self.max_model_len = max_model_len
        self._grammars = Grammars(tokenizer, frozenset())
        reader = RequestReader(tokenizer, max_model_len, max_values, max_grammar_bytes)
        self._processes = [PromptProcess(reader) for _ in range(processes)]
        self._closed = False
        self._small = FairQueue[_Job]()
        self._large = FairQueue[_Job]()
        self._near = _Lane("tokenizer", lambda job, body: reader.outcome(job.wanted, body, job.served))
        self._far = [_Lane("prompt-process", process.run) for process in self._processes]

    def start(self) -> None:
        """Begin to start a process for large bodies, and make what log-probabilities need. Takes a second."""
        self._far[0].thread.submit(self._processes[0].start)
        with suppress(InvalidRequestError):  # without a fast tokenizer each request for them is refused
            _ = self._grammars.tokenizer

    async def read(
        self, wanted: Wanted, body: bytes | bytearray, *, served: str | None = None, tenant: str = ""
    ) -> Any:
        """The :class:`.ReadRequest` of a body, or the JSON of its answer, as :meth:`.RequestReader.read` makes it.

        Raises:
            RefusedError: the request is at fault; see there.
            PromptProcessError: the body could not be read, for no fault of its own.
        """
        queue = self._small if len(body) <= SMALL_BODY_BYTES else self._large
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = queue.push(tenant, len(body), _Job(ReadJob(wanted, served), body, outcome))
        self._begin()
        try:
            said = await outcome
        finally:
            queue.remove(waiting)  # who left meanwhile
        if isinstance(said, Refusal):
            raise RefusedError(said.said)
        return said

    async def encode(self, request: ChatCompletionRequest | CompletionRequest, tenant: str = "") -> list[EncodedPrompt]:
        """The prompts of a request that was read elsewhere. Raises as :meth:`read` does."""
        wanted = Wanted.CHAT if isinstance(request, ChatCompletionRequest) else Wanted.COMPLETION
        read: ReadRequest = await self.read(wanted, _body(request), tenant=tenant)
        return list(read.prompts)

    async def tokenize(self, request: TokenizeRequest, tenant: str = "") -> list[int]:
        """The token ids of a prompt or of messages, as :meth:`encode` makes them. Raises as it does."""
        said: list[int] = json.loads(await self.read(Wanted.TOKENS, _body(request), tenant=tenant))["tokens"]
        return said

    async def detokenize(self, request: DetokenizeRequest, tenant: str = "") -> str:
        """The text of token ids. Raises as :meth:`encode` does."""
        return str(json.loads(await self.read(Wanted.TEXT, _body(request), tenant=tenant))["prompt"])

    async def token_texts(self) -> TokenTexts:
        """The bytes of each token, to be asked for later and on any thread."""
        loop = asyncio.get_running_loop()
        tokenizer = await loop.run_in_executor(self._near.thread, lambda: self._grammars.tokenizer)
        return lambda token: bytes(tokenizer.decode_bytes([token]))

    def close(self) -> None:
        """Read nothing more: who waits is cancelled."""
        self._closed = True
        for queue in (self._small, self._large):
            while (job := queue.pop()) is not None:
                job.outcome.cancel()
        for process in self._processes:
            process.close()
        for lane in (self._near, *self._far):
            lane.thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Start what can be started."""
        if self._closed:
            return
        if not self._near.busy and (job := self._small.pop()) is not None:
            self._run(self._near, job)
        while idle := [lane for lane in self._far if not lane.busy]:
            kept_free = len(self._far) > 1 and len(idle) == 1
            job = self._large.pop(LONG_BODY_BYTES if kept_free else None)
            if job is None:
                return
            self._run(idle[0], job)

    def _run(self, lane: _Lane, job: _Job) -> None:
        lane.busy = True
        running = asyncio.get_running_loop().run_in_executor(lane.thread, lane.read, job.job, job.body)

        def done(read: "asyncio.Future[Outcome]") -> None:
            lane.busy = False
            error = None if read.cancelled() else read.exception()
            if not job.outcome.done():
                if read.cancelled():
                    job.outcome.cancel()
                elif error is not None:
                    job.outcome.set_exception(error)
                else:
                    job.outcome.set_result(read.result())
            self._begin()

        running.add_done_callback(done)


def _body(request: ChatCompletionRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest) -> bytes:
    return request.model_dump_json(by_alias=True, exclude_unset=True).encode("utf-8")
