"""Starts and stops a cluster: Ray, Redis, the Serve application."""

import io
import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from forecache.cluster.config import ServeConfig
from forecache.cluster.dispatch.router import PrefixAffinityRouter
from forecache.cluster.errors import StartError
from forecache.cluster.http import server as http_server
from forecache.cluster.http.ingress import Ingress
from forecache.cluster.launch import machine, preflight
from forecache.cluster.launch.redis_server import EmbeddedRedis
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.observe import logs, tracing
from forecache.cluster.observe.telemetry import ClusterTelemetry
from forecache.cluster.tenants import Tenants
from forecache.cluster.tiers import Tiers
from forecache.workers.core.config import WorkerSettings
from forecache.workers.core.stats import WorkerSizes
from forecache.workers.engine.worker import DecodeWorker
from forecache.workers.memory.arena.arena import remove_abandoned
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.models.loader import resolve_model

logger = logging.getLogger(__name__)

APPLICATION = "forecache"
NAMESPACE = "forecache"
POLL_S = 0.2
DRAIN_ANSWER_S = 1.0
"""Longest wait for one answer of the ingresses while draining; a second signal is handled in between."""
ROUTING_STATS_PERIOD_S = 2.0
SIZES_ANSWER_S = 10.0

NO_PROXIES = {"no_grpc_proxy": "localhost,0.0.0.0/0,::/0"}
"""Environment of processes that Serve connects by gRPC. gRPC would send these connections through ``http_proxy``, where
they hang; Ray's own gRPC ignores it. Other clients, such as downloads, still use the proxy."""
HTTP_PROXIES = {
    **NO_PROXIES,
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{http_server.__name__}:{http_server.use_protocol.__name__}",
}
"""Environment of Serve's controller and HTTP proxies: proxies call the ingress by gRPC, as the ingress calls workers,
and read connections with our protocol. Serve has no other switch for either."""
RAY_SYSTEM_CONFIG = {"task_events_report_interval_ms": 0, "worker_niceness": 0}
"""For a Ray that we start. By default it keeps a record of its last 100,000 tasks, about 100 MB, for a dashboard that
we do not run, and gives its workers a niceness of 15, so that any other process comes before the model."""
Say = Callable[[str], None]
"""Called with the current activity, in a few words."""


@dataclass(frozen=True)
class Running:
    """A cluster that serves at ``url``; ``notes`` are sentences that its operator should read, ``sizes`` says what its
    workers keep in memory."""

    url: str
    notes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


class Stopped(Exception):  # noqa: N818 - not an error: the operator asked for it
    """SIGINT or SIGTERM arrived."""


