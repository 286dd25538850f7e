"""Settings of the engine."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from forecache.workers.decode.messages import Policy

LoadFormat = Literal["auto", "dummy"]


class EngineConfig(BaseModel):
    """One decode worker's engine. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("smollm2-135m", description="built-in name, local Hugging Face directory or hub id")
    load_format: LoadFormat = Field(
        "auto", description="auto: the model's weight files; dummy: random weights of the shape in its config.json"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(
        None, gt=0, description="longest prompt + answer, in tokens; default: the model's"
    )
    keep_ratio: float = Field(0.135, gt=0, le=1, description="resident chunks / all chunks of a sequence")
    policy: Policy = Field("lookahead", description="what chooses the resident set")
    chunk_tokens: int = Field(64, ge=16, le=1024, description="tokens of one chunk")
    window_steps: int = Field(64, ge=1, description="decode steps between two resident sets")
    lead_steps: int = Field(8, ge=0, description="steps before a boundary at which its prediction is asked for")
    late_policy: Literal["keep", "wait"] = Field(
        "keep", description="an answer that is late: keep the old set, or wait"
    )
    hot_bytes: int = Field(1 << 30, gt=0, description="bytes of the hot pool")
    max_batch_size: int = Field(16, ge=1, description="sequences decoded together")
    prefill_chunk_tokens: int = Field(512, ge=16, description="most prompt tokens of one step")
    prefill_slice_s: float = Field(0.25, gt=0, description="target duration of a step beside running streams")
    cuda_graphs: bool = Field(True, description="run decode steps on a GPU as CUDA graphs")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the model; default: all cores, one less where a cluster shares them"
    )
    seed: int = Field(0, description="seed of the random policy and of dummy weights")
