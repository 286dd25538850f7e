"""Scores of chunks: the share of a head's attention on each chunk, computed from index records."""

import torch

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.quantized_lse import quantized_chunk_lse, serves

BLOCK_HEAD_ELEMENTS = 1 << 18
"""float32 elements of one KV head decoded at a time: 1 MiB, which fits a core's cache."""
BLOCK_BYTES = 32 << 20
"""Most bytes of records gathered at a time."""
EVENT_SHARE = 0.3
"""Least share of a head's attention on one chunk that is a retrieval event (docs/architecture.md)."""


def head_shares(lse: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """Share of each head's attention on each chunk: float32 [query_heads, chunks].

    ``lse``: float32 [query_heads, chunks], from :func:`chunk_lse` for all recorded chunks; ``local_lse``: float32
    [query_heads], log-sum-exp of the scaled logits over the tokens without a record, -inf if there are none.
    """
    total = torch.logaddexp(lse.logsumexp(1), local_lse)
    return (lse - total.unsqueeze(1)).exp()


def event_mass(shares: torch.Tensor) -> torch.Tensor:
    """Mass of the retrieval events on each chunk, float32 [chunks]: the sum over the heads of those ``shares`` [heads,
    chunks] that are at least :data:`EVENT_SHARE`."""
    return shares.masked_fill(~(shares >= EVENT_SHARE), 0.0).sum(0)


def scores_and_events(spec: IndexSpec, lse: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """Scores of chunks and their :func:`event_mass`: float32 [2, chunks].

    ``lse``, ``local_lse``: as for :func:`head_shares`. The score of "tokens" is the largest share of any head, that of
    "bounds" the mean share over the heads, where a share comes from the chunks' upper bounds.
    """
    shares = head_shares(lse, local_lse)
    return torch.stack([shares.amax(0) if spec.kind == "tokens" else shares.mean(0), event_mass(shares)])


def chunk_lse(
    spec: IndexSpec, records: torch.Tensor, queries: torch.Tensor, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-sum-exp of the scaled logits in each chunk: float32 [query_heads, chunks].

    ``records``: uint8 [chunks, nbytes], or a table of which ``slots``, int64 [chunks], are the rows to read.
    ``queries``: float32 [query_heads, head_dim], RoPE applied. For "bounds" it is Σ_d max(q_d·min_d, q_d·max_d), an
    upper bound of every q·k in the chunk (Quest, arXiv 2406.10774). On a CPU, many int8 records are read by
    :mod:`.quantized_lse`. Raises ValueError if ``queries`` do not fit ``spec``.
    """
    count = len(records) if slots is None else len(slots)
    if not serves(spec, records, count):
        return exact_chunk_lse(spec, records, queries, slots)
    _check_queries(spec, queries)
    lse = quantized_chunk_lse(spec, records, queries, slots)
    lost = lse.isnan().any(0).nonzero().squeeze(1)
    if len(lost):
        lse[:, lost] = exact_chunk_lse(spec, records, queries, lost if slots is None else slots[lost])
    return lse


def exact_chunk_lse(
    spec: IndexSpec, records: torch.Tensor, queries: torch.Tensor, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`chunk_lse` in float32, in blocks, so that memory stays bounded."""
    _check_queries(spec, queries)
    chunks = len(records) if slots is None else len(slots)
    lse = queries.new_empty(len(spec.query_heads), chunks)
    block = max(1, min(BLOCK_HEAD_ELEMENTS // spec.head_elements, BLOCK_BYTES // spec.nbytes))
    for start in range(0, chunks, block):
        part = slice(start, start + block)
        rows = records[part] if slots is None else records.index_select(0, slots[part])
        lse[:, start : start + block] = _block_lse(spec, rows, queries)
    return lse


def _check_queries(spec: IndexSpec, queries: torch.Tensor) -> None:
    if queries.shape != (len(spec.query_heads), spec.head_dim):
        raise ValueError(f"queries have shape {tuple(queries.shape)}, not {(len(spec.query_heads), spec.head_dim)}")


def _block_lse(spec: IndexSpec, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the scaled logits in each chunk of ``rows``: float32 [query_heads, chunks]."""
    chunks = len(rows)
    keys, scales = spec.stored_keys(rows), spec.stored_scales(rows)
    scaled = queries * spec.scale
    if spec.kind == "bounds":
        # one product with [min, max]: a negative component of q multiplies the minimum, a positive one the maximum
        scaled = torch.cat([scaled.clamp(max=0), scaled.clamp(min=0)], 1)
        keys = keys.flatten(2).unsqueeze(2)
    lse = queries.new_empty(len(spec.query_heads), chunks)
    for kv, members in enumerate(spec.queries_of_kv):
        group = list(members)
        head_keys = keys[:, kv].float().flatten(0, 1)
        logits = (scaled[group] @ head_keys.T).view(len(group), chunks, -1)
        if scales is not None:
            logits *= scales[:, kv]
        lse[group] = logits.logsumexp(2)
    return lse
