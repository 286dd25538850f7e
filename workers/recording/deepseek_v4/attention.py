"""DeepSeek-V4's attention over whole sequences, in plain PyTorch with gradients, for `forward.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEGMENT = 2048
"""Queries whose logits over all entries are in memory at a time."""


@dataclass(frozen=True)
class CsaCapture:
    """Intermediate results of one CSA layer, for recordings. ``number`` counts CSA layers from 0.

    ``hidden``: [batch, tokens, hidden], the attention's input. ``index_keys``: [batch, entries, index_dim].
    ``queries``: [batch, tokens, heads, head_dim], rotated; ``entries``: [batch, entries, head_dim].
    ``near_lse``: [batch, tokens, heads], log-sum-exp of window and sink.
    """

    number: int
    hidden: Tensor
    index_queries: Tensor
    index_weights: Tensor
    index_keys: Tensor
    queries: Tensor
    entries: Tensor
    near_lse: Tensor


@dataclass
class Entries:
    """Compressed entries [batch, entries, head_dim], one per ``ratio`` tokens.

    ``index``: queries, weights and keys of the Lightning Indexer, which selects ``topk`` entries; None: all are read.
    """

    entries: Tensor
    ratio: int
    index: tuple[Tensor, Tensor, Tensor] | None = None
    topk: int = 0

    def allowed(self, start: int, end: int) -> Tensor:
        """The entries that each query of [start, end) attends to: bool [1 or batch, queries, entries up to ``end``]."""
        entries = end // self.ratio
        complete = (torch.arange(start, end, device=self.entries.device) + 1) // self.ratio
        causal = (torch.arange(entries, device=self.entries.device) < complete.unsqueeze(1)).unsqueeze(0)
        if self.index is None or entries <= self.topk:
            return causal
        with torch.no_grad():
            queries, weights, keys = self.index
            scores = index_scores(queries[:, start:end], weights[:, start:end], keys[:, :entries])
            return keep_best(scores, causal, self.topk)


def keep_best(scores: Tensor, seen: Tensor, topk: int) -> Tensor:
    """The ``topk`` entries with the highest ``scores`` [..., Q, E] among ``seen``, bool [..., Q, E]. E > ``topk``."""
    best = scores.masked_fill_(~seen, -torch.inf).topk(topk, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & seen


def index_scores(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """``Σ_h w_h relu(q_h · k)``, [batch, Q, E] of [batch, Q, heads, dim], [batch, Q, heads], [batch, E, dim]."""
    batch, count, heads, _ = queries.shape
    products = (queries.flatten(1, 2) @ keys.transpose(1, 2)).relu().view(batch * count, heads, -1)
    scores: Tensor = torch.bmm(weights.to(products.dtype).reshape(batch * count, 1, heads), products)
    return scores.view(batch, count, -1).float()


def index_of(
    indexer: Any, x: Tensor, low: Tensor, cos: Tensor, sin: Tensor, *, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The Lightning Indexer's queries, weights of heads (constant factors included) and keys."""
    with torch.set_grad_enabled(trains):
        queries = indexer.q_b_proj(low).unflatten(-1, (indexer.num_heads, -1))
        queries = rotate(queries, cos.unsqueeze(1), sin.unsqueeze(1))
        scorer = indexer.scorer
        weights = scorer.weights_proj(x) * (scorer.softmax_scale * scorer.weights_scaling)
        return queries, weights, compress(indexer, x, cos, sin, overlap=True)


