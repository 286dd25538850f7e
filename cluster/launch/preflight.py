"""Checks before the start: whether model, settings and machine fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.launch import machine
from forecache.indexer.records.manifest import ManifestError
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.arena.cold_size import auto_cold_bytes, cold_share

if TYPE_CHECKING:
    from forecache.indexer.records.index_spec import IndexSpec
    from forecache.workers.memory.format.layout import ChunkLayout
    from forecache.workers.models.step.architecture import ExpectedScorer

WORKER_BYTES = 1 << 30
"""Memory of a worker besides weights and chunks: PyTorch, the tokenizer, code."""
NO_MANIFEST = (
    "{0} has no manifest of retrieval heads: forecache chooses its chunks by bounds, which finds much less. "
    "Make one with `forecache indexer calibrate --model {0} --out FILE`, and serve with --indexer-manifest FILE."
)
NO_CHECKPOINT = (
    "--indexer {0} is missing, damaged or not for {1}: forecache scores chunks without a trained indexer. "
    "The worker's log has the reason; `forecache indexer train` trains one."
)
COLD_LIMIT = "cold memory limits prompt and answer to {} tokens together: raise --cold-bytes for more."


def check(config: ServeConfig) -> None:
    """All checks that need no model.

    Raises:
        StartError: what is wrong and what to change.
    """
    machine.check(config)
    if config.address is None:
        check_placement(config)


def check_placement(config: ServeConfig) -> None:
    """Raise :class:`StartError` when a Ray on this machine has no room for a worker; Ray would wait for it forever."""
    import torch  # takes seconds

    from forecache.workers.core.config import gpus_of_worker

    workers, cpus = config.workers, config.ray_num_cpus
    if config.memory.tier_resource is not None:
        raise StartError(
            f"a Ray started on this machine has no resource {config.memory.tier_resource}: leave out "
            "--tier-resource, or join a cluster that has it with --address"
        )
    if cpus is not None and cpus < workers:
        raise StartError(f"--ray-num-cpus {cpus} is too few for --workers {workers}: each worker takes one CPU")
    gpus = torch.cuda.device_count()
    if workers * gpus_of_worker(config.engine.device) > gpus:
        raise StartError(
            f"--workers {workers} need a GPU each, but this machine has {gpus}: use fewer workers, or --device cpu"
        )


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that are known before its weights are loaded.

    ``max_model_len``: longest prompt and answer, in tokens; ``has_manifest``: its retrieval heads are known;
    ``chunk_bytes``: one chunk in the hot pool.
    """

    max_model_len: int
    has_manifest: bool
    chunk_bytes: int
    trained_digest: str | None = None
    """Digest of the trained indexer that workers will use; None without one."""
    cold_limit: int | None = None
    """``max_model_len``, if cold memory limits it and not the model."""
    cold_bytes: int | None = None
    """Cold memory of this machine; None on a joined cluster, where each node has its own."""

    def sized(self, config: ServeConfig) -> ServeConfig:
        """``config`` with this size of cold memory."""
        if self.cold_bytes is None:
            return config
        return config.model_copy(update={"memory": config.memory.model_copy(update={"cold_bytes": self.cold_bytes})})


def check_model(path: Path, config: ServeConfig) -> ModelFacts:
    """Check the model at ``path``, which must be a local directory.

    Raises:
        UnsupportedModelError: it is not a decoder, its weight files can't be read, `--max-model-len` is more than it
            supports, or it does not support `--fallback`.
        ArenaError: `--cold-bytes` is too small for one chunk.
        MemorySizeError: `--cold-bytes` is auto, and this machine has too little memory.
        StartError: `--indexer-manifest` is not a manifest, or belongs to another model.
    """
    from forecache.workers.models.backbone import load_config  # imports transformers, which takes seconds
    from forecache.workers.models.checkpoint import check_files
    from forecache.workers.models.registry import architecture_of

    model = load_config(path)
    if config.engine.load_format != "dummy":
        check_files(path, model)
    architecture_of(model.model_type).refuse_settings(config.engine, config.engine.model)
    architectures = getattr(model, "architectures", None) or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise UnsupportedModelError(
            f"{path} is a {', '.join(architectures)}, which is not a decoder language model: "
            "serve a model that is saved as …ForCausalLM."
        )
    own_limit, wanted = int(model.max_position_embeddings), config.engine.max_model_len
    if wanted is not None and wanted > own_limit:
        raise UnsupportedModelError(
            f"--max-model-len {wanted} is more than the {own_limit} positions that {path} supports: lower it."
        )
    limit = wanted or own_limit
    scorer, layout = _expected_scorer(model, config), _layout(model, config)
    if config.address is not None:
        # its nodes may have other devices, dtypes and sizes: their workers check for themselves
        return ModelFacts(limit, scorer.informed, layout.nbytes, scorer.digest)
    cold_bytes = config.memory.cold_bytes
    if cold_bytes == "auto":
        cold_bytes = _auto_cold_bytes(model, layout, scorer.spec, limit, config)
    cold = _cold_tokens(layout, scorer.spec, config.memory.cold_dtype, cold_bytes)
    cold_limit = cold if cold < limit else None
    return ModelFacts(min(cold, limit), scorer.informed, layout.nbytes, scorer.digest, cold_limit, cold_bytes)


