"""The HTTP handlers: OpenAI's paths, health, readiness, metrics and the page at `/ui`."""

import importlib.metadata
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from forecache.cluster.dispatch.admission import Admission, ResidentEstimate
from forecache.cluster.dispatch.choice_requests import ChoiceRequests
from forecache.cluster.dispatch.completion_stream import CompletionStream
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.errors import ApiError, UnknownModelError, from_http_status, log_exception, shortened
from forecache.cluster.http.body import Bodies, check_headers
from forecache.cluster.http.openai_types import model_object
from forecache.cluster.http.openapi import document
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.request_reader import ReadRequest, Wanted
from forecache.cluster.http.responses import AnswerFormat, Echo, EventStreamResponse, collect, server_sent_events
from forecache.cluster.observe.metrics import CONTENT_TYPE, Metrics
from forecache.cluster.observe.request_record import RequestRecord
from forecache.cluster.tenants import Tenant, Tenants
from forecache.indexer.serving.telemetry import SILENCE, ProcessTelemetry
from forecache.workers.errors import ForecacheError

logger = logging.getLogger(__name__)

FIRST_EVENT_WAIT_S = 2.0
CLIENT_LEFT = (ClientDisconnect, TaskCancelledError)
"""Exceptions by which the web framework and Ray Serve report that the client disconnected."""
CLIENT_LEFT_STATUS = 499

