"""What scores a model's chunks, and by which keys: a trained indexer, its retrieval heads, or bounds."""

import logging
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from forecache.indexer.flashmemory.checkpoint import FlashMemoryError, FlashMemoryIndexer, retriever_shape
from forecache.indexer.records.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    find_checkpoint,
    load_checkpoint,
    load_manifest,
)
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.manifest import ManifestError, find_manifest
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.stats import ScorerName
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.backbone import Backbone
from forecache.workers.models.deepseek_v4.shape import MODEL_TYPE, DeepseekV4Shape

logger = logging.getLogger(__name__)

BesideModel = LookaheadScorer | FlashMemoryIndexer
"""A trained indexer, the half of it that runs beside the model."""


@dataclass(frozen=True)
class ChosenScorer:
    """``spec``: the records, and the model's own heads that read them; ``lookahead``, or for DeepSeek-V4 ``retriever``:
    the trained indexer, where one serves. ``digest`` names that one's weights."""

    spec: IndexSpec
    lookahead: LookaheadScorer | None = None
    retriever: FlashMemoryIndexer | None = None
    retriever_digest: str = ""

    @property
    def name(self) -> ScorerName:
        if self.lookahead is not None or self.retriever is not None:
            return "trained"
        return "bounds" if self.spec.kind == "bounds" else "training-free"

    @property
    def digest(self) -> str:
        return self.retriever_digest if self.lookahead is None else self.lookahead.manifest.digest

    @property
    def beside(self) -> BesideModel | None:
        """What of the trained indexer runs beside the model."""
        return self.lookahead or self.retriever


def choose_scorer(config: IndexerConfig, model: str, backbone: Backbone) -> ChosenScorer:
    """The trained indexer that ``config`` names, if it fits the model, else what :func:`choose_index_spec` finds.

    A checkpoint that is missing, damaged or another model's is said, and costs nothing but its help: prediction is a
    hint. Which scorer serves is logged. Raises :class:`UnsupportedModelError` as :func:`choose_index_spec` does.
    """
    if backbone.v4 is not None:
        return v4_scorer(config, model, backbone)
    lookahead = _trained(config, model, backbone)
    if lookahead is None:
        chosen = ChosenScorer(choose_index_spec(config.manifest, model, backbone))
        logger.info("chunks of %s are scored %s: no trained indexer serves", model, _how(chosen))
        return chosen
    chosen = ChosenScorer(lookahead.own, lookahead)
    logger.info("chunks of %s are scored by the trained indexer %s", model, chosen.digest)
    return chosen


def _how(chosen: ChosenScorer) -> str:
    return "by bounds" if chosen.name == "bounds" else "training-free, by its retrieval heads"


def _trained(config: IndexerConfig, model: str, backbone: Backbone) -> LookaheadScorer | None:
    if config.checkpoint == "auto" and config.manifest != "auto":
        return None  # whoever names heads, or none, means them
    try:
        path = find_checkpoint(config.checkpoint, model_facts(backbone, model))
        return None if path is None else LookaheadScorer(*load_checkpoint(path))
    except CheckpointError as error:
        logger.warning("no trained indexer serves, chunks are scored without one: %s", error)
        return None


def model_facts(backbone: Backbone, model: str) -> dict[str, object]:
    """What of :data:`.checkpoint.MODEL_FACTS` a loaded model tells, and its name and weights."""
    geometry = backbone.geometry
    rotary = getattr(backbone.model.base_model, "rotary_emb", None)
    return {
        "model_name": model,
        "weights_fingerprint": backbone.fingerprint,
        "model_type": backbone.config.model_type,
        "layers": geometry.layers,
        "attention_heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "hidden_size": int(backbone.config.hidden_size),
        "scale": geometry.scale,
        "chunk_tokens": backbone.layout.chunk_tokens,
        "rope_scaling": float(getattr(rotary, "attention_scaling", 0.0)),
    }


def find_before_load(
    config: IndexerConfig, model: str, model_config: Any, chunk_tokens: int
) -> CheckpointManifest | None:
    """The trained indexer that will serve, as far as a model's name and configuration tell; None: none will.

    Its weights are not compared: a copy of another name finds the package's only once it is loaded. DeepSeek-V4 has
    retrievers instead, which come without a manifest.
    """
    if model_config.model_type == MODEL_TYPE:
        return None
    heads = int(model_config.num_attention_heads)
    facts: dict[str, object] = {
        "model_name": model,
        "model_type": model_config.model_type,
        "layers": int(model_config.num_hidden_layers),
        "attention_heads": heads,
        "kv_heads": int(getattr(model_config, "num_key_value_heads", None) or heads),
        "hidden_size": int(model_config.hidden_size),
        "chunk_tokens": chunk_tokens,
    }
    if config.checkpoint == "none" or (config.checkpoint == "auto" and config.manifest != "auto"):
        return None
    try:
        if config.checkpoint == "auto":
            path = find_checkpoint("auto", facts)
            return None if path is None else load_manifest(path)
        manifest = load_manifest(Path(config.checkpoint))
    except CheckpointError as error:
        logger.warning("no trained indexer will serve: %s", error)
        return None
    return manifest if set(manifest.differences(facts)) <= {"model_name"} else None


