"""Chunk selection on DeepSeek-V4: scores of chunks from the index keys of their compressed entries.

As in FlashMemory (arXiv 2606.09079): an entry's score is ``max_l σ(Σ_h w_h relu(q_h · k))`` over the target layers l,
and a chunk's score is the number of its entries with a score above a threshold. Ties go to the chunk with the best
entry.
"""

import math

import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.scores import chunk_lse
from forecache.kernels.csa.reference import index_logits

BLOCK_PRODUCTS = 1 << 24
"""Products q·k computed at a time: 64 MiB in float32."""


def record_figures(
    spec: IndexSpec, records: Tensor, queries: Tensor, weights: Tensor | None, slots: Tensor | None = None
) -> Tensor:
    """:func:`entry_logits` for records of kind "entries", :func:`.scores.chunk_lse` for others.

    Raises ValueError if ``weights`` are missing for "entries", or are given for another kind.
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
    """Largest logit of each entry over the target layers and query steps: float32 [entries of a chunk, chunks].

    ``records``: uint8 [chunks, nbytes], or a table of which ``slots``, int64 [chunks], are the rows to read;
    ``queries``: float32 [steps · query heads, index_dim]; ``weights``: float32 [steps · query heads], multiplied by all
    constant factors. Raises ValueError if queries or weights do not fit ``spec``.
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
        stored, scales = spec.stored_keys(rows), spec.stored_scales(rows)
        for layer, members in enumerate(spec.queries_of_kv):
            own = list(members)
            keys = stored[:, layer].float().flatten(0, 1)
            logit = largest_logits(by_step[:, own], weights_of[:, own], keys).view(len(rows), entries)
            if scales is not None:
                logit = logit * scales[:, layer]  # relu(scale · x) = scale · relu(x) for scale ≥ 0
            logits[:, part] = torch.maximum(logits[:, part], logit.T)
    return logits


def largest_logits(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """``max_s Σ_h w_sh relu(q_sh · k)`` of each key: float32 [n], of [steps, heads, dim], [steps, heads], [n, dim]."""
    return index_logits(queries, weights, keys).amax(0)


def chunk_scores(spec: IndexSpec, logits: Tensor) -> Tensor:
    """Scores of chunks, float32 [chunks], from ``logits`` [entries, chunks], a result of :func:`entry_logits`.

    With ``spec.adaptive_entries`` = n the threshold is the n-th largest logit instead of ``spec.threshold``. So the
    count is also useful for a retriever whose scores are all small. DeepSeek-V4 itself selects n = 512 entries.
    """
    if not logits.numel():
        return logits.new_zeros(logits.shape[1])
    if spec.adaptive_entries:
        place = min(spec.adaptive_entries, logits.numel())
        above = logits >= logits.flatten().topk(place).values[-1]
    else:
        above = logits > math.log(spec.threshold / (1 - spec.threshold))
    # the count, plus a fraction in [0, 1) that orders ties by the best logit; float32 sigmoids would round to 1
    best = 0.5 + logits.amax(0).atan() / (math.pi + 1e-3)
    return above.sum(0) + best
