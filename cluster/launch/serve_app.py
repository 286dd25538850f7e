"""The application as Ray Serve's own tools start it (`serve deploy`, KubeRay's RayService): no starter stays."""

from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application

from forecache.cluster.config import ConfigError, ServeConfig, read_yaml, sentence
from forecache.cluster.http.ingress import Ingress
from forecache.cluster.http.tenants import Tenants
from forecache.cluster.launch import machine, preflight
from forecache.cluster.launch.cluster import NAMESPACE, application, cluster_telemetry
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.observe import tracing
from forecache.cluster.tiers import Tiers
from forecache.workers.core.settings import WorkerSettings
from forecache.workers.models.loader import resolve_model

NOT_SERVES_TO_SAY = ("host", "port", "proxy_location", "address")
"""Settings that in this way of starting are those of the Serve config, or of the Ray cluster that is there."""


class Arguments(BaseModel):
    """``args`` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: list[Path] = Field(min_length=1)
    """Files as for ``forecache serve --config``; top-level keys of later ones win, so that secrets have their own."""


class SupervisedIngress(Ingress):
    """The ingress, and beside it the thread that `forecache serve` has in its own process: of several ingresses each
    has one. What one has started the others find."""

    def __init__(self, config: ServeConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self._supervised = ExitStack()
        self._supervised.enter_context(Supervisor(config.memory, self._tiers))

    def __del__(self) -> None:
        """Serve calls it when the replica stops. The tiers stay: the next replica looks after them."""
        if hasattr(self, "_supervised"):
            self._supervised.close()


def read_config(files: list[Path]) -> ServeConfig:
    """The settings of ``files`` for a cluster that is there.

    Raises:
        ConfigError: a file can't be read, or a setting is unknown, out of range, or not this program's to choose.
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= read_yaml(file)
    if mine := [name for name in NOT_SERVES_TO_SAY if name in values]:
        raise ConfigError(f"{', '.join(mine)}: here the Serve config or the Ray cluster says that, not these settings")
    try:
        config = ServeConfig.model_validate(values | {"address": "auto"})
    except ValidationError as error:
        raise ConfigError(sentence(error)) from error
    if config.redis_url is None:
        raise ConfigError("redis_url: needed here, since nobody stays to keep an embedded Redis")
    if config.engine.device == "auto":
        raise ConfigError("engine.device: write cuda or cpu; the node that builds the application is not the workers'")
    return config


def build(arguments: Arguments) -> Application:
    """The application for a Serve config: ``import_path: forecache.cluster.launch.serve_app:build``, name `forecache`.

    Equal settings give equal names of memory tiers, so that a second deployment on the same Ray cluster finds the
    first one's. Other settings belong on another Ray cluster: the tiers of the first hold its memory until it ends.

    Raises:
        ForecacheError: it can't be started; the message says what to change.
    """
    config = read_config(arguments.config)
    tracing.check_installed(config.telemetry.otlp_endpoint)
    path = resolve_model(config.engine.model, load_format=config.engine.load_format)
    config = preflight.settle(path, config)
    assert config.redis_url is not None  # read_config saw to it
    machine.check_redis(config.redis_url)
    model = preflight.check_model(path, config)
    preflight.check_tokenizer(path)
    tenants = Tenants.load(config.limits.api_keys_file)
    run = blake2b(config.model_dump_json().encode(), digest_size=6).hexdigest()
    tiers = Tiers(NAMESPACE, run, config.redis_url, config.memory.call_deadline_s)
    settings = WorkerSettings(
        engine=config.engine, memory=config.memory, selection=config.selection, indexer=config.indexer,
        namespace=NAMESPACE, run=run, redis_url=config.redis_url, telemetry=cluster_telemetry(config),
    )  # fmt: skip
    return application(config, model, tenants, tiers, settings, SupervisedIngress)