@contextmanager
def running(
    config: ServeConfig,
    say: Say,
    hurry: threading.Event | None = None,
    ingress_class: type[Ingress] = Ingress,
    worker_class: type[DecodeWorker] = DecodeWorker,
) -> Iterator[Running]:
    """Start a cluster and yield it when it is ready; stop everything on exit, also when the start fails.

    On exit the cluster refuses new requests, and running ones may finish for ``drain_deadline_s``, until ``hurry`` is
    set.

    Raises:
        ForecacheError: it can't start; the message says what to change.
    """
    logs.configure(config.telemetry, "starter", str(os.getpid()))
    tracing.check_installed(config.telemetry.otlp_endpoint)
    preflight.check(config)
    say(f"looking for the model {config.engine.model}")
    path = resolve_model(config.engine.model, say, config.engine.load_format)
    config = preflight.settle(path, config)
    model = preflight.check_model(path, config)
    config = model.sized(config)
    preflight.check_tokenizer(path)
    tenants = Tenants.load(config.limits.api_keys_file)
    port = config.port or machine.free_port(config.host)
    settings = config.model_copy(update={"port": port})
    with ExitStack() as stack:
        silence = stack.enter_context(ExitStack())
        # runs last, for tiers that did not stop in order
        stack.callback(remove_abandoned, config.memory.arena_dir)
        if config.memory.disk_bytes:
            stack.callback(remove_abandoned, config.memory.disk_dir)
        say("starting Ray" if config.address is None else f"joining Ray at {config.address}")
        stack.enter_context(_ray(config))
        redis_url, revive = config.redis_url, lambda: None
        if redis_url is None:
            # other nodes must reach it, if there may be any
            host = None if config.address is None else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
            redis = stack.enter_context(EmbeddedRedis(host, max_bytes=config.redis_bytes))
            redis_url, revive = redis.url, redis.revive
        run = uuid.uuid4().hex[:12]
        stack.callback(_stop_node_actors, run, config.stop_deadline_s)
        stack.enter_context(_serve(settings))
        tiers = Tiers(NAMESPACE, run, redis_url, config.memory.call_deadline_s)
        stack.enter_context(Supervisor(config.memory, tiers, revive))
        bound = application(settings, model, tenants, tiers, WorkerSettings(
            engine=config.engine, memory=_memory(config), selection=config.selection, indexer=config.indexer,
            namespace=NAMESPACE, run=run, redis_url=redis_url, telemetry=cluster_telemetry(config),
            workers=config.workers,
        ), ingress_class, worker_class)  # fmt: skip
        serve.run_many(
            [serve.RunTarget(bound, name=APPLICATION, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        # Ray prints that Serve's controller was killed, which Serve does at every shutdown
        stack.callback(lambda: silence.enter_context(redirect_stdout(io.StringIO())))
        say("loading the model")
        _wait_until_running(config.start_deadline_s)
        stack.callback(_drain, config.limits.drain_deadline_s, hurry or threading.Event(), say)
        host = "127.0.0.1" if config.host in ("0.0.0.0", "") else config.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        yield Running(url, preflight.notes(model, config), _sizes())


def _sizes() -> tuple[str, ...]:
    """What the workers' memory was sized to, each size once."""
    workers = serve.get_deployment_handle("DecodeWorker", APPLICATION)
    answers = workers.broadcast("sizes").results(timeout_s=SIZES_ANSWER_S, return_exceptions=True)
    return tuple(dict.fromkeys(str(sizes) for sizes in answers if isinstance(sizes, WorkerSizes)))


def _memory(config: ServeConfig) -> MemoryConfig:
    """One machine needs no index records of other nodes."""
    if config.address is not None or config.memory.remote_index_bytes is not None:
        return config.memory
    return config.memory.model_copy(update={"remote_index_bytes": 0})


@contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    """Start Ray on this machine with our sizes, or join a cluster."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if config.address is None:
            ray.init(
                address="local",
                num_cpus=config.ray_num_cpus or config.workers + 1,
                object_store_memory=config.object_store_bytes,
                include_dashboard=False,
                _system_config=RAY_SYSTEM_CONFIG,
                **quiet,
            )
        else:
            ray.init(address=config.address, **quiet)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaced it
        yield
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if ray.is_initialized():
            raise
        where = f"the Ray cluster at {config.address} can't be joined" if config.address else "Ray can't be started"
        raise StartError(f"{where}: {error}") from error
    finally:
        ray.shutdown()


@contextmanager
def _serve(config: ServeConfig) -> Iterator[None]:
    """Start Ray Serve with its HTTP proxies; refuse a joined cluster whose Serve runs other applications."""
    if config.address is not None and serve.status().applications:
        names = ", ".join(serve.status().applications)
        raise StartError(
            f"the Ray cluster at {config.address} already serves {names}: stop that first (`serve shutdown`), or use "
            "another cluster"
        )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # hides its progress messages
    try:
        serve.start(
            proxy_location=ProxyLocation(config.proxy_location),
            http_options=HTTPOptions(
                host=config.host, port=config.port, keep_alive_timeout_s=config.limits.header_deadline_s
            ),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            controller_options={"runtime_env": {"env_vars": HTTP_PROXIES}},
        )
    except (RayServeException, RuntimeError, ValueError, TimeoutError) as error:
        raise StartError(f"the HTTP server can't be started on {config.host}:{config.port}: {error}") from error
    try:
        yield
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _stop_node_actors(run: str, deadline_s: float) -> None:
    """Stop this run's memory tiers, which free their arenas, and its indexer actors."""
    names = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE
    ]
    for name in names:
        if not name.startswith(f"{run}-"):
            continue
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
            try:
                if name.startswith(f"{run}-tier-"):
                    ray.get(actor.shutdown.remote(), timeout=deadline_s)
            finally:
                ray.kill(actor)  # detached: it would outlive this program on a joined cluster
        except (ValueError, RayError) as error:
            logger.warning("%s did not stop in order: %s", name, error)


def _drain(deadline_s: float, hurry: threading.Event, say: Say) -> None:
    """Refuse new requests and wait for running ones."""
    ingresses = serve.get_app_handle(APPLICATION)
    end = time.monotonic() + deadline_s
    try:
        while True:
            # ask all each time: Serve replaces an ingress that died by one that does not drain yet
            answers = ingresses.broadcast("drain").results(timeout_s=DRAIN_ANSWER_S, return_exceptions=True)
            under_way = sum(answer for answer in answers if isinstance(answer, int))
            # a slow ingress may still have requests, a dead one has none
            silent = sum(isinstance(answer, TimeoutError) for answer in answers)
            if not under_way and not silent:
                return
            if hurry.is_set() or time.monotonic() > end:
                if silent:
                    logger.warning("%d ingresses did not answer: their requests are unknown", silent)
                logger.warning("%d requests were cut off", under_way)
                return
            say(f"waiting for {under_way} requests" if under_way else f"waiting for {silent} ingresses")
            hurry.wait(POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("did not wait for running requests: %s", error)


def application(
    config: ServeConfig,
    model: preflight.ModelFacts,
    tenants: Tenants,
    tiers: Tiers,
    settings: WorkerSettings,
    ingress_class: type[Ingress] = Ingress,
    worker_class: type[DecodeWorker] = DecodeWorker,
) -> serve.Application:
    """The Serve application: ingresses in front of ``config.workers`` decode workers."""
    quiet = LoggingConfig(
        log_level="WARNING",
        enable_access_log=False,
        encoding="JSON" if config.telemetry.log_format == "json" else "TEXT",
    )
    decode = serve.deployment(
        name="DecodeWorker",
        num_replicas=config.workers,
        max_ongoing_requests=config.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": settings.num_gpus,
            "resources": _near_memory(config),
            "runtime_env": {"env_vars": NO_PROXIES},
        },
        request_router_config=_router(config, settings),
        graceful_shutdown_wait_loop_s=POLL_S,
        graceful_shutdown_timeout_s=config.stop_deadline_s,
        max_constructor_retry_count=1,
        logging_config=quiet,
    )(worker_class)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.ingress_replicas,
        max_replicas_per_node=_ingresses_per_node(config),
        # health checks, metrics and requests to refuse must get through when every worker is full, also when one
        # ingress gets all requests
        max_ongoing_requests=config.max_ongoing_requests * config.workers + config.limits.max_queued_requests + 1024,
        ray_actor_options={
            "num_cpus": 0,
            "resources": _ingress_place(config),
            "runtime_env": {"env_vars": NO_PROXIES},
        },
        graceful_shutdown_wait_loop_s=POLL_S,
        graceful_shutdown_timeout_s=config.stop_deadline_s,
        max_constructor_retry_count=1,
        logging_config=quiet,
    )(serve.ingress()(ingress_class))
    bound: serve.Application = ingress.bind(
        config, model.max_model_len, model.chunk_bytes, tenants, decode.bind(settings), tiers, cluster_telemetry(config)
    )
    return bound


def _ingress_place(config: ServeConfig) -> dict[str, float]:
    """Ray resources that place an ingress. A single one, which holds all streams, runs on the head node, without which
    the cluster ends anyway; several run anywhere."""
    if config.ingress_resource is not None:
        return {config.ingress_resource: 0.001}
    return {"node:__internal_head__": 0.001} if config.ingress_replicas == 1 else {}


def _ingresses_per_node(config: ServeConfig) -> int:
    """Most ingresses per node, as few as possible. Ray counts no resources of an ingress, so without this limit it
    might put all on one node."""
    if config.ingress_resource is not None:
        return 1
    nodes = ray.nodes() if ray.is_initialized() else []  # type: ignore[no-untyped-call]
    return -(-config.ingress_replicas // max(sum(bool(node["Alive"]) for node in nodes), 1))


def _router(config: ServeConfig, settings: WorkerSettings) -> RequestRouterConfig:
    if config.router == "power-of-two":
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class=PrefixAffinityRouter,  # type: ignore[arg-type]
        request_router_kwargs={
            "chunk_tokens": config.engine.chunk_tokens,
            "redis_url": settings.redis_url,
        },
        request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,  # type: ignore[arg-type]
    )


def cluster_telemetry(config: ServeConfig) -> ClusterTelemetry:
    """Telemetry settings of every process. A Ray that we started serves metrics on the loopback address only."""
    host = config.telemetry.metrics_host or ("127.0.0.1" if config.address is None else None)
    return ClusterTelemetry(config.telemetry, config.model_name, host)


def _near_memory(config: ServeConfig) -> dict[str, float]:
    """Ray resources that place a worker on a node with a memory tier."""
    return {} if config.memory.tier_resource is None else {config.memory.tier_resource: 0.001}


def _wait_until_running(deadline_s: float) -> None:
    """Raise :class:`StartError` with the workers' reason when the application fails or takes too long."""
    end, messages = time.monotonic() + deadline_s, ""
    while time.monotonic() < end:
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == ApplicationStatus.RUNNING:
                return
            reported = [application.message, *(d.message for d in application.deployments.values())]
            messages = "\n".join(text for text in reported if text)
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise StartError(_reason(messages))
        time.sleep(POLL_S)
    raise StartError(
        f"the cluster was not ready within {deadline_s:.0f} s (--start-deadline-s). "
        f"{messages or 'Serve gives no reason: see /tmp/ray/session_latest/logs'}"
    )


def _reason(message: str) -> str:
    """The message of forecache's error in a traceback that Serve returns as text, else the last line."""
    errors = re.findall(r"forecache\.[\w.]+Error: (.+)", message)
    if errors:
        return str(errors[-1])
    lines = [line for line in message.splitlines() if line.strip()]
    return f"a worker can't start: {lines[-1] if lines else 'no reason given'}; see /tmp/ray/session_latest/logs"


def run(config: ServeConfig, say: Say, ready: Callable[[Running], None]) -> None:
    """Serve until SIGINT or SIGTERM. Calls ``ready`` when the cluster accepts requests."""
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            hurry.set()  # it stops already; an exception now would leave half a cluster
            return
        stop.set()
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        with running(config, say, hurry) as cluster:
            if not stop.is_set():  # a library's callback may have swallowed the exception
                ready(cluster)
            stop.wait()
    except (Stopped, SystemExit):  # SystemExit: from Ray's handler of SIGTERM, while Ray starts
        say("stopped")
