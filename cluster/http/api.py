"""The HTTP interface: OpenAI's paths, health, readiness and metrics."""

import importlib.metadata
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from forecache.cluster.dispatch.choices import ChoiceStreams
from forecache.cluster.dispatch.completion_stream import EventStream, EventStreamResponse, TokenStream
from forecache.cluster.errors import ApiError, UnknownModelError, from_http_status, shortened, tell
from forecache.cluster.http.admission import Admission
from forecache.cluster.http.body import Bodies, check_headers
from forecache.cluster.http.openai_types import model_object, seed_of_choice
from forecache.cluster.http.openapi import document
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.request_reader import ReadRequest, Wanted
from forecache.cluster.http.responses import AnswerFormat, Echo, collect, server_sent_events
from forecache.cluster.http.tenants import Tenant, Tenants
from forecache.cluster.observe.metrics import CONTENT_TYPE, Metrics
from forecache.cluster.observe.request_record import RequestRecord
from forecache.indexer.serving.telemetry import SILENCE, ProcessTelemetry
from forecache.workers.core.requests import CacheOptions, GenerateRequest, TokenEvent
from forecache.workers.core.stats import WorkerStats
from forecache.workers.errors import ForecacheError

logger = logging.getLogger(__name__)

FIRST_EVENT_WAIT_S = 2.0
SILENCE_S = 5.0
CLIENT_LEFT = (ClientDisconnect, TaskCancelledError)
"""How the web framework, and how Serve, tell that the client went away while it was listened to."""
CLIENT_LEFT_STATUS = 499


ResidentBytes = Callable[[int, CacheOptions], int]
"""Hot K/V, in bytes, that a sequence of so many tokens may come to hold, with its wishes."""


class Workers(Protocol):
    """The decode workers, as the HTTP side needs them."""

    def generate(self, request: GenerateRequest) -> TokenStream: ...

    async def stats(self) -> Sequence[WorkerStats]:
        """Of every worker that answers in time; raises when none does."""
        ...


