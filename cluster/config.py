"""All settings of a served cluster, in one model that is filled from flags or a YAML file."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import SIGN_OF_LIFE_S
from forecache.workers.errors import ForecacheError
from forecache.workers.memory.config import MemoryConfig

DEFAULT_REDIS_BYTES = 512 << 20


_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(value: object) -> object:
    """``"4GiB"``, ``"512 MB"``, ``"1.5gib"`` or ``"1024"`` → bytes. Anything but a string passes through.

    Raises:
        ValueError: the string is not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


MAX_HEAD_BYTES = 1 << 20
"""The HTTP server refuses longer headers before they are complete, whatever the setting."""

DEFAULT_BODY_VALUES = 4_000_000
DEFAULT_PROMPT_PROCESSES = 2

DEFAULT_GRAMMAR_BYTES = 64 << 10
"""The costliest schemas of this size that we found take a worker 2.5 s on one thread, while its steps go on."""


class LimitsConfig(BaseModel):
    """How large a request may be, how many may wait, and which clients are allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_keys_file: Path | None = Field(
        None,
        description="YAML file of hashed API keys and their tenants (see `forecache keys new`); default: no keys "
        "needed",
    )
    max_queued_requests: int = Field(
        256, ge=1, description="most requests that wait for their first token; further ones get 429"
    )
    max_queued_tokens: int = Field(
        8_000_000,
        ge=1,
        description="most prompt tokens that wait for their first token; when nothing waits, a prompt of any length "
        "is admitted",
    )
    max_body_bytes: int = Field(64 << 20, ge=1024, description="longest request body")
    max_body_values: int = Field(
        DEFAULT_BODY_VALUES,
        ge=1024,
        description="most JSON values in a request body; each token id is one, each message has three or more",
    )
    max_grammar_bytes: int = Field(
        DEFAULT_GRAMMAR_BYTES,
        ge=1024,
        description="longest JSON schema of a response format, or of all tools of a request together",
    )
    max_bodies_bytes: int = Field(
        512 << 20,
        ge=1024,
        description="most bytes of request bodies that an ingress receives and parses at once; one tenant gets half "
        "of them",
    )
    prompt_processes: int = Field(
        DEFAULT_PROMPT_PROCESSES,
        ge=1,
        description="most processes per ingress that parse and tokenize bodies over 16 KiB; each starts when first "
        "needed, and one is reserved for bodies of at most 512 KiB",
    )
    max_header_bytes: int = Field(
        16 << 10, ge=1024, le=MAX_HEAD_BYTES, description="longest path and headers of a request together"
    )
    header_deadline_s: int = Field(
        75,
        ge=1,
        description="longest time for a client to send its headers; also how long an idle connection is kept",
    )
    body_deadline_s: float = Field(60.0, gt=0, description="longest time for a client to send its body")
    request_timeout_s: float | None = Field(
        None, gt=0, description="longest time of any request, even if it asks for a longer timeout_s; default: no limit"
    )
    drain_deadline_s: float = Field(
        30.0,
        ge=0,
        description="longest wait for running requests after SIGTERM or SIGINT; a second signal ends the wait",
    )


class TelemetryConfig(BaseModel):
    """Logs, metrics and traces of every process in the cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_format: Literal["text", "json"] = Field(
        "text", description="json: one JSON object per line, with the request's id, in every process"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning",
        description="lowest level that is logged; info logs one line for each request in each process it passes",
    )
    metrics_host: str | None = Field(
        None,
        description="address on which every process serves its /metrics; default: 127.0.0.1 if Ray is started on "
        "this machine, else the node's address",
    )
    metrics_first_port: int = Field(0, ge=0, le=65535, description="first port for /metrics; 0: any free port")
    metrics_ports: int = Field(
        64, ge=1, description="number of ports, from --metrics-first-port on, that the processes of a node may use"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector that receives a trace of each request, such as http://127.0.0.1:4318 "
        "(needs the extra `otlp`); default: no traces",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metrics_first_port and self.metrics_first_port + self.metrics_ports > 65536:
            raise ValueError("metrics_first_port + metrics_ports must be 65536 at most")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint must begin with http:// or https://, got {self.otlp_endpoint!r}")
        return self


class ResumeConfig(BaseModel):
    """When a running request fails over to another worker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_deadline_s: float = Field(
        130.0,
        gt=0,
        description="longest silence of a worker about a request it has; then another worker continues the request; "
        f"at least {SIGN_OF_LIFE_S:g} s more than --step-deadline-s",
    )
    resume_attempts: int = Field(
        8, ge=0, description="most workers to try in a row without receiving a token; then the request fails"
    )
    max_silent_workers: int = Field(
        3,
        ge=1,
        description="most workers that may hang on one request; then the request fails, since it may be the cause",
    )
    max_resumes: int = Field(32, ge=0, description="most failovers of one request in total; then the request fails")
    replacement_deadline_s: float = Field(
        600.0, gt=0, description="longest wait of a request while no worker runs; then it fails"
    )


_FLAGS = {("indexer", "checkpoint"): "--indexer", ("indexer", "num_indexers"): "--num-indexers"}
"""Flags whose names differ from their settings'."""


class ConfigError(ForecacheError):
    """A setting is wrong; the message names its flag."""


Size = Annotated[int, BeforeValidator(parse_bytes)]


class ServeConfig(BaseModel):
    """The settings of ``forecache serve``. Times are in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    memory: MemoryConfig = Field(default_factory=lambda: MemoryConfig())
    selection: SelectionConfig = Field(default_factory=lambda: SelectionConfig())
    indexer: IndexerConfig = Field(default_factory=lambda: IndexerConfig())
    limits: LimitsConfig = Field(default_factory=lambda: LimitsConfig())

    resume: ResumeConfig = Field(default_factory=lambda: ResumeConfig())
    telemetry: TelemetryConfig = Field(default_factory=lambda: TelemetryConfig())

    host: str = Field("127.0.0.1", description="address the HTTP server listens on")
    port: int = Field(8000, ge=0, le=65535, description="port of the HTTP server; 0 picks a free one")
    served_model_name: str | None = Field(
        None, description="model name in requests and metrics; default: the name of --model"
    )
    workers: int = Field(1, ge=1, description="decode workers (Ray Serve replicas); each loads the model")
    proxy_location: Literal["EveryNode", "HeadOnly"] = Field(
        "EveryNode",
        description="EveryNode: each node with a worker or an ingress listens for HTTP; HeadOnly: the Ray head alone "
        "does",
    )
    ingresses: int | None = Field(
        None,
        ge=1,
        description="ingress processes, which handle HTTP requests, spread over the nodes; default: 1 on one "
        "machine; with --address, as many as workers, from 2 to 8",
    )
    ingress_resource: str | None = Field(
        None, description="Ray custom resource of the nodes that run an ingress, one each; default: any node"
    )
    address: str | None = Field(None, description="Ray cluster to join; default: start Ray on this machine")
    redis_url: str | None = Field(
        None,
        repr=False,
        description="your own Redis for the catalog of stored chunks; default: start an embedded server",
    )
    redis_bytes: Size = Field(
        DEFAULT_REDIS_BYTES,
        ge=32 << 20,
        description="memory limit of the embedded Redis, at least four times --session-bytes; a full Redis forgets "
        "the locations of the least recently used chunks",
    )
    ray_num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of the Ray that is started on this machine; default: workers + 1"
    )
    object_store_bytes: Size = Field(
        128 << 20, ge=80 << 20, description="size of Ray's object store, when Ray is started on this machine"
    )
    router: Literal["prefix", "power-of-two"] = Field(
        "prefix",
        description="prefix: the worker with the earliest expected first token; power-of-two: the less loaded of two "
        "random workers",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="most requests that one worker accepts, running and waiting"
    )
    start_deadline_s: float = Field(900.0, gt=0, description="longest wait until the cluster is ready")
    stop_deadline_s: float = Field(20.0, gt=0, description="longest wait for running requests and actors at shutdown")

    @model_validator(mode="after")
    def _signs_of_life(self) -> Self:
        """A healthy worker must never look silent: it may go ``step_deadline_s`` without progress, and reports progress
        every ``SIGN_OF_LIFE_S``; requests without a worker get a report as often."""
        step_s, least_s = self.engine.step_deadline_s, 3 * SIGN_OF_LIFE_S
        if self.resume.token_deadline_s < max(least_s, step_s + SIGN_OF_LIFE_S):
            raise ValueError(
                f"--token-deadline-s {self.resume.token_deadline_s:g} is too short: it must be at least {least_s:g}, "
                f"and "
                f"at least {SIGN_OF_LIFE_S:g} more than --step-deadline-s {step_s:g}, since a worker may go so long "
                f"without progress and reports progress every {SIGN_OF_LIFE_S:g} s"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        """Accept text such as ``4GiB`` for every ``*_bytes`` setting of the sections."""
        if not isinstance(values, dict):
            return values
        return {
            name: {k: parse_bytes(v) if str(k).endswith("_bytes") and v != "auto" else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in values.items()
        }

    @model_validator(mode="after")
    def _sessions_fit(self) -> Self:
        if self.redis_url is None and self.redis_bytes < 4 * self.memory.session_bytes:
            raise ValueError(
                f"--session-bytes {self.memory.session_bytes} is more than a quarter of --redis-bytes "
                f"{self.redis_bytes}: lower --session-bytes or raise --redis-bytes"
            )
        return self

    @property
    def ingress_replicas(self) -> int:
        """:attr:`ingresses`, or its default. With several, an ingress that dies ends only its own streams."""
        if self.ingresses is not None:
            return self.ingresses
        return 1 if self.address is None else min(max(self.workers, 2), 8)

    @property
    def model_name(self) -> str:
        """The model's name in requests and metrics."""
        if self.served_model_name is not None:
            return self.served_model_name
        from forecache.workers.models.loader import model_name  # imports transformers, which takes seconds

        return model_name(self.engine.model)


def settings() -> Iterator[tuple[str, tuple[str, ...], FieldInfo]]:
    """(flag, path in ServeConfig, field) of every setting; flags of the indexer have the prefix ``indexer-``."""
    for name, field in ServeConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            prefix = "indexer-" if name == "indexer" else ""
            for inner, inner_field in field.annotation.model_fields.items():
                flag = _FLAGS.get((name, inner), f"--{prefix}{inner.replace('_', '-')}")
                yield flag, (name, inner), inner_field
        else:
            yield f"--{name.replace('_', '-')}", (name,), field


def _choices(field: FieldInfo) -> list[str] | None:
    return list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None


def _default_text(field: FieldInfo, path: tuple[str, ...]) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return ""
    if path[-1].endswith("_bytes") and default != "auto" and default % 2**20 == 0:
        return f" (default: {default >> 30}GiB)" if default % 2**30 == 0 else f" (default: {default >> 20}MiB)"
    return f" (default: {default:.4g})" if isinstance(default, float) else f" (default: {default})"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting, with its description and default, and ``--config FILE``."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings, by section; flags win over it"
    )
    for flag, path, field in settings():
        choices = _choices(field)
        parser.add_argument(
            flag,
            dest=".".join(path),
            default=argparse.SUPPRESS,
            choices=choices,
            metavar=None if choices else path[-1].rsplit("_", 1)[-1].upper(),
            help=f"{field.description or ''}{_default_text(field, path)}".replace("%", "%%"),
        )


