"""A trained indexer on disk: weights as safetensors, and beside them a JSON manifest that says for which model."""

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
    """A checkpoint can't be read, or was trained for another model."""


class CheckpointManifest(BaseModel):
    """What a checkpoint is for and where it came from.

    ``index_fingerprint``: of the index records that it scores; ``digest``: blake2b-128 of the weights' file.
    ``training`` and ``evaluation`` hold settings and results as they were written.
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
        """The manifest of an indexer trained on what ``recorded`` describes."""
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
        """Records of the keys that the checkpoint scores, with its own query heads."""
        return IndexSpec.of_heads(
            self.query_heads,
            self.index_kv_heads,
            group=self.attention_heads // self.kv_heads,
            head_dim=self.head_dim,
            chunk_tokens=self.chunk_tokens,
            scale=self.scale,
        )

    def differences(self, model: ShardManifest | dict[str, object]) -> list[str]:
        """Facts of ``model``, a recording's manifest or some of these fields, in which it is another than ours.

        Equal weights make the same model, and so does a name of the same family: a fine-tune's heads do the same, and
        another release of transformers writes another configuration, which the fingerprint covers.
        """
        facts = model.model_dump() if isinstance(model, ShardManifest) else model
        compared = [name for name in MODEL_FACTS if name in facts]
        different = [name for name in compared if getattr(self, name) != facts[name]]
        names = (self.model_name, str(facts.get("model_name", "")))
        if facts.get("weights_fingerprint") != self.weights_fingerprint and not same_family(*names):
            different.append("model_name")
        return different


def new_indexer(recording: Recording, shape: EncoderShape) -> MemoryIndexer:
    """An untrained indexer: the model's own queries, ranking like the training-free scorer."""
    manifest = recording.manifest
    return _indexer(manifest, shape, recording.seed_weights)


def save_checkpoint(path: Path, indexer: MemoryIndexer, manifest: CheckpointManifest) -> CheckpointManifest:
    """Write ``path`` (safetensors, float16) and its manifest, ``path`` with the ending ``.json``."""
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in indexer.state_dict().items()}
    # the frequencies place a token 100,000 positions away: they need every bit
    weights["projection.inverse_frequencies"] = indexer.projection.inverse_frequencies.float().cpu()
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    manifest = manifest.model_copy(update={"digest": _digest(partial)})
    partial.rename(path)
    path.with_suffix(".json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def load_checkpoint(path: Path) -> tuple[MemoryIndexer, CheckpointManifest]:
    """The indexer in float32 on CPU. Raises :class:`CheckpointError` for what is missing, damaged or mixed up."""
    manifest = load_manifest(path)
    try:
        weights = load_file(path)
    except OSError as error:
        raise CheckpointError(f"can't read the indexer {path}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if _digest(path) != manifest.digest:
        raise CheckpointError(f"{path} and its manifest do not belong together: the digests differ")
    prefix = "projection."
    weights = {name: tensor.float() for name, tensor in weights.items()}
    seed = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        indexer = _indexer(manifest, manifest.shape, seed)
        indexer.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} lacks weights, or has some of another shape: {error}") from error
    return indexer.eval(), manifest


def find_checkpoint(setting: str, model: dict[str, object]) -> Path | None:
    """The checkpoint for a model: ``setting`` is "auto" (one that came with the package), "none", or a path.

    ``model``: its ``model_name`` and whatever of :data:`MODEL_FACTS` and ``weights_fingerprint`` is known. Raises
    :class:`CheckpointError` when a path's checkpoint is unreadable or for another model.
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
    """The manifest of the checkpoint ``path``. Raises :class:`CheckpointError` if it is missing or is none."""
    beside = path.with_suffix(".json")
    try:
        return CheckpointManifest.model_validate_json(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read the indexer's manifest {beside}: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{beside} is not an indexer's manifest: {error}") from error


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