def check_tokenizer(path: Path) -> None:
    """Raise :class:`UnsupportedModelError` when the model at ``path`` has no tokenizer, which a server needs."""
    from forecache.workers.models.tokenizer import load_tokenizer  # imports transformers, which takes seconds

    load_tokenizer(path)


def notes(model: ModelFacts, config: ServeConfig) -> tuple[str, ...]:
    """Warnings for the operator about this model with these settings."""
    warnings = []
    if model.trained_digest is None and config.indexer.checkpoint not in ("auto", "none"):
        warnings.append(NO_CHECKPOINT.format(config.indexer.checkpoint, config.engine.model))
    if model.trained_digest is None and not model.has_manifest and config.indexer.manifest != "none":
        warnings.append(NO_MANIFEST.format(config.engine.model))
    if model.cold_limit is not None:
        warnings.append(COLD_LIMIT.format(model.cold_limit))
    return tuple(warnings)


def settle(path: Path, config: ServeConfig) -> ServeConfig:
    """``config`` with the defaults that depend on the model at ``path``.

    Raises:
        UnsupportedModelError: it is not a decoder.
    """
    from forecache.workers.models.backbone import load_config  # imports transformers, which takes seconds
    from forecache.workers.models.registry import architecture_of

    engine = config.engine.for_model(architecture_of(load_config(path).model_type).chunk_tokens)
    return config.model_copy(update={"engine": engine})


def _expected_scorer(model: Any, config: ServeConfig) -> "ExpectedScorer":
    from forecache.workers.models.loader import model_name
    from forecache.workers.models.registry import architecture_of

    try:
        return architecture_of(model.model_type).expected_scorer(
            config.indexer, model_name(config.engine.model), model, chunk_tokens=config.engine.chunk_tokens
        )
    except ManifestError as error:
        raise StartError(f"--indexer-manifest {config.indexer.manifest}: {error}") from error


def _layout(model: Any, config: ServeConfig) -> "ChunkLayout":
    """The layout of a chunk in the hot pool, with this machine's device."""
    from forecache.workers.models.backbone import expected_layout, kv_number, pick_device, pick_dtype

    dtype = kv_number(config.engine.kv_dtype, pick_dtype(config.engine.dtype, pick_device(config.engine.device)))
    return expected_layout(model, chunk_tokens=config.engine.chunk_tokens, dtype=dtype)


def _auto_cold_bytes(
    model: Any, layout: "ChunkLayout", spec: "IndexSpec", max_model_len: int, config: ServeConfig
) -> int:
    """Cold memory of this machine, where models, Ray and Redis have theirs."""
    from forecache.workers.models.backbone import expected_weight_bytes, pick_device, pick_dtype

    device, directory = pick_device(config.engine.device), config.memory.arena_dir
    weights = expected_weight_bytes(model, pick_dtype(config.engine.dtype, device))
    claimed = config.workers * (weights + WORKER_BYTES) + config.object_store_bytes
    if config.redis_url is None:
        claimed += config.redis_bytes
    engine = config.engine.for_device(device.type)
    return auto_cold_bytes(
        directory,
        share=cold_share(device.type),
        claimed_bytes=claimed,
        claimed_room=machine.store_room(directory, config.object_store_bytes),
        most_bytes=engine.contexts_bytes(max_model_len, layout.nbytes + spec.nbytes),
    )


def _cold_tokens(layout: "ChunkLayout", spec: "IndexSpec", cold_dtype: Literal["auto", "fp8"], cold_bytes: int) -> int:
    """Tokens that the arena of one node holds, which limits every request."""
    from forecache.workers.memory.arena.arena import describe
    from forecache.workers.memory.format.layout import cold_layout

    return describe(cold_layout(layout, cold_dtype), spec.nbytes, "", cold_bytes).slots * layout.chunk_tokens
