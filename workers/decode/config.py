"""Settings of the engine."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from forecache.workers.decode.messages import Policy

LoadFormat = Literal["auto", "dummy"]
KvDtype = Literal["auto", "fp8"]


class EngineConfig(BaseModel):
    """One decode worker's engine. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("smollm2-135m", description="built-in name, local Hugging Face directory or hub id")
    load_format: LoadFormat = Field(
        "auto", description="auto: the model's weight files; dummy: random weights of the shape in its config.json"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU")
    kv_dtype: KvDtype = Field(
        "auto", description="K/V in the hot pool: auto: as dtype; fp8: half the bytes, with a scale per chunk and head"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(
        None, gt=0, description="longest prompt + answer, in tokens; default: the model's"
    )
    keep_ratio: float = Field(0.135, gt=0, le=1, description="resident chunks / all chunks of a sequence")
    policy: Policy = Field("lookahead", description="what chooses the resident set")
    chunk_tokens: int = Field(64, ge=16, le=1024, description="tokens of one chunk; DeepSeek-V4's default is 256")
    snapshot_tokens: int = Field(
        4096, ge=16, description="tokens between two stored states of a sequence, of models that have one (DeepSeek-V4)"
    )
    window_steps: int = Field(64, ge=1, description="decode steps between two resident sets")
    lead_steps: int = Field(8, ge=0, description="steps before a boundary at which its prediction is asked for")
    remote_lead_steps: int = Field(
        64, ge=0, description="the same for a sequence that has chunks on other nodes: a window ahead"
    )
    late_policy: Literal["keep", "wait"] = Field(
        "keep", description="an answer that is late: keep the old set, or wait"
    )
    early_wait_s: float = Field(
        0.1, ge=0, description="longest wait for a late set in a sequence's first window, where most answers begin"
    )
    fallback: bool = Field(
        False, description="double a sequence's budget, up to everything, while its coverage is below the floor"
    )
    coverage_floor: float = Field(
        0.5, ge=0, le=1, description="least share of retrieval-event mass that resident chunks should have"
    )
    hot_bytes: int = Field(1 << 30, gt=0, description="bytes of the hot pool")
    max_batch_size: int = Field(16, ge=1, description="sequences decoded together")
    prefill_chunk_tokens: int | None = Field(
        None, ge=16, description="most prompt tokens of one step; default: 8192 on a GPU, 512 on a CPU"
    )
    prefill_slice_s: float | None = Field(
        None, gt=0, description="target duration of a step beside running streams; default: 0.05 on a GPU, else 0.25"
    )
    cuda_graphs: bool | None = Field(
        None,
        description="CUDA graphs of decode steps and of predictions; default: on a GPU, where they can be captured",
    )
    torch_compile: bool = Field(True, description="on a GPU, run decoder layers through torch.compile")
    overlap_steps: bool | None = Field(
        None, description="launch a step before the last one's tokens are read; default: on a GPU"
    )
    max_restarts: int = Field(
        8, ge=0, description="times that a request starts over since stored chunks of it were lost; then it fails"
    )
    step_deadline_s: float = Field(
        120.0,
        gt=0,
        description="longest time without a layer, step or copy done while there is work; then the worker is replaced",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the model; default: all cores, one less where a cluster shares them"
    )
    seed: int = Field(0, description="seed of the random policy and of dummy weights")

    def for_model(self, chunk_tokens: int) -> Self:
        """With the model's own ``chunk_tokens``, where none were set."""
        return (
            self if "chunk_tokens" in self.model_fields_set else self.model_copy(update={"chunk_tokens": chunk_tokens})
        )

    def graph_chunks(self, max_model_len: int) -> int:
        """Chunks of the longest sequence whose predictions are CUDA graphs, where a GPU makes them; 0: of none."""
        return 0 if self.cuda_graphs is False else max_model_len // self.chunk_tokens

    def for_device(self, device: str) -> Self:
        """With the defaults that depend on the ``device`` type, ``cuda`` or ``cpu``, filled in."""
        gpu = device == "cuda"
        defaults = {
            "prefill_chunk_tokens": 8192 if gpu else 512,
            "prefill_slice_s": 0.05 if gpu else 0.25,
            "overlap_steps": gpu,
        }
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})
