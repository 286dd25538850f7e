"""What scores the chunks of a DeepSeek-V4 model: FlashMemory's retrievers, or its Lightning Indexers."""

import logging
from hashlib import blake2b
from pathlib import Path
from typing import Any

from forecache.indexer.flashmemory.checkpoint import FlashMemoryError, FlashMemoryIndexer, retriever_shape
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape
from forecache.workers.models.step.architecture import Backbone, ChosenScorer

logger = logging.getLogger(__name__)


def choose_scorer(config: IndexerConfig, model: str, backbone: Backbone) -> ChosenScorer:
    """FlashMemory's retrievers, if ``config`` names a checkpoint that fits, else the model's Lightning Indexers.

    A named checkpoint that does not fit is logged, and the Lightning Indexers serve.
    """
    shape = DeepseekV4Shape.of(backbone.config)
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
        return ChosenScorer(spec, retriever, digest)
    logger.info("chunks of %s are scored training-free, by its Lightning Indexer", model)
    return ChosenScorer(entries_spec(backbone.config, chunk_tokens))


def retrievers_digest(path: Path) -> str:
    """Names the weights in a file of retrievers."""
    return blake2b(path.read_bytes(), digest_size=8).hexdigest()


def entries_spec(model_config: Any, chunk_tokens: int) -> IndexSpec:
    """The index records of a model with this configuration, unless a checkpoint of retrievers chooses other layers."""
    shape = DeepseekV4Shape.of(model_config)
    # scores of the Lightning Indexers are no probabilities, so no fixed threshold means anything
    return shape.index_spec(chunk_tokens, threshold=0.5, adaptive=True, targets=shape.targets, heads=shape.index_heads)


def load_retrievers(path: Path, backbone: Backbone) -> FlashMemoryIndexer:
    """FlashMemory's retrievers for ``backbone``, on its device. Raises :class:`FlashMemoryError`."""
    shape = DeepseekV4Shape.of(backbone.config)
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
