"""Settings of prediction and selection."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SelectionConfig(BaseModel):
    """How scores become a resident set (design §5.5, §6)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sink_chunks: int = Field(1, ge=0, description="first chunks that are always resident")
    recency_fraction: float = Field(1 / 3, ge=0, le=1, description="share of the budget for the last chunks")
    min_chunks: int = Field(8, ge=1, description="smallest budget of a sequence, in chunks")


class IndexerConfig(BaseModel):
    """The Memory Indexer.

    ``checkpoint`` is the flag ``--indexer``. A checkpoint brings its retrieval heads; a ``manifest`` that is named goes
    before one that only came with the package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(
        "auto", description="path of a trained indexer; auto: the model's, if one came along; none: training-free"
    )
    manifest: str = Field("auto", description="path of a retrieval-head manifest; auto: by model; none: bounds")
    threshold: Literal["fixed", "adaptive"] = Field(
        "fixed", description="DeepSeek-V4: what an entry must score to count: a fixed score, or to be among the best"
    )
    entry_threshold: float = Field(0.5, gt=0, lt=1, description="DeepSeek-V4: the fixed score, of 0 to 1")
    num_indexers: int = Field(1, ge=1, description="indexer actors of a node, which share its sequences")
    deadline_s: float = Field(
        2.0, gt=0, description="longest wait for an indexer actor, before the worker scores by itself"
    )
    threads: int = Field(1, ge=1, description="CPU threads of predictions that are made on the CPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="makes predictions; auto: where the model is")
    device_bytes: int = Field(2 << 30, ge=0, description="most GPU memory for index keys; 0: read from host memory")

    def device_type(self, model: str) -> str:
        """Type of the device that makes predictions for a model on a device of type ``model``."""
        return model if self.device == "auto" else self.device
