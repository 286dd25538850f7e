"""From settings to a running cluster, and back to nothing: Ray, Redis, the Serve application."""

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
from forecache.cluster.http.tenants import Tenants
from forecache.cluster.launch import machine, preflight
from forecache.cluster.launch.redis_server import EmbeddedRedis
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.observe import logs, tracing
from forecache.cluster.observe.telemetry import ClusterTelemetry
from forecache.cluster.tiers import Tiers
from forecache.workers.core.settings import WorkerSettings
from forecache.workers.engine.worker import DecodeWorker
from forecache.workers.memory.arena.arena import remove_abandoned
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.models.loader import resolve_model

logger = logging.getLogger(__name__)

APPLICATION = "forecache"
NAMESPACE = "forecache"
POLL_S = 0.2
DRAIN_ANSWER_S = 1.0
"""So long an ingress may take to say what is under way, at the end: a second signal is heard in between."""
ROUTING_STATS_PERIOD_S = 2.0

NO_PROXIES = {"no_grpc_proxy": "localhost,0.0.0.0/0,::/0"}
"""Environment of processes that Serve connects by gRPC. gRPC would take ``http_proxy`` of the environment for these
connections too, where they hang; Ray's own leave it alone. Other clients, as for downloads, go on using it."""
HTTP_PROXIES = {
    **NO_PROXIES,
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{http_server.__name__}:{http_server.use_protocol.__name__}",
}
"""Environment of Serve's controller and its HTTP proxies, which hear from the ingress by gRPC, as it hears from
workers, and read connections with our protocol. Serve has no other switch for either."""
RAY_SYSTEM_CONFIG = {"task_events_report_interval_ms": 0, "worker_niceness": 0}
"""Of a Ray that we start. By default it keeps an account of its last 100,000 tasks, some 100 MB, for a dashboard that
is not there, and its workers have a niceness of 15: anything else on the machine would come before the model."""
Say = Callable[[str], None]
"""Told, in a few words, what is being done."""


@dataclass(frozen=True)
class Running:
    """A cluster that serves at ``url``; ``notes`` are sentences that its operator should read."""

    url: str
    notes: tuple[str, ...] = ()


class Stopped(Exception):  # noqa: N818 - not an error: the operator asked for it
    """SIGINT or SIGTERM came."""


