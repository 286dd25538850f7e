"""What can be known to fail before anything is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.launch import machine
from forecache.indexer.records.manifest import ManifestError
from forecache.workers.errors import UnsupportedModelError

if TYPE_CHECKING:
    from forecache.indexer.records.index_spec import IndexSpec
    from forecache.workers.memory.format.layout import ChunkLayout
    from forecache.workers.models.step.architecture import ExpectedScorer

NO_MANIFEST = (
    "{0} has no manifest of retrieval heads: its chunks are chosen by bounds, which finds much less. "
    "Make one with `forecache indexer calibrate --model {0} --out FILE` and serve with --indexer-manifest FILE."
)
NO_CHECKPOINT = (
    "--indexer {0} is missing, damaged or not for {1}: chunks are scored without a trained indexer. "
    "The worker's log has the reason; `forecache indexer train` makes one."
)
COLD_LIMIT = "prompt and answer may have {} tokens, which is what cold memory holds: raise --cold-bytes for more."


def check(config: ServeConfig) -> None:
    """Everything that is quick to check.

    Raises:
        StartError: what is wrong and what to change.
    """
    machine.check(config)
    if config.address is None:
        check_placement(config)


def check_placement(config: ServeConfig) -> None:
    """Raises :class:`StartError` when a Ray that is started here has no place for a worker: Ray would wait for one."""
    import torch  # seconds

    from forecache.workers.core.settings import gpus_of_worker

    workers, cpus = config.workers, config.ray_num_cpus
    if config.memory.tier_resource is not None:
        raise StartError(
            f"no node of a Ray that is started here has the resource {config.memory.tier_resource}: leave out "
            "--tier-resource, or join a cluster that has it with --address"
        )
    if cpus is not None and cpus < workers:
        raise StartError(f"--ray-num-cpus {cpus} is less than the {workers} --workers, each of which takes one")
    gpus = torch.cuda.device_count()
    if workers * gpus_of_worker(config.engine.device) > gpus:
        raise StartError(
            f"--workers {workers} on {config.engine.device} take a GPU each, and this machine has {gpus}: use fewer, "
            "or --device cpu"
        )


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration tells before its weights are read."""

    max_model_len: int
    has_manifest: bool
    chunk_bytes: int
    trained_digest: str | None = None
    """Names the weights of the trained indexer that will serve."""
    cold_limit: int | None = None
    """``max_model_len``, where cold memory and not the model sets it."""


def check_model(path: Path, config: ServeConfig) -> ModelFacts:
    """Longest prompt + answer, in tokens, and whether the model's retrieval heads are known.

    Raises:
        UnsupportedModelError: no decoder, weight files that can't be read, `--max-model-len` is more than it was made
            for, or `--fallback` would do nothing for it.
        ArenaError: `--cold-bytes` holds no chunk of it.
        StartError: `--indexer-manifest` names a file that is no manifest, or another model's.
    """
    from forecache.workers.models.backbone import load_config  # imports transformers: seconds
    from forecache.workers.models.checkpoint import check_files
    from forecache.workers.models.registry import architecture_of

    model = load_config(path)
    if config.engine.load_format != "dummy":
        check_files(path, model)
    architecture_of(model.model_type).refuse_settings(config.engine, config.engine.model)
    architectures = getattr(model, "architectures", None) or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise UnsupportedModelError(
            f"{path} is a {', '.join(architectures)}, which is not a decoder language model; "
            "serve one that is saved as …ForCausalLM."
        )
    own_limit, wanted = int(model.max_position_embeddings), config.engine.max_model_len
    if wanted is not None and wanted > own_limit:
        raise UnsupportedModelError(
            f"--max-model-len {wanted} is more than the {own_limit} positions that {path} was made for."
        )
    limit = wanted or own_limit
    scorer, layout = _expected_scorer(model, config), _layout(model, config)
    # other machines may have other devices, so other dtypes: there a worker's own check must do
    cold = _cold_tokens(layout, scorer.spec, config) if config.address is None else limit
    cold_limit = cold if cold < limit else None
    return ModelFacts(min(cold, limit), scorer.informed, layout.nbytes, scorer.digest, cold_limit)


def check_tokenizer(path: Path) -> None:
    """Raises :class:`UnsupportedModelError` when the model at ``path`` has no tokenizer, which every server needs."""
    from forecache.workers.models.tokenizer import load_tokenizer  # imports transformers: seconds

    load_tokenizer(path)


def notes(model: ModelFacts, config: ServeConfig) -> tuple[str, ...]:
    """Sentences that an operator of this model, with these settings, should read."""
    said = []
    if model.trained_digest is None and config.indexer.checkpoint not in ("auto", "none"):
        said.append(NO_CHECKPOINT.format(config.indexer.checkpoint, config.engine.model))
    if model.trained_digest is None and not model.has_manifest and config.indexer.manifest != "none":
        said.append(NO_MANIFEST.format(config.engine.model))
    if model.cold_limit is not None:
        said.append(COLD_LIMIT.format(model.cold_limit))
    return tuple(said)


def settle(path: Path, config: ServeConfig) -> ServeConfig:
    """``config`` with what it leaves to the model at ``path`` filled in.

    Raises:
        UnsupportedModelError: there is no decoder.
    """
    from forecache.workers.models.backbone import load_config  # imports transformers: seconds
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
    """Of a chunk in the hot pool, as this machine would have it."""
    from forecache.workers.models.backbone import expected_layout, kv_number, pick_device, pick_dtype

    dtype = kv_number(config.engine.kv_dtype, pick_dtype(config.engine.dtype, pick_device(config.engine.device)))
    return expected_layout(model, chunk_tokens=config.engine.chunk_tokens, dtype=dtype)


def _cold_tokens(layout: "ChunkLayout", spec: "IndexSpec", config: ServeConfig) -> int:
    """Tokens that the arena of one node holds: no request can have more."""
    from forecache.workers.memory.arena.arena import describe
    from forecache.workers.memory.format.layout import cold_layout

    cold = cold_layout(layout, config.memory.cold_dtype)
    return describe(cold, spec.nbytes, "", config.memory.cold_bytes).slots * layout.chunk_tokens