def index_loss(capture: CsaCapture, positions: Tensor, scale: float, ratio: int) -> Tensor:
    """KL divergence of the indexer's distribution over entries from the model's attention, at ``positions``.

    The target is the attention on entries, summed over heads and normalised. Each query is weighted by the share of its
    attention that goes to entries.
    """

    def at(x: Tensor) -> Tensor:
        return x.gather(1, positions.view(*positions.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    entries = capture.entries.detach()
    seen = torch.arange(entries.shape[1], device=entries.device) < ((positions + 1) // ratio).unsqueeze(2)
    with torch.no_grad():
        q = at(capture.queries)
        logits = (q.flatten(1, 2) @ entries.transpose(1, 2)).view(*q.shape[:3], -1).float() * scale
        logits = logits.masked_fill_(~seen.unsqueeze(2), -torch.inf)
        total = torch.logaddexp(logits.logsumexp(3), at(capture.near_lse))
        shares = (logits - total.unsqueeze(3)).exp().mean(2)
        mass = shares.sum(2, keepdim=True)
        target = shares / mass.clamp(min=1e-9)
    with torch.enable_grad():
        scores = index_scores(at(capture.index_queries), at(capture.index_weights), capture.index_keys)
        chosen = scores.masked_fill(~seen, -1e9).log_softmax(2)
        divergence = (target * (target.clamp(min=1e-9).log() - chosen)).sum(2)
        return (divergence * mass.squeeze(2)).sum() / mass.sum().clamp(min=1e-6)


def attend(
    q: Tensor, kv: Tensor, sinks: Tensor, window: int, scale: float, far: Entries | None, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention over window, entries and sinks.

    Returns the output [batch, tokens, heads, head_dim], and the log-sum-exp of window and sink if ``wants_lse``.

    ``q``: [batch, tokens, heads, head_dim]; ``kv``: [batch, tokens, head_dim], keys and values of all heads.
    """
    batch, tokens, heads, dim = q.shape
    blocks = tokens // window
    own = kv.view(batch, blocks, window, dim)
    keys = torch.cat([nn.functional.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1], own], 2)
    near = q.reshape(batch, blocks, window * heads, dim) @ keys.transpose(2, 3)
    place = torch.arange(window, device=q.device).unsqueeze(1)
    distance = place + window - torch.arange(2 * window, device=q.device)
    outside = ((distance < 0) | (distance >= window)).expand(blocks, -1, -1).clone()
    outside[0, :, :window].fill_(True)
    near = (near.view(batch, blocks, window, heads, -1).float() * scale).masked_fill(outside.unsqueeze(2), -torch.inf)
    near = near.view(batch, tokens, heads, 2 * window)
    sink = sinks.float().view(1, 1, heads, 1).expand(batch, tokens, heads, 1)

    near_shares, far_out = [], []
    segment = max(window, SEGMENT // window * window)
    for start in range(0, tokens, segment):
        end = min(start + segment, tokens)
        logits = [near[:, start:end], sink[:, start:end]]
        entries = 0 if far is None else end // far.ratio
        if far is not None and entries:
            read = far.entries[:, :entries]
            over = q[:, start:end].reshape(batch, -1, dim) @ read.transpose(1, 2)
            over = over.view(batch, end - start, heads, entries).float() * scale
            logits.append(over.masked_fill(~far.allowed(start, end).unsqueeze(2), -torch.inf))
        shares = torch.cat(logits, 3).softmax(3).to(q.dtype)
        near_shares.append(shares[..., : 2 * window])
        if far is not None and entries:
            of_far = shares[..., 2 * window + 1 :].reshape(batch, -1, entries)
            far_out.append((of_far @ read).view(batch, end - start, heads, dim))
        elif far is not None:
            far_out.append(torch.zeros_like(q[:, start:end]))
    out = torch.cat(near_shares, 1).reshape(batch, blocks, window * heads, -1) @ keys
    out = out.view(q.shape)
    if far is not None:
        out = out + torch.cat(far_out, 1)
    lse = None
    if wants_lse:
        with torch.no_grad():
            lse = torch.logaddexp(near.logsumexp(3), sink.squeeze(3))
    return out, lse


def compress(module: Any, x: Tensor, cos: Tensor, sin: Tensor, *, overlap: bool) -> Tensor:
    """Entries [batch, tokens // ratio, dim]: every ``ratio`` tokens by a softmax gate per channel; with ``overlap`` a
    second series of the ``ratio`` tokens before them too (DeepSeek-V4, §2.3)."""
    ratio, dim = module.compress_rate, module.head_dim
    count = x.shape[1] // ratio
    x = x[:, : count * ratio]
    kv = module.kv_proj(x).unflatten(1, (count, ratio))
    gate = module.gate_proj(x).unflatten(1, (count, ratio)).float() + module.position_bias.float()
    if overlap:
        kv = torch.cat([nn.functional.pad(kv[..., :dim], (0, 0, 0, 0, 1, 0))[:, :count], kv[..., dim:]], 2)
        before = nn.functional.pad(gate[..., :dim], (0, 0, 0, 0, 1, 0), value=-torch.inf)[:, :count]
        gate = torch.cat([before, gate[..., dim:]], 2)
    pooled = module.kv_norm((kv * gate.softmax(2).to(kv.dtype)).sum(2))
    return rotate(pooled, cos[: count * ratio : ratio], sin[: count * ratio : ratio])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs in the last ``2 · cos.shape[-1]`` dims."""
    size = 2 * cos.shape[-1]
    even, odd = x[..., -size:].float().view(*x.shape[:-1], size // 2, 2).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([x[..., :-size], rotated.to(x.dtype)], -1)
