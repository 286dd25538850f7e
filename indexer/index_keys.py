"""Index keys: the small record beside each chunk that the indexer scores instead of the chunk itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, Self

import torch

from forecache.indexer.quantized_lse import quantized_chunk_lse, serves

if TYPE_CHECKING:
    from forecache.indexer.manifest import RetrievalManifest

RECORD_ALIGNMENT_BYTES = 64
BLOCK_HEAD_ELEMENTS = 1 << 18
"""float32 numbers of one KV head decoded at a time: 1 MiB, which stays in a core's cache."""
BLOCK_BYTES = 32 << 20
"""most bytes of records gathered at a time."""
EVENT_SHARE = 0.3
"""Least share of a head's attention on one chunk that is a retrieval event (design §1)."""

Head = tuple[int, int]
"""(layer, head)"""


@dataclass(frozen=True)
class IndexSpec:
    """Which keys a record holds and how they are stored.

    ``kind``: "tokens", every token's key of a few heads; "bounds", minimum and maximum over the chunk of every head;
    "entries", DeepSeek-V4's index keys, of which a chunk has ``chunk_tokens`` for each "KV head", which is a CSA layer
    there (see :mod:`.entry_scores`, also for ``threshold`` and ``adaptive_entries``). ``query_heads``: (layer, query
    head) pairs whose queries score; ``kv_heads``: the (layer, KV head) pairs whose keys are stored; ``query_to_kv``:
    index into ``kv_heads`` for each query head. ``scale`` multiplies q·k. ``dtype`` is what keys are stored in: int8
    goes with a float16 scale per (head, token).
    """

    kind: Literal["tokens", "bounds", "entries"]
    query_heads: tuple[Head, ...]
    kv_heads: tuple[Head, ...]
    query_to_kv: tuple[int, ...]
    head_dim: int
    chunk_tokens: int
    scale: float
    dtype: torch.dtype
    threshold: float = 0.5
    adaptive_entries: int = 0

    def __post_init__(self) -> None:
        if len(self.query_to_kv) != len(self.query_heads):
            raise ValueError(f"{len(self.query_heads)} query heads but {len(self.query_to_kv)} entries in query_to_kv")
        if self.kind == "bounds" and not self.dtype.is_floating_point:
            raise ValueError(f"bounds are stored as floating point, not {self.dtype}")

    @classmethod
    def from_manifest(
        cls,
        manifest: "RetrievalManifest",
        *,
        chunk_tokens: int,
        scale: float | None = None,
        dtype: torch.dtype = torch.int8,
    ) -> Self:
        """Keys of every token of the manifest's retrieval heads; ``scale`` defaults to head_dim ** -0.5."""
        return cls._build(
            "tokens",
            [(head.layer, head.head) for head in manifest.heads],
            manifest.attention_heads // manifest.kv_heads,
            manifest.head_dim,
            chunk_tokens,
            scale,
            dtype,
        )

    @classmethod
    def of_heads(
        cls,
        query_heads: tuple[Head, ...],
        kv_heads: tuple[Head, ...],
        *,
        group: int,
        head_dim: int,
        chunk_tokens: int,
        scale: float,
    ) -> Self:
        """int8 keys of every token of ``kv_heads``, in their order, each read by ``group`` query heads of the model."""
        return cls._build("tokens", query_heads, group, head_dim, chunk_tokens, scale, torch.int8, kv_heads)

    @classmethod
    def bounds(
        cls,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        chunk_tokens: int,
        scale: float | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Per-chunk bounds of every layer and head: what is left to a model without a manifest."""
        queries = [(layer, head) for layer in range(layers) for head in range(heads)]
        return cls._build("bounds", queries, heads // kv_heads, head_dim, chunk_tokens, scale, dtype)

    @classmethod
    def _build(
        cls,
        kind: Literal["tokens", "bounds"],
        query_heads: Sequence[Head],
        group: int,
        head_dim: int,
        chunk_tokens: int,
        scale: float | None,
        dtype: torch.dtype,
        kv_heads: tuple[Head, ...] | None = None,
    ) -> Self:
        owners = [(layer, head // group) for layer, head in query_heads]
        if kv_heads is None:
            kv_heads = tuple(sorted(set(owners)))
        return cls(
            kind=kind,
            query_heads=tuple(query_heads),
            kv_heads=kv_heads,
            query_to_kv=tuple(kv_heads.index(owner) for owner in owners),
            head_dim=head_dim,
            chunk_tokens=chunk_tokens,
            scale=head_dim**-0.5 if scale is None else scale,
            dtype=dtype,
        )

    @property
    def head_elements(self) -> int:
        """Numbers stored for one KV head of one chunk."""
        return (2 if self.kind == "bounds" else self.chunk_tokens) * self.head_dim

    @property
    def key_nbytes(self) -> int:
        return len(self.kv_heads) * self.head_elements * self.dtype.itemsize

    @property
    def scale_nbytes(self) -> int:
        if self.dtype.is_floating_point:
            return 0
        return len(self.kv_heads) * self.chunk_tokens * torch.float16.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of one chunk's record, a multiple of 64: keys, then scales, then padding."""
        return -(-(self.key_nbytes + self.scale_nbytes) // RECORD_ALIGNMENT_BYTES) * RECORD_ALIGNMENT_BYTES

    @cached_property
    def queries_of_kv(self) -> tuple[tuple[int, ...], ...]:
        """For each KV head, the rows of the query matrix that read it."""
        rows: list[list[int]] = [[] for _ in self.kv_heads]
        for row, kv in enumerate(self.query_to_kv):
            rows[kv].append(row)
        return tuple(tuple(row) for row in rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hex name of a record's bytes. Specs that differ only in their query heads may share records."""
        text = repr((1, self.kind, self.kv_heads, self.head_dim, self.chunk_tokens, str(self.dtype)))
        return blake2b(text.encode(), digest_size=16).hexdigest()


def encode_chunks(spec: IndexSpec, keys: torch.Tensor) -> torch.Tensor:
    """Records of finished chunks, uint8 [chunks, nbytes] on the device of ``keys``.

    ``keys``: [chunks, kv_heads, chunk_tokens, head_dim] of any float dtype, RoPE applied, heads in the order
    of ``spec.kv_heads``.
    """
    chunks = keys.shape[0]
    expected = (chunks, len(spec.kv_heads), spec.chunk_tokens, spec.head_dim)
    if tuple(keys.shape) != expected:
        raise ValueError(f"keys have shape {tuple(keys.shape)}, the index spec needs {expected}")
    records = torch.zeros(chunks, spec.nbytes, dtype=torch.uint8, device=keys.device)
    if spec.kind == "bounds":
        stored = torch.stack([keys.amin(2), keys.amax(2)], 2).to(spec.dtype)
    elif spec.dtype.is_floating_point:
        stored = keys.to(spec.dtype)
    else:
        keys = keys.float()
        # no smaller than float16's least normal number, so that a chunk of zeros divides by something
        scales = (keys.abs().amax(3) / 127).clamp(min=2.0**-14).half()
        stored = (keys / scales.unsqueeze(3)).round().clamp(-127, 127).to(torch.int8)
        end = spec.key_nbytes + spec.scale_nbytes
        records[:, spec.key_nbytes : end] = scales.reshape(chunks, -1).view(torch.uint8)
    records[:, : spec.key_nbytes] = stored.reshape(chunks, -1).view(torch.uint8)
    return records


def encode_chunk(spec: IndexSpec, keys: torch.Tensor) -> torch.Tensor:
    """One chunk's record: ``keys`` [kv_heads, chunk_tokens, head_dim] → uint8 [nbytes]."""
    return encode_chunks(spec, keys.unsqueeze(0))[0]


def score_chunks(
    spec: IndexSpec,
    records: torch.Tensor,
    queries: torch.Tensor,
    local_lse: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much of the queries' attention each chunk gets: float32 [chunks], larger is needed sooner.

    ``local_lse``: float32 [query_heads], log-sum-exp of the scaled logits over the tokens that have no record (-inf:
    none). For the rest see :func:`chunk_lse`, for the scores :func:`attention_share`.
    """
    return attention_share(spec, chunk_lse(spec, records, queries, slots), local_lse)


def attention_share(spec: IndexSpec, lse: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """Scores, float32 [chunks], from ``lse`` [query_heads, chunks] of all chunks and ``local_lse`` [query_heads].

    "tokens": exact softmax over all recorded keys and the local ones, summed per chunk, then the maximum over heads.
    "bounds": softmax over the chunks' upper bounds, then the mean over heads.
    """
    return _pooled(spec, head_shares(lse, local_lse))


def _pooled(spec: IndexSpec, shares: torch.Tensor) -> torch.Tensor:
    return shares.amax(0) if spec.kind == "tokens" else shares.mean(0)


def head_shares(lse: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """Share of each head's attention on each chunk: float32 [query_heads, chunks], from ``lse``, alike, of all chunks
    and ``local_lse`` [query_heads] of the tokens that have no record."""
    total = torch.logaddexp(lse.logsumexp(1), local_lse)
    return (lse - total.unsqueeze(1)).exp()


def event_mass(shares: torch.Tensor, threshold: float = EVENT_SHARE) -> torch.Tensor:
    """Mass of the retrieval events on each chunk, float32 [chunks]: those of ``shares`` [heads, chunks] that reach
    ``threshold``, summed over the heads."""
    return shares.masked_fill(~(shares >= threshold), 0.0).sum(0)


def scores_and_events(spec: IndexSpec, lse: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """:func:`attention_share`, and :func:`event_mass` below it: float32 [2, chunks]."""
    shares = head_shares(lse, local_lse)
    return torch.stack([_pooled(spec, shares), event_mass(shares)])


def chunk_lse(
    spec: IndexSpec, records: torch.Tensor, queries: torch.Tensor, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-sum-exp of the scaled logits in each chunk: float32 [query_heads, chunks].

    ``records``: uint8 [chunks, nbytes], or a table of them with ``slots``, int64 [chunks], its rows to read.
    ``queries``: float32 [query_heads, head_dim], RoPE applied. For "bounds" it is Σ_d max(q_d·min_d, q_d·max_d), which
    no q·k in the chunk exceeds (Quest, arXiv 2406.10774). Many int8 records on a CPU are read as
    :mod:`.quantized_lse` does.
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
    """:func:`chunk_lse` in float32, read in blocks, so that memory stays bounded."""
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
    keys = rows[:, : spec.key_nbytes].view(spec.dtype).view(chunks, len(spec.kv_heads), -1, spec.head_dim)
    scaled = queries * spec.scale
    if spec.kind == "bounds":
        # one product with [min, max]: a negative component of q takes the minimum, a positive one the maximum
        scaled = torch.cat([scaled.clamp(max=0), scaled.clamp(min=0)], 1)
        keys = keys.flatten(2).unsqueeze(2)
    scales = None
    if spec.scale_nbytes:
        end = spec.key_nbytes + spec.scale_nbytes
        scales = rows[:, spec.key_nbytes : end].view(torch.float16).view(chunks, len(spec.kv_heads), -1).float()
    lse = queries.new_empty(len(spec.query_heads), chunks)
    for kv, members in enumerate(spec.queries_of_kv):
        group = list(members)
        head_keys = keys[:, kv].float().flatten(0, 1)
        logits = (scaled[group] @ head_keys.T).view(len(group), chunks, -1)
        if scales is not None:
            logits *= scales[:, kv]
        lse[group] = logits.logsumexp(2)
    return lse
