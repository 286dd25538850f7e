"""FlashMemory's retrievers as trainable modules, and the recall of the chunks that they select."""

import math

import torch
from torch import Tensor, nn

from forecache.indexer.flashmemory.checkpoint import LayerWeights, RetrieverShape, retriever_queries
from forecache.indexer.flashmemory.entry_shards import EntryDocument, EntryManifest
from forecache.kernels.csa.reference import index_logits

ROWS = 8
"""Steps of a document whose logits are in memory at a time, with those of their query steps."""
TENSORS = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
"""In the order of `LayerWeights`."""


class Retrievers(nn.Module):
    """Retrievers of all recorded layers, as `checkpoint.retriever_queries` and `index_logits` compute them."""

    def __init__(self, manifest: EntryManifest, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.manifest = manifest
        self.weights = nn.ParameterDict(
            {
                _parameter(layer, name): nn.Parameter(weights[f"retrievers.l{layer}.{name}"].clone())
                for layer in manifest.layers
                for name in TENSORS
            }
        )

    def logits(self, document: EntryDocument, rows: Tensor) -> Tensor:
        """Largest logit of every entry over the layers and the query steps: float32 [rows, entries].

        Also entries that a row's token can't see have a logit; :func:`candidates` excludes them.
        """
        return torch.cat([self.by_layer(document, some).amax((0, 2)) for some in torch.split(rows, ROWS)])

    def by_layer(self, document: EntryDocument, rows: Tensor) -> Tensor:
        """Logits, float32 [layers, rows, steps, entries], of steps ``rows`` and of the query steps before each."""
        manifest, asking = self.manifest, document.hidden.shape[1]
        behind = torch.arange(1 - asking, 1, device=rows.device)
        positions = (document.positions[rows].unsqueeze(1) + behind).flatten()
        shape = RetrieverShape(
            manifest.hidden_size, manifest.heads, manifest.head_dim, manifest.rank, manifest.frequencies
        )
        found = []
        for place, layer in enumerate(manifest.layers):
            weights = LayerWeights(*(self.weights[_parameter(layer, name)] for name in TENSORS))
            hidden = document.hidden[rows, :, place].flatten(0, 1)
            q, w = retriever_queries(weights, shape, hidden, positions, manifest.norm_eps)
            logits = index_logits(q, w, document.keys[place].float())
            found.append(logits.view(len(rows), asking, -1))
        return torch.stack(found)

    def export(self) -> dict[str, Tensor]:
        """The weights, named as in the published checkpoint."""
        return {
            f"retrievers.l{layer}.{name}": self.weights[_parameter(layer, name)].detach().cpu().contiguous()
            for layer in self.manifest.layers
            for name in TENSORS
        }


def _parameter(layer: int, name: str) -> str:
    """A published tensor's name as a parameter's, which may not contain dots."""
    return f"l{layer}_{name.replace('.', '_')}"


def candidates(manifest: EntryManifest, document: EntryDocument, rows: Tensor) -> Tensor:
    """Entries that a retriever has to find: bool [rows, entries].

    They are complete at the row's token and outside the chunks that are always resident: the first and the last two.
    """
    size = manifest.chunk_tokens // manifest.ratio
    entries = torch.arange(document.keys.shape[1], device=rows.device)
    complete = ((document.positions[rows] + 1) // manifest.ratio).unsqueeze(1)
    return (entries >= size) & (entries < (complete // size - 1) * size)


def chunk_recall(manifest: EntryManifest, logits: Tensor, golden: Tensor, candidate: Tensor, budget: float) -> Tensor:
    """Share of each row's golden entries that lie in the selected chunks: float32 [rows], NaN without golden entries.

    The ranking is the published one: by the number of entries with a score above 0.5, then by the best entry. Of the
    chunks with candidates, the share ``budget`` is selected, and at least one.
    """
    size = manifest.chunk_tokens // manifest.ratio
    rows, entries = logits.shape
    pad = (0, -entries % size)

    def chunks(x: Tensor, value: float) -> Tensor:
        return nn.functional.pad(x.float(), pad, value=value).view(rows, -1, size)

    masked = logits.masked_fill(~candidate, -math.inf)
    by_chunk = chunks(masked, -math.inf)
    rank = (by_chunk > 0).sum(2) + (0.5 + by_chunk.amax(2).atan() / (math.pi + 1e-3))
    rank = rank.masked_fill(by_chunk.amax(2) == -math.inf, -math.inf)
    available = (rank > -math.inf).sum(1)
    allowed = (budget * available).ceil().clamp(min=1)
    place = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = (place < allowed.unsqueeze(1)) & (rank > -math.inf)
    wanted = chunks(golden & candidate, 0.0).sum(2)
    return (wanted * chosen).sum(1) / wanted.sum(1)
