"""Settings of the memory tier."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MemoryConfig(BaseModel):
    """Cold memory of one node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cold_bytes: int = Field(4 << 30, gt=0, description="bytes of CPU memory for cold chunks on each node")
    cold_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="format of cold chunks: as in the hot pool, or fp8 with a scale per chunk and head"
    )
    arena_dir: Path = Field(Path("/dev/shm"), description="directory of the arena file; must be memory-backed")
    call_deadline_s: float = Field(10.0, gt=0, description="longest wait for an answer of a memory tier")
    heartbeat_s: float = Field(2.0, gt=0, description="seconds between a tier's signs of life in the catalog")
