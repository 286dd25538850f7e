"""Settings of the memory tier."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from forecache.workers.memory.pins import PinLimits


class MemoryConfig(BaseModel):
    """Cold memory of one node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cold_bytes: int = Field(4 << 30, gt=0, description="bytes of CPU memory for cold chunks on each node")
    remote_index_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes on each node, beside cold_bytes, for index records of chunks that running sequences have on "
        "other nodes; 0: a sequence must fit its node; default: a sixteenth of cold_bytes",
    )
    cold_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="format of cold chunks: as in the hot pool, or fp8 with a scale per chunk and head"
    )
    arena_dir: Path = Field(Path("/dev/shm"), description="directory of the arena file; must be memory-backed")
    tier_resource: str | None = Field(
        None, description="Ray custom resource of the nodes that give memory, and get workers; default: all nodes"
    )
    node_resource: str | None = Field(
        None,
        description="Ray custom resource of nodes that give memory alone; Ray's autoscaler is asked for more of them",
    )
    max_memory_nodes: int = Field(0, ge=0, description="most of those to ask for, as requests hold what tiers have")
    replicas: int = Field(1, ge=1, description="copies of each chunk, on different nodes")
    max_pinned_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="largest part of each node's memory that pinned sessions may keep; the rest always serves requests",
    )
    max_tenant_pinned_fraction: float = Field(
        0.25,
        ge=0,
        le=1,
        description="largest part of it that one tenant may keep so, where API keys are asked for",
    )
    disk_bytes: int = Field(
        0, ge=0, description="bytes of disk on each node for cold chunks that no node has memory for; 0: none"
    )
    disk_dir: Path = Field(Path("/var/tmp"), description="directory of the file on disk")
    session_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        description="most bytes that are kept of sessions, 16 for each of their chunks, in the catalog and by each "
        "tier; those that are not pinned and were used longest ago are forgotten, their chunks stay",
    )
    fetch_deadline_s: float = Field(
        30.0, gt=0, description="longest time to bring a stored prefix from other nodes; what came until then is used"
    )
    call_deadline_s: float = Field(10.0, gt=0, description="longest wait for an answer of a memory tier")
    heartbeat_s: float = Field(2.0, gt=0, description="seconds between a tier's signs of life in the catalog")

    @property
    def pin_limits(self) -> PinLimits:
        return PinLimits(self.max_pinned_fraction, self.max_tenant_pinned_fraction)

    @property
    def record_bytes(self) -> int:
        """:attr:`remote_index_bytes`, or its default."""
        return self.cold_bytes // 16 if self.remote_index_bytes is None else self.remote_index_bytes
