"""A trained indexer on disk: weights as safetensors, and a JSON manifest that names the model it is for."""

from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from forecache.indexer.records.encoder import EncoderShape, MemoryIndexer
from forecache.indexer.records.index_spec import Head, IndexSpec
from forecache.indexer.records.manifest import same_family
from forecache.indexer.records.queries import QueryProjection
from forecache.indexer.records.shards import Recording, ShardManifest

PACKAGED_CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


MODEL_FACTS = (
    "model_type",
    "layers",
    "attention_heads",
    "kv_heads",
    "head_dim",
    "hidden_size",
    "scale",
    "chunk_tokens",
    "rope_scaling",
    "index_kv_heads",
)


class CheckpointError(ValueError):
    """A checkpoint is unreadable or was trained for another model."""


class CheckpointManifest(BaseModel):
    """The model that a checkpoint is for, its sizes, and how it was trained.

    ``index_fingerprint``: fingerprint of the index records that it scores; ``digest``: blake2b-128 of the weights'
    file. ``recording``, ``training`` and ``evaluation`` document settings and results; nothing reads them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    model_type: str
    model_name: str
    weights_fingerprint: str
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    scale: float
    chunk_tokens: int
    rope_scaling: float
    query_norm_eps: float | None
    target_layers: tuple[int, ...]
    query_heads: tuple[Head, ...]
    retrieval_heads: int = Field(ge=1)
    index_kv_heads: tuple[Head, ...]
    index_fingerprint: str
    history: tuple[int, ...]
    context: int
    units: int
    reach: int
    digest: str = ""
    recording: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, recorded: ShardManifest, shape: EncoderShape, training: dict[str, Any]) -> Self:
        """The manifest of an indexer trained on the recording that ``recorded`` describes."""
        same = set(cls.model_fields) & set(ShardManifest.model_fields)
        return cls(
            **{name: getattr(recorded, name) for name in same},
            index_fingerprint=recorded.index_spec.fingerprint,
            history=shape.history,
            context=shape.context,
            units=shape.units,
            reach=shape.reach,
            recording=dict(recorded.recipe) | {"seed": recorded.seed},
            training=training,
        )

    @property
    def shape(self) -> EncoderShape:
        return EncoderShape(self.history, self.context, self.units, self.reach)

    @property
    def index_spec(self) -> IndexSpec:
        """The index records that the checkpoint scores, with its query heads."""
        return IndexSpec.of_heads(
            self.query_heads,
            self.index_kv_heads,
            group=self.attention_heads // self.kv_heads,
            head_dim=self.head_dim,
            chunk_tokens=self.chunk_tokens,
            scale=self.scale,
        )

    def differences(self, model: ShardManifest | dict[str, object]) -> list[str]:
        """Names of the facts in which ``model`` differs from the checkpoint's model.

        ``model``: a recording's manifest, or some of its fields. The weights may differ if the names are of the same
        family, because the heads of a fine-tuned model work alike, and because the fingerprint also covers the
        configuration file, which differs between releases of transformers.
        """
        facts = model.model_dump() if isinstance(model, ShardManifest) else model
        compared = [name for name in MODEL_FACTS if name in facts]
        different = [name for name in compared if getattr(self, name) != facts[name]]
        names = (self.model_name, str(facts.get("model_name", "")))
        if facts.get("weights_fingerprint") != self.weights_fingerprint and not same_family(*names):
            different.append("model_name")
        return different


def new_indexer(recording: Recording, shape: EncoderShape) -> MemoryIndexer:
    """An untrained indexer, which has the model's own queries and ranks chunks like the training-free scorer."""
    manifest = recording.manifest
    return _indexer(manifest, shape, recording.seed_weights)


def save_checkpoint(path: Path, indexer: MemoryIndexer, manifest: CheckpointManifest) -> CheckpointManifest:
    """Write the weights to ``path`` (safetensors, float16) and the manifest next to it, with the suffix ``.json``.

    Returns the manifest with the digest of the weights.
    """
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in indexer.state_dict().items()}
    # float16 frequencies would be too coarse for tokens 100,000 positions apart
    weights["projection.inverse_frequencies"] = indexer.projection.inverse_frequencies.float().cpu()
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    manifest = manifest.model_copy(update={"digest": _digest(partial)})
    partial.rename(path)
    path.with_suffix(".json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def load_checkpoint(path: Path) -> tuple[MemoryIndexer, CheckpointManifest]:
    """The indexer in float32 on the CPU, and its manifest.

    Raises :class:`CheckpointError` if a file is missing or damaged, or if the two do not belong together.
    """
    manifest = load_manifest(path)
    try:
        weights = load_file(path)
    except OSError as error:
        raise CheckpointError(f"can't read the indexer {path}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if _digest(path) != manifest.digest:
        raise CheckpointError(f"{path} does not belong to its manifest (the digests differ): copy both files again")
    prefix = "projection."
    weights = {name: tensor.float() for name, tensor in weights.items()}
    seed = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        indexer = _indexer(manifest, manifest.shape, seed)
        indexer.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} lacks weights or has weights of other shapes: {error}") from error
    return indexer.eval(), manifest


def find_checkpoint(setting: str, model: dict[str, object]) -> Path | None:
    """The checkpoint for a model: ``setting`` is "auto" (one that the package includes), "none", or a path.

    ``model``: its ``model_name``, and those of :data:`MODEL_FACTS` and ``weights_fingerprint`` that are known. Raises
    :class:`CheckpointError` when the checkpoint at a path is unreadable or for another model.
    """
    if setting == "none":
        return None
    if setting == "auto":
        packaged = sorted(PACKAGED_CHECKPOINTS.glob("*.safetensors"))
        return next((path for path in packaged if not load_manifest(path).differences(model)), None)
    path = Path(setting)
    if differences := load_manifest(path).differences(model):
        raise CheckpointError(
            f"{path} was trained for another model ({', '.join(differences)} differ): record and train one with "
            "`forecache indexer record` and `train`, or set the indexer to none"
        )
    return path


def load_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint ``path``. Raises :class:`CheckpointError` if it is missing or invalid."""
    manifest = path.with_suffix(".json")
    try:
        return CheckpointManifest.model_validate_json(manifest.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read the indexer's manifest {manifest}: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{manifest} is not an indexer's manifest: {error}") from error


def _indexer(
    manifest: ShardManifest | CheckpointManifest, shape: EncoderShape, seed: dict[str, torch.Tensor]
) -> MemoryIndexer:
    projection = QueryProjection(
        seed["weight"],
        seed["bias"],
        seed["inverse_frequencies"],
        tuple(manifest.target_layers.index(layer) for layer, _ in manifest.query_heads),
        rope_scaling=manifest.rope_scaling,
        norm=seed.get("norm"),
        norm_eps=manifest.query_norm_eps,
    )
    return MemoryIndexer(projection, len(manifest.target_layers), manifest.retrieval_heads, shape)


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()
