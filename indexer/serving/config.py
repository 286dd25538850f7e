"""Settings of prediction and selection."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SelectionConfig(BaseModel):
    """How the scores of chunks become a resident set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sink_chunks: int = Field(1, ge=0, description="number of first chunks that are always resident")
    recency_fraction: float = Field(
        1 / 3, ge=0, le=1, description="share of the budget reserved for the most recent chunks"
    )
    min_chunks: int = Field(8, ge=1, description="smallest budget of a sequence, in chunks")


class IndexerConfig(BaseModel):
    """The indexer, which predicts the chunks that the next tokens attend to.

    ``checkpoint`` is the flag ``--indexer``. A checkpoint contains its own retrieval heads. A ``manifest`` that the
    user names takes precedence over a checkpoint that was shipped with the package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(
        "auto",
        description="path of a trained indexer; auto: the one shipped for the model, if there is one; none: no "
        "trained indexer",
    )
    manifest: str = Field(
        "auto",
        description="path of a manifest of retrieval heads; auto: the one shipped for the model; none: score by "
        "min-max bounds per chunk",
    )
    threshold: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="DeepSeek-V4, when an entry counts for its chunk: fixed: its score exceeds "
        "--indexer-entry-threshold; adaptive: it is among the index_topk best",
    )
    entry_threshold: float = Field(
        0.5, gt=0, lt=1, description="DeepSeek-V4: the score of --indexer-threshold fixed, between 0 and 1"
    )
    num_indexers: int = Field(1, ge=1, description="indexer actors per node, which share the node's sequences")
    deadline_s: float = Field(
        2.0, gt=0, description="longest wait for an indexer actor; then the worker scores in its own process"
    )
    threads: int = Field(1, ge=1, description="CPU threads for predictions on the CPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device for predictions; auto: the model's")
    device_bytes: int = Field(
        2 << 30, ge=0, description="most GPU memory for index keys; 0: read them from host memory"
    )

    def device_type(self, model: str) -> str:
        """Type of the device that makes predictions for a model on a device of type ``model``."""
        return model if self.device == "auto" else self.device
