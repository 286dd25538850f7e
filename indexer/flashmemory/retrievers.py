"""FlashMemory's retrievers as modules: the published formula with gradients, and what their choice of chunks holds."""

import math

import torch
from torch import Tensor, nn

from forecache.indexer.flashmemory.entry_shards import EntryDocument, EntryManifest

ROWS = 8
"""Steps of a document whose logits, of all that ask with them, are in memory at a time."""
TENSORS = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")


class Retrievers(nn.Module):
    """Of all recorded layers (formula: `flashmemory.py`, over keys as transformers has them: both Walsh-Hadamard
    transforms left out, which changes no product)."""

    def __init__(self, manifest: EntryManifest, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.manifest = manifest
        self.weights = nn.ParameterDict(
            {f"l{layer}_{name.replace('.', '_')}": nn.Parameter(weights[f"retrievers.l{layer}.{name}"].clone())
             for layer in manifest.layers for name in TENSORS}
        )  # fmt: skip

    def logits(self, document: EntryDocument, rows: Tensor) -> Tensor:
        """Largest logit over the layers and the steps that ask of every entry, float32 [rows, entries]; an entry that a
        row's token can't see has one too."""
        found = []
        for some in torch.split(rows, ROWS):
            steps = self.by_layer(document, some)
            found.append(steps.amax((0, 2)))
        return torch.cat(found)

    def by_layer(self, document: EntryDocument, rows: Tensor) -> Tensor:
        """Logits ``Σ_h w_h relu(q_h · k)``, float32 [layers, rows, steps, entries]."""
        manifest, asking = self.manifest, document.hidden.shape[1]
        behind = torch.arange(1 - asking, 1, device=rows.device)
        positions = (document.positions[rows].unsqueeze(1) + behind).flatten()
        turns = torch.tensor(manifest.frequencies, dtype=torch.float64, device=positions.device)
        angles = positions.double().outer(turns).unsqueeze(1)
        cos, sin = angles.cos().float(), angles.sin().float()
        found = []
        for place, layer in enumerate(manifest.layers):
            down, norm, up, weigh = (self.weights[f"l{layer}_{name.replace('.', '_')}"] for name in TENSORS)
            x = document.hidden[rows, :, place].float().flatten(0, 1)
            low = x @ down.T
            low = low * torch.rsqrt(low.square().mean(1, keepdim=True) + manifest.norm_eps) * norm
            q = (low @ up.T).view(len(x), manifest.heads, manifest.head_dim)
            size = 2 * len(manifest.frequencies)
            even, odd = q[..., -size::2], q[..., q.shape[2] - size + 1 :: 2]
            rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(2)
            q = torch.cat([q[..., :-size], rotated], 2)
            w = (x @ weigh.T) * (manifest.head_dim * manifest.heads) ** -0.5
            products = (q.flatten(0, 1) @ document.keys[place].float().T).relu().view(len(x), manifest.heads, -1)
            found.append(torch.bmm(w.unsqueeze(1), products).view(len(rows), asking, -1))
        return torch.stack(found)

    def export(self) -> dict[str, Tensor]:
        """The published checkpoint format."""
        return {
            f"retrievers.l{layer}.{name}": self.weights[f"l{layer}_{name.replace('.', '_')}"]
            .detach()
            .cpu()
            .contiguous()
            for layer in self.manifest.layers
            for name in TENSORS
        }


def candidates(manifest: EntryManifest, document: EntryDocument, rows: Tensor) -> Tensor:
    """Entries that a retriever has to find: complete at the row's token, and in no chunk that is resident anyhow
    (the first, and the last two), bool [rows, entries]."""
    size = manifest.chunk_tokens // manifest.ratio
    entries = torch.arange(document.keys.shape[1], device=rows.device)
    complete = ((document.positions[rows] + 1) // manifest.ratio).unsqueeze(1)
    return (entries >= size) & (entries < (complete // size - 1) * size)


def chunk_recall(manifest: EntryManifest, logits: Tensor, golden: Tensor, candidate: Tensor, budget: float) -> Tensor:
    """Share of each row's golden entries that lie in the chunks chosen: float32 [rows], NaN without golden entries.

    Chunks are ranked as published: by the number of entries above a score of 0.5, equals by their best entry; chosen
    are ``budget`` of the candidates' chunks, at least one.
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
