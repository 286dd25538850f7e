"""Settings of what one server takes on: how much a request may be, and how many may wait."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

MAX_HEAD_BYTES = 1 << 20
"""More headers than this are refused before they are complete, whatever the setting."""

DEFAULT_BODY_VALUES = 4_000_000
DEFAULT_PROMPT_PROCESSES = 2

DEFAULT_GRAMMAR_BYTES = 64 << 10
"""The costliest schemas of this size that we found take a worker 2.5 s of one thread, beside its steps."""


class LimitsConfig(BaseModel):
    """How large a request may be, how many may wait, and who may ask."""

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