class Api:
    """Handlers over the workers of one model."""

    def __init__(
        self,
        workers: Workers,
        encoder: PromptEncoder,
        metrics: Metrics,
        admission: Admission,
        tenants: Tenants,
        resident_bytes: ResidentBytes,
        telemetry: ProcessTelemetry = SILENCE,
    ) -> None:
        self._workers = workers
        self._encoder = encoder
        self._metrics = metrics
        self._admission = admission
        self._limits = admission.limits
        self._bodies = Bodies(admission.limits)
        self._tenants = tenants
        self._resident_bytes = resident_bytes
        self._telemetry = telemetry
        self._created = int(time.time())

    def app(self) -> FastAPI:
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
        app.add_exception_handler(HTTPException, self._http_error)
        for kind in CLIENT_LEFT:  # by themselves: what only the next handler takes is raised again, for the log
            app.add_exception_handler(kind, self._client_left)
        app.add_exception_handler(Exception, self._unexpected)
        return app

    async def chat_completions(self, http: Request) -> Response:
        return await self.guarded(http, lambda tenant: self._complete(http, tenant, Wanted.CHAT))

    async def completions(self, http: Request) -> Response:
        return await self.guarded(http, lambda tenant: self._complete(http, tenant, Wanted.COMPLETION))

    async def tokenize(self, http: Request) -> Response:
        return await self.guarded(http, lambda tenant: self._answered(http, tenant, Wanted.TOKENS))

    async def detokenize(self, http: Request) -> Response:
        return await self.guarded(http, lambda tenant: self._answered(http, tenant, Wanted.TEXT))

    async def models(self, http: Request) -> Response:
        async def answer(_: Tenant) -> Response:
            return JSONResponse({"object": "list", "data": [model_object(self._metrics.model_name, self._created)]})

        return await self.guarded(http, answer)

    async def model(self, http: Request, name: str) -> Response:
        async def answer(_: Tenant) -> Response:
            self._check_model(name)
            return JSONResponse(model_object(name, self._created))

        return await self.guarded(http, answer)

    async def openapi(self) -> Response:
        return JSONResponse(document(self._metrics.model_name, importlib.metadata.version("forecache")))

    async def health(self) -> Response:
        """This process is up."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """A worker has its model loaded and its memory tier answers; not while the server is being stopped."""
        if self._admission.draining:
            return JSONResponse({"status": "not ready", "reason": "being stopped"}, status_code=503)
        try:
            workers = await self._workers.stats()
        except ForecacheError as error:
            return JSONResponse({"status": "not ready", "reason": tell(error, "GET /ready").message}, status_code=503)
        reached = [worker for worker in workers if worker.tier is not None]
        if not reached:
            return JSONResponse({"status": "not ready", "reason": "no memory tier answers"}, status_code=503)
        scorers = sorted({worker.scorer.name for worker in reached})
        return JSONResponse({"status": "ready", "workers": len(reached), "scorer": ", ".join(scorers)})

    async def metrics(self) -> Response:
        """This process' own series; `/metrics/cluster` has everybody's."""
        return PlainTextResponse(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _complete(self, http: Request, tenant: Tenant, wanted: Wanted) -> Response:
        self._admission.check_open(tenant.name)
        async with self._bodies.received(http, tenant.name) as body:
            with self._admission.entering(tenant.name):
                request: ReadRequest = await self._read(wanted, body, tenant)
                del body
                streams, answer = await self._admitted(http, request, tenant, chat=wanted is Wanted.CHAT)
        if not request.stream:
            return _json(await collect(streams, answer))
        try:
            await streams.start(FIRST_EVENT_WAIT_S)
        except BaseException:
            streams.close()
            raise
        return EventStreamResponse(
            streams, server_sent_events(streams, answer, failed=lambda error: self._metrics.error(error.kind))
        )

    async def _answered(self, http: Request, tenant: Tenant, wanted: Wanted) -> Response:
        """The answer to a body that asks for no worker."""
        self._admission.check_open(tenant.name)
        async with self._bodies.received(http, tenant.name) as body:
            with self._admission.entering(tenant.name):
                return _json(await self._read(wanted, body, tenant))

    async def _read(self, wanted: Wanted, body: bytes | bytearray, tenant: Tenant) -> Any:
        return await self._encoder.read(wanted, body, served=self._metrics.model_name, tenant=tenant.name)

    async def _admitted(
        self, http: Request, request: ReadRequest, tenant: Tenant, *, chat: bool
    ) -> tuple[ChoiceStreams, AnswerFormat]:
        """Its choices, let in, and the form of their answer."""
        prompts = request.prompts
        answer = AnswerFormat(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._metrics.model_name,
            chat=chat,
            prompt_tokens=tuple(len(prompt.token_ids) for prompt in prompts),
            include_usage=request.include_usage,
            texts=await self._encoder.token_texts() if request.scored else None,
            tools=request.tools,
            echo=tuple(Echo(p.echo, p.token_ids[0]) for p in prompts if p.echo is not None),
        )
        return self._streams(http, request, answer, tenant), answer

    def _streams(self, http: Request, request: ReadRequest, answer: AnswerFormat, tenant: Tenant) -> ChoiceStreams:
        """The request's choices, let in, each a request to a worker once it is opened."""
        prompts, per_prompt, sampling, cache = request.prompts, request.per_prompt, request.sampling, request.cache
        session_id = None if cache.session_id is None else tenant.own(cache.session_id)
        cache = replace(cache, cache_salt=tenant.own(cache.cache_salt), session_id=session_id)
        alone = per_prompt * len(prompts) == 1
        limits = [limit for limit in (request.timeout_s, self._limits.request_timeout_s) if limit is not None]
        held = ExitStack()
        try:
            ticket = self._admission.admit(
                tenant,
                [len(prompt.token_ids) for prompt in prompts for _ in range(per_prompt)],
                per_prompt * sum(self._resident_bytes(len(p.token_ids) + p.max_tokens, cache) for p in prompts),
            )
            held.callback(ticket.close)
            request_id, traceparent = answer.id, http.headers.get("traceparent", "")
            record = RequestRecord(
                self._telemetry, request_id, http.url.path, tenant.name, sum(answer.prompt_tokens), traceparent
            )
            held.callback(record.close)

            def open_stream(index: int) -> EventStream:
                at, number = divmod(index, per_prompt)
                prompt, timer = prompts[at], self._metrics.request()
                settings = replace(sampling, max_tokens=prompt.max_tokens, seed=seed_of_choice(sampling.seed, number))

                def observe(event: TokenEvent) -> None:
                    timer(event)
                    record.observe(event)
                    if event.token_ids:
                        ticket.begun(index)

                name = request_id if alone else f"{request_id}-{index}"
                source = self._workers.generate(
                    GenerateRequest(
                        name,
                        tuple(prompt.token_ids),
                        settings,
                        cache,
                        show_chunks=request.show_chunks,
                        traceparent=record.traceparent,
                    )
                )
                return EventStream(source, silence_s=SILENCE_S, observe=observe)

            return ChoiceStreams(open_stream, len(prompts), per_prompt, min(limits, default=None), held.close)
        except BaseException:  # nothing closes the streams where there are none
            held.close()
            raise

    def _check_model(self, name: str) -> None:
        served = self._metrics.model_name
        if name != served:
            raise UnknownModelError(f"the model {shortened(name)!r} does not exist here; {served!r} is served", "model")

    async def guarded(self, http: Request, handle: Callable[[Tenant], Awaitable[Response]]) -> Response:
        """What ``handle`` answers to the tenant whose key came along, or the error object of what it raised."""
        try:
            check_headers(http, self._limits)
            return await handle(self._tenants.of(http.headers.get("authorization")))
        except (ForecacheError, ValidationError) as error:
            return self._error(tell(error, f"{http.method} {http.url.path}"))

    async def _http_error(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = from_http_status(error.status_code, http.method, http.url.path, str(error.detail))
        return self._error(said, error.headers)

    async def _client_left(self, http: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT_STATUS)  # it is not there to read it

    async def _unexpected(self, http: Request, error: Exception) -> Response:
        return self._error(tell(error, f"{http.method} {http.url.path}"))

    def _error(self, error: ApiError, headers: Any = None) -> Response:
        self._metrics.error(error.kind)
        logger.info("request refused", extra={"status": error.status, "code": error.kind})
        return JSONResponse(error.body(), status_code=error.status, headers=headers or dict(error.headers))


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")
