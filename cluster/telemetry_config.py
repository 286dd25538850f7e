"""Settings of what every process tells its operator."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TelemetryConfig(BaseModel):
    """Logs, metrics and traces, of all processes of a cluster alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_format: Literal["text", "json"] = Field(
        "text", description="json: one object a line, with the request's id, from HTTP to memory tier"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="least level that is logged; info has a line for each request and process it passes"
    )
    metrics_host: str | None = Field(
        None,
        description="where every process serves its /metrics; default: its node's address, or 127.0.0.1 "
        "where Ray is started here",
    )
    metrics_first_port: int = Field(
        0, ge=0, le=65535, description="first port for them, for firewalls; 0: any that is free"
    )
    metrics_ports: int = Field(64, ge=1, description="how many ports, from the first one, a node's processes may take")
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector, such as http://127.0.0.1:4318, that gets a trace of each request (needs "
        "the extra `otlp`); default: no traces",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metrics_first_port and self.metrics_first_port + self.metrics_ports > 65536:
            raise ValueError("metrics_first_port + metrics_ports must be 65536 at most")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint must begin with http:// or https://, got {self.otlp_endpoint!r}")
        return self
