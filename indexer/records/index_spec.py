"""Index records of chunks: their layout, and how keys become records."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal, Self

import torch

from forecache.indexer.records.manifest import RetrievalManifest

RECORD_ALIGNMENT_BYTES = 64


Head = tuple[int, int]
"""(layer, head)"""


@dataclass(frozen=True)
class IndexSpec:
    """Which keys a record holds, how they are stored, and which queries read them.

    Attributes:
        kind: "tokens": the keys of every token of a few heads. "bounds": minimum and maximum over the chunk of the keys
            of every head. "entries": DeepSeek-V4's index keys, ``chunk_tokens`` per chunk and CSA layer; a CSA layer
            takes the place of a KV head. See :mod:`.entry_scores`.
        query_heads: (layer, query head) pairs whose queries score.
        kv_heads: (layer, KV head) pairs whose keys are stored.
        query_to_kv: index into ``kv_heads`` for each query head.
        scale: factor of q·k.
        dtype: of the stored keys. int8 keys have a float16 scale per (head, token).
        threshold, adaptive_entries: for "entries" only, see :func:`.entry_scores.chunk_scores`.
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
        manifest: RetrievalManifest,
        *,
        chunk_tokens: int,
        scale: float | None = None,
    ) -> Self:
        """int8 keys of every token of the manifest's retrieval heads; ``scale`` defaults to head_dim ** -0.5."""
        return cls._build(
            "tokens",
            [(head.layer, head.head) for head in manifest.heads],
            manifest.attention_heads // manifest.kv_heads,
            manifest.head_dim,
            chunk_tokens,
            scale,
            torch.int8,
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
        """int8 keys of every token of ``kv_heads``, in their order. ``group``: the model's query heads per KV head."""
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
    ) -> Self:
        """float16 bounds per chunk of the keys of every layer and KV head, for a model without a manifest."""
        queries = [(layer, head) for layer in range(layers) for head in range(heads)]
        return cls._build("bounds", queries, heads // kv_heads, head_dim, chunk_tokens, scale, torch.float16)

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
        """Elements stored for one KV head of one chunk."""
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

    def stored_keys(self, records: torch.Tensor) -> torch.Tensor:
        """Keys in ``records``, uint8 [chunks, nbytes], without their scales.

        A view [chunks, kv_heads, chunk_tokens (for "bounds": 2), head_dim] of :attr:`dtype`.
        """
        keys = records[:, : self.key_nbytes].view(self.dtype)
        return keys.view(len(records), len(self.kv_heads), -1, self.head_dim)

    def stored_scales(self, records: torch.Tensor) -> torch.Tensor | None:
        """Scales in ``records``: float32 [chunks, kv_heads, chunk_tokens]; None if keys are floating point."""
        if not self.scale_nbytes:
            return None
        scales = records[:, self.key_nbytes : self.key_nbytes + self.scale_nbytes].contiguous().view(torch.float16)
        return scales.view(len(records), len(self.kv_heads), -1).float()

    @cached_property
    def queries_of_kv(self) -> tuple[tuple[int, ...], ...]:
        """For each KV head, the indices of the query heads that read it."""
        rows: list[list[int]] = [[] for _ in self.kv_heads]
        for row, kv in enumerate(self.query_to_kv):
            rows[kv].append(row)
        return tuple(tuple(row) for row in rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the records' layout. Specs that differ only in their query heads can share records."""
        text = repr((1, self.kind, self.kv_heads, self.head_dim, self.chunk_tokens, str(self.dtype)))
        return blake2b(text.encode(), digest_size=16).hexdigest()


def encode_chunks(spec: IndexSpec, keys: torch.Tensor) -> torch.Tensor:
    """Records of complete chunks, uint8 [chunks, nbytes] on the device of ``keys``.

    ``keys``: [chunks, kv_heads, chunk_tokens, head_dim] of any float dtype, RoPE applied, heads in the order of
    ``spec.kv_heads``. Raises ValueError for another shape.
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
        # at least float16's smallest normal number, so that keys of zeros are not divided by zero
        scales = (keys.abs().amax(3) / 127).clamp(min=2.0**-14).half()
        stored = (keys / scales.unsqueeze(3)).round().clamp(-127, 127).to(torch.int8)
        end = spec.key_nbytes + spec.scale_nbytes
        records[:, spec.key_nbytes : end] = scales.reshape(chunks, -1).view(torch.uint8)
    records[:, : spec.key_nbytes] = stored.reshape(chunks, -1).view(torch.uint8)
    return records


def encode_chunk(spec: IndexSpec, keys: torch.Tensor) -> torch.Tensor:
    """One chunk's record: ``keys`` [kv_heads, chunk_tokens, head_dim] → uint8 [nbytes]."""
    return encode_chunks(spec, keys.unsqueeze(0))[0]
