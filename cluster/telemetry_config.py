"""Settings of what every process tells its operator."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
