"""Settings of prediction and selection."""

from pydantic import BaseModel, ConfigDict, Field


class SelectionConfig(BaseModel):
    """How scores become a resident set (design §5.5, §6)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sink_chunks: int = Field(1, ge=0, description="first chunks that are always resident")
    recency_fraction: float = Field(1 / 3, ge=0, le=1, description="share of the budget for the last chunks")
    min_chunks: int = Field(8, ge=1, description="smallest budget of a sequence, in chunks")


class IndexerConfig(BaseModel):
    """The Memory Indexer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: str = Field("auto", description="path of a retrieval-head manifest; auto: by model; none: bounds")
    threads: int = Field(1, ge=1, description="CPU threads of the indexer actor")