UI_FOLDER = Path(__file__).parents[1] / "ui"
_UI_FILES = {
    "/ui": ("index.html", "text/html"),
    "/ui/app.js": ("app.js", "text/javascript"),
    "/ui/style.css": ("style.css", "text/css"),
}
_UI_HEADERS = {
    # no resources from other servers, and no inline scripts
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Api:
    """The handlers of one ingress, over the workers of one model."""

    def __init__(
        self,
        workers: ServeWorkers,
        encoder: PromptEncoder,
        metrics: Metrics,
        admission: Admission,
        tenants: Tenants,
        resident: ResidentEstimate,
        telemetry: ProcessTelemetry = SILENCE,
    ) -> None:
        self._workers = workers
        self._encoder = encoder
        self._metrics = metrics
        self._admission = admission
        self.limits = admission.limits
        self._bodies = Bodies(admission.limits)
        self._tenants = tenants
        self._resident = resident
        self._telemetry = telemetry
        self._created = int(time.time())
        self._ui = {path: (UI_FOLDER / name).read_bytes() for path, (name, _) in _UI_FILES.items()}

    def app(self) -> FastAPI:
        """The application. Errors that handlers raise become error objects in the exception handlers below."""
        app = FastAPI(title="forecache", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/v1/detokenize", self.detokenize, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/ready", self.ready, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        for path in _UI_FILES:
            app.add_api_route(path, self.ui, methods=["GET"])
        app.add_exception_handler(HTTPException, self._http_error)
        # registered by type: the framework logs what only the handler of Exception catches as a server error
        for client_left in CLIENT_LEFT:
            app.add_exception_handler(client_left, self._client_left)
        for refusal in (ForecacheError, ValidationError):
            app.add_exception_handler(refusal, self._failed)
        app.add_exception_handler(Exception, self._failed)
        return app

    async def chat_completions(self, http: Request) -> Response:
        return await self._complete(http, Wanted.CHAT)

    async def completions(self, http: Request) -> Response:
        return await self._complete(http, Wanted.COMPLETION)

    async def tokenize(self, http: Request) -> Response:
        return await self._convert(http, Wanted.TOKENS)

    async def detokenize(self, http: Request) -> Response:
        return await self._convert(http, Wanted.TEXT)

    async def models(self, http: Request) -> Response:
        self.tenant_of(http)
        return JSONResponse({"object": "list", "data": [model_object(self._metrics.model_name, self._created)]})

    async def model(self, http: Request, name: str) -> Response:
        self.tenant_of(http)
        served = self._metrics.model_name
        if name != served:
            message = f"the model {shortened(name)!r} does not exist here; {served!r} is served"
            raise UnknownModelError(message, "model")
        return JSONResponse(model_object(name, self._created))

    async def openapi(self) -> Response:
        return JSONResponse(document(self._metrics.model_name, importlib.metadata.version("forecache")))

    async def health(self) -> Response:
        """200: this process is up."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200: a worker has loaded its model and reaches its memory tier. 503 otherwise, and while draining."""
        if self._admission.draining:
            return JSONResponse({"status": "not ready", "reason": "being stopped"}, status_code=503)
        try:
            workers = await self._workers.stats()
        except ForecacheError as error:
            reason = log_exception(error, "GET /ready").message
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        reached = [worker for worker in workers if worker.tier is not None]
        if not reached:
            return JSONResponse({"status": "not ready", "reason": "no memory tier answers"}, status_code=503)
        scorers = sorted({worker.scorer.name for worker in reached})
        return JSONResponse({"status": "ready", "workers": len(reached), "scorer": ", ".join(scorers)})

    async def metrics(self) -> Response:
        """The series of this process; `/metrics/cluster` has those of all processes."""
        return PlainTextResponse(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def ui(self, http: Request) -> Response:
        """A file of the page at `/ui`. It needs no API key; the requests that the page sends to `/v1` do."""
        path = http.scope["route"].path
        return Response(self._ui[path], media_type=_UI_FILES[path][1], headers=_UI_HEADERS)

    def tenant_of(self, http: Request) -> Tenant:
        """The tenant whose API key the request carries.

        Raises :class:`BodyTooLargeError` for headers or an announced body beyond the limits, and
        :class:`AuthenticationError`.
        """
        check_headers(http, self.limits)
        return self._tenants.of(http.headers.get("authorization"))

    async def _complete(self, http: Request, wanted: Wanted) -> Response:
        """A chat or text completion: read the request, admit it, and stream or collect its events."""
        tenant = self.tenant_of(http)
        self._admission.check_open(tenant.name)
        async with self._bodies.received(http, tenant.name) as body:
            with self._admission.entering(tenant.name):
                request: ReadRequest = await self._read(wanted, body, tenant)
                del body
                answer = await self._format(request, chat=wanted is Wanted.CHAT)
                stream = self._admit(http, request, answer, tenant)
        if not request.stream:
            return _json(await collect(stream, answer))
        try:
            await stream.start(FIRST_EVENT_WAIT_S)
        except BaseException:
            stream.close()
            raise
        return EventStreamResponse(stream, server_sent_events(stream, answer, self._metrics))

    async def _convert(self, http: Request, wanted: Wanted) -> Response:
        """Tokens of a text, or the text of tokens: no worker is needed."""
        tenant = self.tenant_of(http)
        self._admission.check_open(tenant.name)
        async with self._bodies.received(http, tenant.name) as body:
            with self._admission.entering(tenant.name):
                return _json(await self._read(wanted, body, tenant))

    async def _read(self, wanted: Wanted, body: bytes | bytearray, tenant: Tenant) -> Any:
        return await self._encoder.read(wanted, body, served=self._metrics.model_name, tenant=tenant.name)

    async def _format(self, request: ReadRequest, *, chat: bool) -> AnswerFormat:
        """The form of the answer, under a new id."""
        return AnswerFormat(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._metrics.model_name,
            chat=chat,
            prompt_tokens=tuple(len(prompt.token_ids) for prompt in request.prompts),
            include_usage=request.include_usage,
            texts=await self._encoder.token_texts() if request.scored else None,
            tools=request.tools,
            echo=tuple(Echo(p.echo, p.token_ids[0]) for p in request.prompts if p.echo is not None),
        )

    def _admit(self, http: Request, request: ReadRequest, answer: AnswerFormat, tenant: Tenant) -> CompletionStream:
        """The stream of an admitted request. Raises what :meth:`.Admission.admit` raises."""
        prompts, per_prompt, asked = request.prompts, request.per_prompt, request.cache
        session_id = None if asked.session_id is None else tenant.scoped_name(asked.session_id)
        cache = replace(asked, cache_salt=tenant.scoped_name(asked.cache_salt), session_id=session_id)
        limits_s = [limit for limit in (request.timeout_s, self.limits.request_timeout_s) if limit is not None]
        ticket = self._admission.admit(
            tenant,
            [len(prompt.token_ids) for prompt in prompts for _ in range(per_prompt)],
            per_prompt * sum(self._resident.nbytes(len(p.token_ids) + p.max_tokens, cache) for p in prompts),
        )
        try:
            traceparent = http.headers.get("traceparent", "")
            path, prompt_tokens = http.url.path, sum(answer.prompt_tokens)
            record = RequestRecord(
                self._metrics, self._telemetry, answer.id, path, tenant.name, prompt_tokens, traceparent
            )
        except BaseException:
            ticket.close()
            raise
        try:
            requests = ChoiceRequests(
                answer.id,
                prompts,
                per_prompt,
                request.sampling,
                cache,
                request.show_chunks,
                record.traceparent,
                request.priority,
            )
            return CompletionStream(requests, self._workers, ticket, record, deadline_s=min(limits_s, default=None))
        except BaseException:  # from here on the stream closes both
            record.close()
            ticket.close()
            raise

    async def _http_error(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        shown = from_http_status(error.status_code, http.method, http.url.path, str(error.detail))
        return self._error(shown, error.headers)

    async def _client_left(self, http: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT_STATUS)  # for the log: the client is gone

    async def _failed(self, http: Request, error: Exception) -> Response:
        return self._error(log_exception(error, f"{http.method} {http.url.path}"))

    def _error(self, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        self._metrics.error(error.kind)
        logger.info("request refused", extra={"status": error.status, "code": error.kind})
        return JSONResponse(error.body(), status_code=error.status, headers=headers or dict(error.headers))


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")