def v4_scorer(config: IndexerConfig, model: str, backbone: Backbone) -> ChosenScorer:
    """For DeepSeek-V4: FlashMemory retrievers, if ``config`` names a checkpoint of them that fits, else the Lightning
    Indexer of the target layers. A named checkpoint that does not fit is said, and costs nothing but its help."""
    shape = backbone.v4
    assert shape is not None, "not a DeepSeek-V4 backbone"
    chunk_tokens, retriever = backbone.layout.chunk_tokens, None
    if config.checkpoint not in ("auto", "none"):
        try:
            retriever = load_retrievers(Path(config.checkpoint), backbone)
        except FlashMemoryError as error:
            logger.warning("no trained retrievers serve, chunks are scored without them: %s", error)
    if retriever is not None:
        spec = shape.index_spec(
            chunk_tokens,
            threshold=config.entry_threshold,
            adaptive=config.threshold == "adaptive",
            targets=tuple(sorted(retriever.layers)),
            heads=retriever.shape.heads,
        )
        digest = retrievers_digest(Path(config.checkpoint))
        logger.info("chunks of %s are scored by the retrievers %s", model, digest)
        return ChosenScorer(spec, retriever=retriever, retriever_digest=digest)
    logger.info("chunks of %s are scored training-free, by its Lightning Indexer", model)
    own = entries_spec(backbone.config, chunk_tokens)
    assert own is not None, "not a DeepSeek-V4 backbone"
    return ChosenScorer(own)


def retrievers_digest(path: Path) -> str:
    """Names the weights in a file of retrievers."""
    return blake2b(path.read_bytes(), digest_size=8).hexdigest()


def entries_spec(model_config: Any, chunk_tokens: int) -> IndexSpec | None:
    """The records of a DeepSeek-V4 model with this configuration, without a checkpoint that says otherwise; of another
    model None."""
    if model_config.model_type != MODEL_TYPE:
        return None
    shape = DeepseekV4Shape.of(model_config)
    # its own scores are no probabilities, so no fixed threshold means anything
    return shape.index_spec(chunk_tokens, threshold=0.5, adaptive=True, targets=shape.targets, heads=shape.index_heads)


def refuse_fallback(config: EngineConfig, model_config: Any, name: str) -> None:
    """Raise :class:`UnsupportedModelError` where budgets are to follow a coverage that is never measured: its keys and
    queries say which entries of DeepSeek-V4 come next, in an order, not which share of the attention goes to them."""
    if config.fallback and model_config.model_type == MODEL_TYPE:
        raise UnsupportedModelError(
            f"--fallback raises the keep ratio of a sequence while its coverage is low, and for {name}, of type "
            f"'{MODEL_TYPE}', coverage is not measured: it would never do anything. Leave --fallback out, and choose a "
            "larger --keep-ratio where answers need more; 1.0 is exact."
        )


def load_retrievers(path: Path, backbone: Backbone) -> FlashMemoryIndexer:
    """FlashMemory's retrievers for ``backbone``, on its device. Raises :class:`FlashMemoryError`."""
    shape = backbone.v4
    assert shape is not None, "not a DeepSeek-V4 backbone"
    rotary: Any = backbone.model.base_model.rotary_emb
    frequencies = tuple(rotary.compress_inv_freq.double().tolist())
    found = retriever_shape(path, shape.index_dim, frequencies)
    retriever = FlashMemoryIndexer.load(path, device=str(backbone.device), shape=found)
    strangers = [layer for layer in retriever.layers if layer >= len(shape.csa)]
    if strangers or found.hidden != backbone.config.hidden_size:
        raise FlashMemoryError(
            f"{path.name} is made for hidden size {found.hidden} and CSA layers {sorted(retriever.layers)}; the model "
            f"has hidden size {backbone.config.hidden_size} and {len(shape.csa)} CSA layers"
        )
    return retriever


def choose_index_spec(setting: str, model: str, backbone: Backbone) -> IndexSpec:
    """``setting`` is ``auto`` (a packaged manifest that fits the model), the path of a manifest, or ``none``."""
    geometry = backbone.geometry
    try:
        manifest = find_manifest(
            setting,
            model,
            model_type=backbone.config.model_type,
            layers=geometry.layers,
            attention_heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
        )
    except ManifestError as error:
        raise UnsupportedModelError(str(error)) from error
    if manifest is not None:
        return IndexSpec.from_manifest(manifest, chunk_tokens=backbone.layout.chunk_tokens, scale=geometry.scale)
    logger.warning(
        "%s has no retrieval-head manifest: chunks are chosen by bounds, which miss much; coverage is not "
        "measured, and --fallback has nothing to go by. Make one with "
        "`forecache indexer calibrate --model %s`.",
        model,
        model,
    )
    return IndexSpec.bounds(
        geometry.layers,
        geometry.heads,
        geometry.kv_heads,
        geometry.head_dim,
        chunk_tokens=backbone.layout.chunk_tokens,
        scale=geometry.scale,
    )