def config_from_args(args: argparse.Namespace) -> ServeConfig:
    """The settings of the parsed flags, which override those of the file ``--config``.

    Raises:
        ConfigError: the file can't be read, or a setting is unknown or out of range.
    """
    values = read_yaml(args.config) if getattr(args, "config", None) else {}
    for _, path, _ in settings():
        given = getattr(args, ".".join(path), None)
        if given is None:
            continue
        section = values.setdefault(path[0], {}) if len(path) == 2 else values
        if not isinstance(section, dict):
            raise ConfigError(f"{args.config}: {path[0]} must be a section of settings, got {section!r}")
        section[path[-1]] = given
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: the file can't be read, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the settings file {file} can't be read: {yaml_fault(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the settings file {file} must hold a mapping, such as `port: 8000`, not {values!r}")
    for name in values:
        if not isinstance(name, str):
            raise ConfigError(f"the settings file {file}: there is no setting named {name!r}")
    return values


def yaml_fault(error: Exception) -> str:
    """Why a YAML file can't be read, in one line."""
    match error:
        case OSError():
            return error.strerror or str(error)
        case yaml.MarkedYAMLError(problem=str(problem), problem_mark=yaml.Mark() as mark):
            return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"
        case RecursionError():
            return "it is nested too deep"
    return " ".join(str(error).split())


def sentence(error: ValidationError) -> str:
    """The first wrong setting, with the flag to change."""
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    flags = {setting: flag for flag, setting, _ in settings()}
    # behind a setting of several types comes the type that was tried
    name = flags.get(path) or flags.get(path[:2]) or ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"there is no setting named {name}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {first['input']!r})" if name else message