@contextmanager
def running(
    config: ServeConfig,
    say: Say,
    hurry: threading.Event | None = None,
    ingress_class: type[Ingress] = Ingress,
    worker_class: type[DecodeWorker] = DecodeWorker,
) -> Iterator[Running]:
    """The cluster, ready. Everything it started is stopped at the end, also when the start fails.

    At the end nothing new is taken, and what runs may finish: for ``drain_deadline_s``, and until ``hurry`` is set.

    Raises:
        ForecacheError: it can't be started; the message says what to change.
    """
    logs.configure(config.telemetry, "starter", str(os.getpid()))
    tracing.check_installed(config.telemetry.otlp_endpoint)
    preflight.check(config)
    say(f"looking for the model {config.engine.model}")
    path = resolve_model(config.engine.model, say, config.engine.load_format)
    config = preflight.settle(path, config)
    model = preflight.check_model(path, config)
    preflight.check_tokenizer(path)
    tenants = Tenants.load(config.limits.api_keys_file)
    port = config.port or machine.free_port(config.host)
    settings = config.model_copy(update={"port": port})
    with ExitStack() as stack:
        silence = stack.enter_context(ExitStack())
        # last: of tiers that could not end in order
        stack.callback(remove_abandoned, config.memory.arena_dir)
        if config.memory.disk_bytes:
            stack.callback(remove_abandoned, config.memory.disk_dir)
        say("starting Ray" if config.address is None else f"joining Ray at {config.address}")
        stack.enter_context(_ray(config))
        redis_url, revive = config.redis_url, lambda: None
        if redis_url is None:
            # other nodes must reach it when there may be any
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
        ), ingress_class, worker_class)  # fmt: skip
        serve.run_many(
            [serve.RunTarget(bound, name=APPLICATION, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        # Ray prints that Serve's controller was killed; it is, by Serve, each time it is shut down
        stack.callback(lambda: silence.enter_context(redirect_stdout(io.StringIO())))
        say("loading the model")
        _wait_until_running(config.start_deadline_s)
        stack.callback(_drain, config.limits.drain_deadline_s, hurry or threading.Event(), say)
        host = "127.0.0.1" if config.host in ("0.0.0.0", "") else config.host
        yield Running(f"http://{f'[{host}]' if ':' in host else host}:{port}", preflight.notes(model, config))


def _memory(config: ServeConfig) -> MemoryConfig:
    """A machine of its own has no other nodes, and needs no records of what is there."""
    if config.address is not None or config.memory.remote_index_bytes is not None:
        return config.memory
    return config.memory.model_copy(update={"remote_index_bytes": 0})


@contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    """Ray, started here with sizes of our choice, or joined."""
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
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray put one of its own
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
    """Ray Serve with its HTTP proxies; a Serve that others run on a joined cluster is not taken over."""
    if config.address is not None and serve.status().applications:
        names = ", ".join(serve.status().applications)
        raise StartError(
            f"the Ray cluster at {config.address} already serves {names}: stop that first (`serve shutdown`), or use "
            "another cluster"
        )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its progress is not ours to tell
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
    """End the memory tiers, which free their arenas, and the indexers that this run's workers made on their nodes."""
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
                ray.kill(actor)  # detached: it would outlive this program on a cluster that was joined
        except (ValueError, RayError) as error:
            logger.warning("%s did not end in order: %s", name, error)


def _drain(deadline_s: float, hurry: threading.Event, say: Say) -> None:
    """Let requests that are under way finish, and nothing new in."""
    ingresses = serve.get_app_handle(APPLICATION)
    end = time.monotonic() + deadline_s
    try:
        while True:
            # all of them, each time: one that died is replaced by one that drains not yet
            answers = ingresses.broadcast("drain").results(timeout_s=DRAIN_ANSWER_S, return_exceptions=True)
            under_way = sum(answer for answer in answers if isinstance(answer, int))
            # one that is only slow may still have requests; one that died has none
            silent = sum(isinstance(answer, TimeoutError) for answer in answers)
            if not under_way and not silent:
                return
            if hurry.is_set() or time.monotonic() > end:
                if silent:
                    logger.warning("%d ingresses did not say what is under way", silent)
                logger.warning("%d requests were cut off", under_way)
                return
            say(f"waiting for {under_way} requests" if under_way else f"waiting for {silent} ingresses")
            hurry.wait(POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("requests were not waited for: %s", error)


def application(
    config: ServeConfig,
    model: preflight.ModelFacts,
    tenants: Tenants,
    tiers: Tiers,
    settings: WorkerSettings,
    ingress_class: type[Ingress] = Ingress,
    worker_class: type[DecodeWorker] = DecodeWorker,
) -> serve.Application:
    """Ingresses in front of `workers` replicas of the decode worker."""
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
        # health, readiness and metrics must get through when every worker is full, and so must those to be refused; and
        # one must take what comes for all
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
    """Ray resources of an ingress. One alone holds the streams of all: on the node that the cluster does not outlive.
    Of several each takes its own along."""
    if config.ingress_resource is not None:
        return {config.ingress_resource: 0.001}
    return {"node:__internal_head__": 0.001} if config.ingress_replicas == 1 else {}


def _ingresses_per_node(config: ServeConfig) -> int:
    """Most ingresses of a node: as few as there can be. Without that Ray would put several on one, since they use
    nothing that it counts."""
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
    """What every process of the cluster is told. A Ray that was started here is for this machine alone."""
    host = config.telemetry.metrics_host or ("127.0.0.1" if config.address is None else None)
    return ClusterTelemetry(config.telemetry, config.model_name, host)


def _near_memory(config: ServeConfig) -> dict[str, float]:
    """Ray resources that bring a worker to a node with a memory tier."""
    return {} if config.memory.tier_resource is None else {config.memory.tier_resource: 0.001}


def _wait_until_running(deadline_s: float) -> None:
    """Raises :class:`StartError` with the workers' reason when the application fails or takes too long."""
    end, messages = time.monotonic() + deadline_s, ""
    while time.monotonic() < end:
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == ApplicationStatus.RUNNING:
                return
            told = [application.message, *(d.message for d in application.deployments.values())]
            messages = "\n".join(text for text in told if text)
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise StartError(_reason(messages))
        time.sleep(POLL_S)
    raise StartError(
        f"the cluster was not ready within {deadline_s:.0f} s (--start-deadline-s). "
        f"{messages or 'Serve gives no reason: see /tmp/ray/session_latest/logs'}"
    )


def _reason(message: str) -> str:
    """The sentence of our own error inside a traceback that Serve hands over as text, else its last line."""
    ours = re.findall(r"forecache\.[\w.]+Error: (.+)", message)
    if ours:
        return str(ours[-1])
    lines = [line for line in message.splitlines() if line.strip()]
    return f"a worker can't be started: {lines[-1] if lines else 'no reason given'}; see /tmp/ray/session_latest/logs"


def run(config: ServeConfig, say: Say, ready: Callable[[Running], None]) -> None:
    """Serve until SIGINT or SIGTERM. ``ready`` is told when requests can come."""
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            hurry.set()  # already on the way out: a second signal must not leave half a cluster
            return
        stop.set()
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        with running(config, say, hurry) as cluster:
            if not stop.is_set():  # where a signal came within a library's callback, nobody saw the exception
                ready(cluster)
            stop.wait()
    except (Stopped, SystemExit):  # SystemExit: a SIGTERM that met Ray's handler, while Ray was starting
        say("stopped")
