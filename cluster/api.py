"""The HTTP interface: OpenAI's paths, health, readiness and metrics."""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from forecache.cluster.errors import ApiError, UnknownModelError, from_exception, from_http_status
from forecache.cluster.metrics import CONTENT_TYPE, Metrics
from forecache.cluster.openai_types import ChatCompletionRequest, CompletionRequest, model_object
from forecache.cluster.prompts import PromptEncoder
from forecache.cluster.streams import (
    AnswerFormat,
    EventStream,
    EventStreamResponse,
    TokenStream,
    collect,
    server_sent_events,
)
from forecache.workers.decode.messages import GenerateRequest
from forecache.workers.decode.worker import WorkerStats
from forecache.workers.errors import ForecacheError, InvalidRequestError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
FIRST_EVENT_WAIT_S = 2.0
SILENCE_S = 5.0


class Workers(Protocol):
    """The decode workers, as the HTTP side needs them."""

    def generate(self, request: GenerateRequest) -> TokenStream: ...

    async def stats(self) -> Sequence[WorkerStats]:
        """Of every worker that answers in time; raises when none does."""
        ...


class Api:
    """Handlers over the workers of one model."""

    def __init__(self, workers: Workers, encoder: PromptEncoder, metrics: Metrics) -> None:
        self._workers = workers
        self._encoder = encoder
        self._metrics = metrics
        self._created = int(time.time())

    def app(self) -> FastAPI:
        app = FastAPI(title="forecache", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/ready", self.ready, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_exception_handler(HTTPException, self._http_error)
        app.add_exception_handler(Exception, self._unexpected)
        return app

    async def chat_completions(self, http: Request) -> Response:
        return await self._guarded(lambda: self._complete(http, ChatCompletionRequest))

    async def completions(self, http: Request) -> Response:
        return await self._guarded(lambda: self._complete(http, CompletionRequest))

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [model_object(self._metrics.model_name, self._created)]})

    async def model(self, name: str) -> Response:
        async def answer() -> Response:
            self._check_model(name)
            return JSONResponse(model_object(name, self._created))

        return await self._guarded(answer)

    async def health(self) -> Response:
        """This process is up."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """A worker has its model loaded and its memory tier answers."""
        try:
            workers = await self._workers.stats()
        except ForecacheError as error:
            return JSONResponse({"status": "not ready", "reason": str(error)}, status_code=503)
        reached = [worker for worker in workers if worker.tier is not None]
        if not reached:
            return JSONResponse({"status": "not ready", "reason": "no memory tier answers"}, status_code=503)
        scorers = sorted({worker.scorer.name for worker in reached})
        return JSONResponse({"status": "ready", "workers": len(reached), "scorer": ", ".join(scorers)})

    async def metrics(self) -> Response:
        try:
            self._metrics.workers.update(await self._workers.stats())
        except ForecacheError:
            # the ingress' own series are still true; `forecache_workers` says what is missing
            self._metrics.workers.update(())
        return PlainTextResponse(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _complete(self, http: Request, kind: type[ChatCompletionRequest] | type[CompletionRequest]) -> Response:
        request = kind.model_validate(await read_json(http))
        self._check_model(request.model)
        tokens, max_tokens = await self._encoder.encode(request)
        chat = kind is ChatCompletionRequest
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        answer = AnswerFormat(request_id, int(time.time()), request.model, chat, len(tokens), request.include_usage)
        source = self._workers.generate(
            GenerateRequest(request_id, tokens, request.sampling(max_tokens), request.cache())
        )
        stream = EventStream(source, silence_s=SILENCE_S, observe=self._metrics.request())
        if not request.stream:
            return JSONResponse(await collect(stream, answer))
        try:
            await stream.start(FIRST_EVENT_WAIT_S)
        except BaseException:
            stream.close()
            raise
        return EventStreamResponse(
            stream, server_sent_events(stream, answer, failed=lambda error: self._metrics.error(error.kind))
        )

    def _check_model(self, name: str) -> None:
        served = self._metrics.model_name
        if name != served:
            raise UnknownModelError(f"the model {name!r} does not exist here; {served!r} is served", "model")

    async def _guarded(self, handle: Callable[[], Awaitable[Response]]) -> Response:
        """What ``handle`` answers, or the error object of what it raised."""
        try:
            return await handle()
        except (ForecacheError, ValidationError) as error:
            return self._error(from_exception(error))

    async def _http_error(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = from_http_status(error.status_code, http.method, http.url.path, str(error.detail))
        return self._error(said, error.headers)

    async def _unexpected(self, http: Request, error: Exception) -> Response:
        logger.error("%s %s failed", http.method, http.url.path, exc_info=error)
        return self._error(from_exception(error))

    def _error(self, error: ApiError, headers: Any = None) -> Response:
        self._metrics.error(error.kind)
        return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def read_json(http: Request) -> Any:
    """The body as JSON.

    Raises:
        InvalidRequestError: too long, not UTF-8, or not JSON.
    """
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequestError(f"the body is longer than {MAX_BODY_BYTES >> 20} MiB")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
