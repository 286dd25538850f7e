"""The application for Ray Serve's own tools (`serve deploy`, KubeRay's RayService), where no starter process stays."""

from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application

from forecache.cluster.config import ConfigError, ServeConfig, read_yaml, sentence
from forecache.cluster.http.ingress import Ingress
from forecache.cluster.launch import machine, preflight
from forecache.cluster.launch.cluster import NAMESPACE, application, cluster_telemetry
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.observe import tracing
from forecache.cluster.tenants import Tenants
from forecache.cluster.tiers import Tiers
from forecache.workers.core.config import WorkerSettings
from forecache.workers.models.loader import resolve_model

NOT_SERVES_TO_SAY = ("host", "port", "proxy_location", "address")
"""Settings that the Serve config or the running Ray cluster decides here."""


class Arguments(BaseModel):
    """``args`` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: list[Path] = Field(min_length=1)
    """Files as for ``forecache serve --config``. Top-level keys of later files win, so secrets can have their own
    file."""


class SupervisedIngress(Ingress):
    """An ingress that also runs the supervisor, which `forecache serve` runs in the starter. With several ingresses
    each runs one; a supervisor finds the tiers that another has started."""

    def __init__(self, config: ServeConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self._supervised = ExitStack()
        self._supervised.enter_context(Supervisor(config.memory, self._tiers))

    def __del__(self) -> None:
        """Serve calls it when the replica stops. The tiers stay: the next replica supervises them."""
        if hasattr(self, "_supervised"):
            self._supervised.close()


def read_config(files: list[Path]) -> ServeConfig:
    """The settings of ``files`` for a running Ray cluster.

    Raises:
        ConfigError: a file can't be read, or a setting is unknown, out of range, or decided elsewhere.
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= read_yaml(file)
    if decided_elsewhere := [name for name in NOT_SERVES_TO_SAY if name in values]:
        raise ConfigError(
            f"{', '.join(decided_elsewhere)}: leave out, since the Serve config or the Ray cluster decides that here"
        )
    try:
        config = ServeConfig.model_validate(values | {"address": "auto"})
    except ValidationError as error:
        raise ConfigError(sentence(error)) from error
    if config.redis_url is None:
        raise ConfigError("redis_url: required here, since no process stays to run an embedded Redis")
    if config.engine.device == "auto":
        raise ConfigError(
            "engine.device: write cuda or cpu, since the node that builds the application may have no GPU"
        )
    return config


def build(arguments: Arguments) -> Application:
    """The application for a Serve config: ``import_path: forecache.cluster.launch.serve_app:build``, name `forecache`.

    Equal settings give equal names of memory tiers, so a second deployment on the same Ray cluster finds the tiers of
    the first. Deploy other settings on another Ray cluster: the first tiers keep their memory until theirs ends.

    Raises:
        ForecacheError: it can't start; the message says what to change.
    """
    config = read_config(arguments.config)
    tracing.check_installed(config.telemetry.otlp_endpoint)
    path = resolve_model(config.engine.model, load_format=config.engine.load_format)
    config = preflight.settle(path, config)
    assert config.redis_url is not None  # read_config checked it
    machine.check_redis(config.redis_url)
    model = preflight.check_model(path, config)
    preflight.check_tokenizer(path)
    tenants = Tenants.load(config.limits.api_keys_file)
    run = blake2b(config.model_dump_json().encode(), digest_size=6).hexdigest()
    tiers = Tiers(NAMESPACE, run, config.redis_url, config.memory.call_deadline_s)
    settings = WorkerSettings(
        engine=config.engine, memory=config.memory, selection=config.selection, indexer=config.indexer,
        namespace=NAMESPACE, run=run, redis_url=config.redis_url, telemetry=cluster_telemetry(config),
        workers=config.workers,
    )  # fmt: skip
    return application(config, model, tenants, tiers, settings, SupervisedIngress)
