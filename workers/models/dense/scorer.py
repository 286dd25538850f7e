"""What scores a model's chunks, and by which keys: a trained indexer, its retrieval heads, or bounds."""

import logging
from pathlib import Path
from typing import Any

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
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.dense.probe import expected_geometry
from forecache.workers.models.step.architecture import Backbone, ChosenScorer

logger = logging.getLogger(__name__)


def choose_scorer(config: IndexerConfig, model: str, backbone: Backbone) -> ChosenScorer:
    """The trained indexer that ``config`` names, if it fits the model, else what :func:`choose_index_spec` finds.

    A checkpoint that is missing, damaged or for another model is logged and ignored: predictions are only hints. The
    chosen scorer is logged too. Raises :class:`UnsupportedModelError` as :func:`choose_index_spec` does.
    """
    lookahead = _trained(config, model, backbone)
    if lookahead is None:
        chosen = ChosenScorer(choose_index_spec(config.manifest, model, backbone))
        logger.info("chunks of %s are scored %s: no trained indexer serves", model, _how(chosen))
        return chosen
    chosen = ChosenScorer(lookahead.own, lookahead, lookahead.manifest.digest, lookahead)
    logger.info("chunks of %s are scored by the trained indexer %s", model, chosen.digest)
    return chosen


def _how(chosen: ChosenScorer) -> str:
    return "by bounds" if chosen.name == "bounds" else "training-free, by its retrieval heads"


def _trained(config: IndexerConfig, model: str, backbone: Backbone) -> LookaheadScorer | None:
    if config.checkpoint == "auto" and config.manifest != "auto":
        return None  # the setting names a manifest of heads, or none: use that instead of a trained indexer
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

    Its weights are not compared: a copy of another name finds the package's only once it is loaded.
    """
    geometry = expected_geometry(model_config)
    facts: dict[str, object] = {
        "model_name": model,
        "model_type": model_config.model_type,
        "layers": geometry.layers,
        "attention_heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
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
