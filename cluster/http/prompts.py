"""Parses requests off the event loop, in fair order between tenants: small bodies in a thread, large ones in processes.

The event loop serves all streams. Parsing, validation and chat templates hold the GIL, so they would stop the streams
from any thread of this process. A thread is used only for bodies so small that the pause does not matter.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
from forecache.cluster.http.prompt_process import PromptProcess
from forecache.cluster.http.request_reader import Outcome, ReadJob, ReadRequest, Refusal, RequestReader, Wanted
from forecache.workers.core.grammar import Grammars
from forecache.workers.errors import InvalidRequestError

SMALL_BODY_BYTES = 16 << 10
"""Largest body that is parsed in a thread of this process. It takes some milliseconds."""
LONG_BODY_BYTES = 512 << 10
"""Larger bodies may take seconds to parse. If there are several processes, one is kept free for smaller bodies."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A queued body, and the future that its result goes to."""

    job: ReadJob
    body: bytes | bytearray
    outcome: "asyncio.Future[Outcome]"


class _Lane:
    """A thread that parses one body at a time, itself or by waiting for a process."""

    def __init__(self, name: str, reader: RequestReader | PromptProcess) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.reader = reader
        self.busy = False


class PromptEncoder:
    """Parses and tokenizes the requests for one model. Use its async methods on one event loop only.

    Args:
        processes: number of processes for large bodies at most; each is started when it is first needed.
        max_values: JSON values in a body at most.
        max_grammar_bytes: bytes of a request's JSON schemas at most.
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
        self._thread_lane = _Lane("tokenizer", reader)
        self._process_lanes = [_Lane("prompt-process", process) for process in self._processes]

    def start(self) -> None:
        """Start a process for large bodies, and prepare the token texts for log-probabilities. Takes a second."""
        self._process_lanes[0].thread.submit(self._processes[0].start)
        with suppress(InvalidRequestError):  # no fast tokenizer: requests for log-probabilities are refused one by one
            _ = self._grammars.tokenizer

    async def read(
        self, wanted: Wanted, body: bytes | bytearray, *, served: str | None = None, tenant: str = ""
    ) -> Any:
        """Queue a body, and parse it by :meth:`.RequestReader.read`; returns what that returns.

        Raises:
            RefusedError: the request is invalid; it wraps the errors that :meth:`.RequestReader.read` raises.
            PromptProcessError: the process that parsed the body died or took too long.
        """
        queue = self._small if len(body) <= SMALL_BODY_BYTES else self._large
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = queue.push(tenant, len(body), _Job(ReadJob(wanted, served), body, outcome))
        self._begin()
        try:
            result = await outcome
        finally:
            queue.remove(waiting)  # the caller may have been cancelled while the body was queued
        if isinstance(result, Refusal):
            raise RefusedError(result.error)
        return result

    async def encode(self, request: ChatCompletionRequest | CompletionRequest, tenant: str = "") -> list[EncodedPrompt]:
        """Tokenize the prompts of a request that is parsed already. Raises as :meth:`read` does."""
        wanted = Wanted.CHAT if isinstance(request, ChatCompletionRequest) else Wanted.COMPLETION
        read: ReadRequest = await self.read(wanted, _body(request), tenant=tenant)
        return list(read.prompts)

    async def tokenize(self, request: TokenizeRequest, tenant: str = "") -> list[int]:
        """The token ids of a prompt or of messages, as :meth:`encode` makes them. Raises as it does."""
        tokens: list[int] = json.loads(await self.read(Wanted.TOKENS, _body(request), tenant=tenant))["tokens"]
        return tokens

    async def detokenize(self, request: DetokenizeRequest, tenant: str = "") -> str:
        """The text of token ids. Raises as :meth:`encode` does."""
        return str(json.loads(await self.read(Wanted.TEXT, _body(request), tenant=tenant))["prompt"])

    async def token_texts(self) -> TokenTexts:
        """The texts of the vocabulary's tokens, for log-probabilities. Any thread may use the result.

        Raises:
            InvalidRequestError: the model has no fast tokenizer.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread_lane.thread, self._make_token_texts)

    def _make_token_texts(self) -> TokenTexts:
        return TokenTexts(self._grammars.tokenizer)

    def close(self) -> None:
        """Cancel all calls that wait, and end the processes."""
        self._closed = True
        for queue in (self._small, self._large):
            while (job := queue.pop()) is not None:
                job.outcome.cancel()
        for process in self._processes:
            process.close()
        for lane in (self._thread_lane, *self._process_lanes):
            lane.thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Start jobs on all idle lanes."""
        if self._closed:
            return
        if not self._thread_lane.busy and (job := self._small.pop()) is not None:
            self._run(self._thread_lane, job)
        while idle := [lane for lane in self._process_lanes if not lane.busy]:
            kept_free = len(self._process_lanes) > 1 and len(idle) == 1
            job = self._large.pop(LONG_BODY_BYTES if kept_free else None)
            if job is None:
                return
            self._run(idle[0], job)

    def _run(self, lane: _Lane, job: _Job) -> None:
        """Parse the body of ``job`` on ``lane``, whose thread calls ``outcome``."""
        lane.busy = True
        running = asyncio.get_running_loop().run_in_executor(lane.thread, lane.reader.outcome, job.job, job.body)
        running.add_done_callback(partial(self._ended, lane, job))

    def _ended(self, lane: _Lane, job: _Job, read: "asyncio.Future[Outcome]") -> None:
        """Pass the result on, and start the next job."""
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


def _body(request: ChatCompletionRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest) -> bytes:
    return request.model_dump_json(by_alias=True, exclude_unset=True).encode("utf-8")
