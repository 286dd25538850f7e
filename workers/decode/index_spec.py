"""Which index keys a model gets: those of its retrieval heads, or bounds when nobody has calibrated it."""

import logging

from forecache.indexer.index_keys import IndexSpec
from forecache.indexer.manifest import ManifestError, find_manifest
from forecache.workers.decode.backbone import Backbone
from forecache.workers.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


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
