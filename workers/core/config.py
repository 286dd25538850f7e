"""Settings of a worker: those of its engine, and what it gets besides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.telemetry import SILENCE, Telemetry
from forecache.workers.core.requests import Policy
from forecache.workers.memory.config import Auto, MemoryConfig

LoadFormat = Literal["auto", "dummy"]
KvDtype = Literal["auto", "fp8"]
GPU_BATCH_SIZE, CPU_BATCH_SIZE = 256, 16


class EngineConfig(BaseModel):
    """The engine of one decode worker: model, resident sets, batching."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("smollm2-135m", description="built-in name, local Hugging Face directory, .gguf file or hub id")
    load_format: LoadFormat = Field(
        "auto",
        description="auto: load the model's weight files; dummy: random weights in the shape of its config.json, for "
        "measurements",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    kv_dtype: KvDtype = Field(
        "auto",
        description="K/V in the hot pool; auto: as dtype; fp8: half the bytes of bfloat16, with a scale per chunk "
        "and head",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(
        None, gt=0, description="most tokens of prompt and answer together; default: the model's limit"
    )
    keep_ratio: float = Field(
        0.135,
        gt=0,
        le=1,
        description="share of a sequence's chunks that is resident during decode; 1: all, which is exact",
    )
    min_resident_tokens: int = Field(
        2048,
        ge=0,
        description="tokens that stay resident whatever the keep ratio, as far as the hot pool holds them: contexts up "
        "to it are attended whole, which is exact; 0: the keep ratio alone decides",
    )
    policy: Policy = Field(
        "lookahead",
        description="how resident chunks are chosen; full attends to every chunk and is exact; recency and random "
        "are baselines",
    )
    chunk_tokens: int = Field(64, ge=16, le=1024, description="tokens per chunk; DeepSeek-V4's default is 256")
    snapshot_tokens: int = Field(
        4096,
        ge=16,
        description="tokens between two stored snapshots of a sequence's state, for models that have one (DeepSeek-V4)",
    )
    window_steps: int = Field(64, ge=1, description="decode steps between two resident sets")
    lead_steps: int = Field(8, ge=0, description="steps before a window boundary at which the prediction for it starts")
    remote_lead_steps: int = Field(64, ge=0, description="the same for sequences with chunks on other nodes")
    late_policy: Literal["keep", "wait"] = Field(
        "keep", description="when a prediction is late at its boundary: keep the old resident set, or wait"
    )
    early_wait_s: float = Field(
        0.1, ge=0, description="longest wait for a late prediction in a sequence's first window"
    )
    fallback: bool = Field(
        False, description="double a sequence's budget, up to all chunks, while its coverage is below --coverage-floor"
    )
    coverage_floor: float = Field(
        0.5,
        ge=0,
        le=1,
        description="lowest coverage (share of retrieval-event mass on resident chunks) that --fallback accepts",
    )
    hot_bytes: Annotated[int, Field(gt=0)] | Auto = Field(
        "auto",
        description="size of one worker's hot pool on its device; auto: on a GPU what gpu_memory_utilization leaves "
        "after weights, activations and CUDA graphs; on a CPU half of the memory that weights and cold memory leave",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the GPU's whole memory that one worker may use, when hot_bytes is auto",
    )
    max_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto",
        description="most sequences decoded together; auto: 256 on a GPU, 16 on a CPU, fewer if memory holds fewer",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=16,
        description="most tokens per step: one for each decoding request, then prompt tokens (at least 16, where any "
        "are left); default: 8192 on a GPU, 512 on a CPU",
    )
    inter_token_target_s: float | None = Field(
        None,
        gt=0,
        description="target duration of a step with prompt tokens while other requests decode; exceeded where a "
        "shorter step would mostly be fixed cost; default: 0.1 on a GPU, 0.25 on a CPU",
    )
    max_long_partial_prefills: int = Field(
        1, ge=1, description="most long prompts that advance at once; shorter ones pass those that wait"
    )
    long_prefill_token_threshold: int | None = Field(
        None,
        ge=1,
        description="a prompt is long while it has more tokens left to compute; default: max_step_tokens",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="capture decode steps and predictions as CUDA graphs; default: on a GPU, where they can be "
        "captured",
    )
    torch_compile: bool = Field(True, description="compile decoder layers with torch.compile on a GPU")
    overlap_steps: bool | None = Field(
        None, description="launch a decode step before the previous step's tokens are read; default: on a GPU"
    )
    max_restarts: int = Field(
        8, ge=0, description="most times that a request starts over because its stored chunks were lost; then it fails"
    )
    step_deadline_s: float = Field(
        120.0,
        gt=0,
        description="longest time without progress (a layer, a step or a copy) while there is work; then the worker "
        "is replaced",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the model; default: all cores, or one less in a cluster"
    )
    seed: int = Field(0, description="seed of the random policy and of dummy weights")

    def for_model(self, chunk_tokens: int) -> Self:
        """With the model's default ``chunk_tokens``, unless they were set."""
        return (
            self if "chunk_tokens" in self.model_fields_set else self.model_copy(update={"chunk_tokens": chunk_tokens})
        )

    def graph_chunks(self, max_model_len: int) -> int:
        """Chunks of the longest sequence whose predictions are captured as CUDA graphs; 0: none are."""
        return 0 if self.cuda_graphs is False else max_model_len // self.chunk_tokens

    def for_device(self, device: str) -> Self:
        """With the defaults that depend on the device type, ``cuda`` or ``cpu``."""
        gpu = device == "cuda"
        defaults = {
            "max_step_tokens": 8192 if gpu else 512,
            "inter_token_target_s": 0.1 if gpu else 0.25,
            "overlap_steps": gpu,
            "max_batch_size": GPU_BATCH_SIZE if gpu else CPU_BATCH_SIZE,
        }
        unset = (None, "auto")
        update = {name: value for name, value in defaults.items() if getattr(self, name) in unset}
        made = self.model_copy(update=update)
        if made.long_prefill_token_threshold is None:
            made = made.model_copy(update={"long_prefill_token_threshold": made.max_step_tokens})
        return made

    def contexts_bytes(self, max_model_len: int, chunk_bytes: int) -> int:
        """Bytes that the longest contexts of two batches take: one runs, one is kept for reuse. More memory than that
        is not chosen for ``hot_bytes: auto`` and ``cold_bytes: auto``."""
        chunks = max_model_len // self.chunk_tokens + 2
        return 2 * self.batch_size * chunks * chunk_bytes

    @property
    def batch_size(self) -> int:
        """:attr:`max_batch_size`, which must have been chosen by now."""
        assert self.max_batch_size != "auto", "call for_device first"
        return self.max_batch_size


@dataclass(frozen=True)
class WorkerSettings:
    """Everything a worker needs to start.

    Attributes:
        namespace: Ray namespace of the cluster's actors.
        run: identifies this start of the cluster; part of the names of its actors and arenas.
        redis_url: where memory tiers find each other's chunks; ``None``: on one node only.
        workers: workers of the cluster at most.
    """

    engine: EngineConfig
    memory: MemoryConfig
    selection: SelectionConfig
    indexer: IndexerConfig
    namespace: str
    run: str
    redis_url: str | None = field(default=None, repr=False)
    telemetry: Telemetry = SILENCE
    workers: int = 1

    def sharers(self, node: Mapping[str, Any]) -> int:
        """Workers that may share ``node``, an entry of ``ray.nodes()``."""
        places = int(node["Resources"].get("GPU" if self.num_gpus else "CPU", 1))
        return max(min(self.workers, places), 1)

    def actor_name(self, kind: str, node_id: str) -> str:
        """Name of a node's ``kind`` actor ("tier", "indexer0", …), and of the tier's arena."""
        return actor_name(self.run, kind, node_id)

    @property
    def num_gpus(self) -> int:
        """GPUs that Ray reserves for each worker."""
        return gpus_of_worker(self.engine.device)


def gpus_of_worker(device: str) -> int:
    """GPUs that a worker with this ``device`` setting uses, on a machine like this one."""
    import torch  # takes seconds, and commands that only read settings don't need it

    return int(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def actor_name(run: str, kind: str, node_id: str) -> str:
    """Name of a node's ``kind`` actor in the cluster that was started as ``run``."""
    return f"{run}-{kind}-{node_id[:16]}"
