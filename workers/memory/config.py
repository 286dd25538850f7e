"""Settings of the memory tier."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from forecache.workers.memory.arena.ledger import PinLimits

Auto = Literal["auto"]
RECORDS_SHARE = 16
"""Memory for index records of other nodes, unless it is set: this fraction of cold memory."""


class MemoryConfig(BaseModel):
    """The memory tier of each node: its arena in shared memory, its disk file and pinned sessions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cold_bytes: Annotated[int, Field(gt=0)] | Auto = Field(
        "auto",
        description="CPU memory for cold chunks on each node; auto: 0.7 of the available memory where models run on "
        "GPUs, 0.5 on CPUs; at most 0.9 of the free room of arena_dir, and 256GiB",
    )
    remote_index_bytes: int | None = Field(
        None,
        ge=0,
        description="CPU memory on each node, in addition to cold_bytes, for index records of running sequences' "
        "chunks on other nodes; 0: every sequence must fit its node; default: a sixteenth of cold_bytes",
    )
    cold_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="format of cold chunks; auto: as in the hot pool; fp8: with a scale per chunk and head"
    )
    arena_dir: Path = Field(Path("/dev/shm"), description="directory of the arena file; must be memory-backed")
    tier_resource: str | None = Field(
        None, description="Ray custom resource of the nodes that run memory tiers and workers; default: all nodes"
    )
    node_resource: str | None = Field(
        None,
        description="Ray custom resource of memory-only nodes; Ray's autoscaler is asked for more of them",
    )
    max_memory_nodes: int = Field(0, ge=0, description="most memory-only nodes to ask Ray's autoscaler for")
    replicas: int = Field(1, ge=1, description="copies of each chunk, on different nodes")
    max_pinned_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="largest share of each node's memory that pinned sessions may occupy",
    )
    max_tenant_pinned_fraction: float = Field(
        0.25,
        ge=0,
        le=1,
        description="largest share of each node's memory that one tenant's pinned sessions may occupy, when API keys "
        "are used",
    )
    disk_bytes: int = Field(
        0, ge=0, description="disk space on each node for chunks that no node has memory for; 0: none"
    )
    disk_dir: Path = Field(Path("/var/tmp"), description="directory of the disk file")
    session_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        description="most bytes for session records in the catalog and in each tier, 16 per chunk; beyond it the "
        "least recently used unpinned sessions are forgotten, their chunks stay",
    )
    fetch_deadline_s: float = Field(
        30.0,
        gt=0,
        description="longest time to fetch a stored prefix from other nodes; chunks that arrived until then are used",
    )
    call_deadline_s: float = Field(10.0, gt=0, description="longest wait for an answer of a memory tier")
    heartbeat_s: float = Field(2.0, gt=0, description="seconds between a tier's heartbeats in the catalog")

    @property
    def pin_limits(self) -> PinLimits:
        return PinLimits(self.max_pinned_fraction, self.max_tenant_pinned_fraction)

    @property
    def cold_size(self) -> int:
        """:attr:`cold_bytes`, which must have been chosen by now."""
        assert self.cold_bytes != "auto", "choose a size first"
        return self.cold_bytes

    @property
    def record_bytes(self) -> int:
        """:attr:`remote_index_bytes`, or its default."""
        return self.cold_size // RECORDS_SHARE if self.remote_index_bytes is None else self.remote_index_bytes
