"""Level 1 on DeepSeek-V4: scores of chunks from the index keys of their compressed entries.

As FlashMemory publishes it (arXiv 2606.09079): an entry's score is ``max_l σ(Σ_h w_h relu(q_h · k))`` over the target
layers l, a chunk's score the number of its entries whose score is above a threshold. Of chunks with as many such
entries the one with the best entry comes first.
"""

import math

import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.scores import chunk_lse
from forecache.kernels.csa.reference import index_logits

BLOCK_PRODUCTS = 1 << 24
"""q·k computed at a time: 64 MiB in float32."""


def record_figures(
    spec: IndexSpec, records: Tensor, queries: Tensor, weights: Tensor | None, slots: Tensor | None = None
) -> Tensor:
    """What is to be known of each record to score it: :func:`entry_logits` or :func:`.scores.chunk_lse`.

    Raises ValueError where ``weights`` are missing, or are there and should not be.
    """
    if (weights is None) == (spec.kind == "entries"):
        wanted = "without" if weights is not None else "with"
        raise ValueError(f"queries for index keys of kind '{spec.kind}' come {wanted} weights of their heads")
    if weights is None:
        return chunk_lse(spec, records, queries, slots)
    return entry_logits(spec, records, queries, weights, slots)


def entry_logits(
    spec: IndexSpec, records: Tensor, queries: Tensor, weights: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Largest logit of each entry over the target layers and the steps that ask: float32 [entries of a chunk, chunks].

    ``records``: uint8 [chunks, nbytes], or a table of them with ``slots``, int64 [chunks], its rows to read;
    ``queries``: float32 [steps · query heads, index_dim]; ``weights``: float32 [steps · query heads], with all constant
    factors.
    """
    count = len(spec.query_heads)
    steps = len(queries) // count
    if not steps or queries.shape != (steps * count, spec.head_dim) or weights.shape != (steps * count,):
        raise ValueError(f"queries {tuple(queries.shape)}, weights {tuple(weights.shape)}: not those of the index spec")
    by_step, weights_of = queries.view(steps, count, spec.head_dim), weights.view(steps, count)
    chunks, entries = len(records) if slots is None else len(slots), spec.chunk_tokens
    logits = queries.new_full((entries, chunks), -math.inf)
    heads = max(len(rows) for rows in spec.queries_of_kv)
    block = max(1, BLOCK_PRODUCTS // (steps * heads * entries))
    for start in range(0, chunks, block):
        part = slice(start, start + block)
        rows = records[part] if slots is None else records.index_select(0, slots[part])
        stored = rows[:, : spec.key_nbytes].view(spec.dtype).view(len(rows), len(spec.kv_heads), entries, spec.head_dim)
        scales = None
        if spec.scale_nbytes:
            end = spec.key_nbytes + spec.scale_nbytes
            scales = rows[:, spec.key_nbytes : end].view(torch.float16).view(len(rows), len(spec.kv_heads), entries)
        for layer, members in enumerate(spec.queries_of_kv):
            own = list(members)
            keys = stored[:, layer].float().flatten(0, 1)
            logit = largest_logits(by_step[:, own], weights_of[:, own], keys).view(len(rows), entries)
            if scales is not None:
                logit = logit * scales[:, layer].float()  # it is not negative, so it passes through relu
            logits[:, part] = torch.maximum(logits[:, part], logit.T)
    return logits


def largest_logits(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """``max_s Σ_h w_sh relu(q_sh · k)`` of each key: float32 [n], of [steps, heads, dim], [steps, heads], [n, dim]."""
    return index_logits(queries, weights, keys).amax(0)


def chunk_scores(spec: IndexSpec, logits: Tensor) -> Tensor:
    """Scores of chunks, float32 [chunks], from ``logits`` [entries, chunks] as of :func:`entry_logits`.

    With ``spec.adaptive_entries`` the threshold is no fixed one: it is the score of the entry that comes in that place
    (of the best 512, say, which is what the model itself would select), so that the count means the same for a
    retriever whose scores are small everywhere.
    """
    if not logits.numel():
        return logits.new_zeros(logits.shape[1])
    if spec.adaptive_entries:
        place = min(spec.adaptive_entries, logits.numel())
        above = logits >= logits.flatten().topk(place).values[-1]
    else:
        above = logits > math.log(spec.threshold / (1 - spec.threshold))
    # a count, and in [0, 1) behind it the best entry, in an order that a sigmoid in float32 would lose
    best = 0.5 + logits.amax(0).atan() / (math.pi + 1e-3)
    return above.sum(0) + best
