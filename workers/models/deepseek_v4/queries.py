"""What level 1 asks with on DeepSeek-V4: the retrievers' queries at the last steps of a sequence."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forecache.indexer.flashmemory.checkpoint import FlashMemoryIndexer, LayerWeights, RetrieverShape
from forecache.indexer.records.entry_scores import BLOCK_PRODUCTS, chunk_scores, largest_logits
from forecache.indexer.records.index_spec import IndexSpec
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape
from forecache.workers.models.step.hidden_history import HiddenHistory

OWN_STEPS = 24
"""Steps that ask together where no trained retrievers say how many."""


class RetrieverQueries:
    """Keeps the hidden states that queries are made from, for ``max_rows`` sequences at a time, and makes them.

    ``retriever``: the trained one; without it the Lightning Indexer of the layers that ``spec`` names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: DeepseekV4Shape,
        spec: IndexSpec,
        retriever: FlashMemoryIndexer | None,
        max_rows: int,
    ) -> None:
        self._spec = spec
        self.targets = [number for number, _ in spec.kv_heads]
        layers = {number: layer for layer, number in shape.csa.items() if number in self.targets}
        self._retriever = retriever or own_retrievers(model, shape, layers)
        self.histories = HiddenHistory(
            model, tuple(layers[number] for number in self.targets), self._retriever.steps, max_rows
        )

    def ask(self, seq: TokenSequence, position: int) -> tuple[Tensor, Tensor]:
        """The queries, float32 [steps · query heads, index dim], and their weights, float32 [steps · query heads].

        They are those of the last steps up to ``position``, which was computed.
        """
        asked = [self.of_layer(seq, position, number) for number in self.targets]
        queries = torch.cat([q for q, _ in asked], 1).flatten(0, 1)
        return queries, torch.cat([w for _, w in asked], 1).flatten()

    def of_layer(self, seq: TokenSequence, position: int, number: int) -> tuple[Tensor, Tensor]:
        """The queries and weights for CSA layer ``number``: float32 [steps, heads, index dim] and [steps, heads]."""
        steps = self.histories.length(seq, position)
        hidden = self.histories.last(seq, position, steps)[:, self.targets.index(number)]
        positions = torch.arange(position + 1 - steps, position + 1, device=hidden.device)
        q, w = self._retriever.queries(number, hidden, positions)
        return q.float(), w.float()

    def probe(self, seq: TokenSequence, stop: int, chunks: int) -> "EntryProbe":
        """A probe for the step that computes the prompt's last token, ``stop - 1``."""
        return EntryProbe(self, self._spec, seq, stop, chunks)


class EntryProbe:
    """Scores chunks by what the last steps of a prompt ask for, while its layers have all index keys at hand: the
    first resident set is chosen by it (docs/architecture.md)."""

    def __init__(self, queries: RetrieverQueries, spec: IndexSpec, seq: TokenSequence, stop: int, chunks: int) -> None:
        self._queries, self._spec = queries, spec
        self._seq, self._stop, self._chunks = seq, stop, chunks
        self._logits: Tensor | None = None

    def see(self, number: int, keys: Tensor) -> None:
        """Score the index keys [entries, index dim] of CSA layer ``number``, whose input was kept."""
        if number not in self._queries.targets:
            return
        q, w = self._queries.of_layer(self._seq, self._stop - 1, number)
        block = max(1, BLOCK_PRODUCTS // w.numel())
        found = keys.new_full((self._chunks * self._spec.chunk_tokens,), -torch.inf, dtype=torch.float32)
        for start in range(0, len(keys), block):
            part = keys[start : start + block].float()
            found[start : start + len(part)] = largest_logits(q, w, part)
        self._logits = found if self._logits is None else torch.maximum(self._logits, found)

    @property
    def mass(self) -> Tensor:
        """Scores of the chunks, float32 [chunks]."""
        assert self._logits is not None, "no target layer was seen"
        return chunk_scores(self._spec, self._logits.view(self._chunks, -1).T)


def own_retrievers(model: PreTrainedModel, shape: DeepseekV4Shape, layers: dict[int, int]) -> FlashMemoryIndexer:
    """The Lightning Indexers of CSA layers as retrievers: the same formula over the same keys. ``layers``: number among
    the CSA layers → layer."""
    config: Any = model.config
    decoder: Any = model.base_model
    weights = {}
    for number, layer in layers.items():
        attention = decoder.layers[layer].self_attn
        indexer = attention.compressor.indexer
        weights[number] = LayerWeights(
            wq_a=attention.q_a_proj.weight.detach().float(),
            q_norm=attention.q_a_norm.weight.detach().float(),
            wq_b=indexer.q_b_proj.weight.detach().float(),
            weights_proj=indexer.scorer.weights_proj.weight.detach().float(),
        )
    frequencies = tuple(decoder.rotary_emb.compress_inv_freq.double().tolist())
    sizes = RetrieverShape(
        hidden=config.hidden_size,
        heads=shape.index_heads,
        head_dim=shape.index_dim,
        rank=config.q_lora_rank,
        frequencies=frequencies,
    )
    return FlashMemoryIndexer(weights, sizes, OWN_STEPS)
