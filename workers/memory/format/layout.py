"""The layout of one chunk's bytes, in a slot of the hot pool and of an arena."""

import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import torch

from forecache.workers.errors import UnsupportedModelError

FIELD_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Field:
    """One named array inside a chunk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ChunkLayout:
    """Fields of a chunk, one after another, each aligned to 256 bytes.

    ``model`` is the model's fingerprint (docs/architecture.md), so that chunks of different weights differ.
    """

    model: str
    chunk_tokens: int
    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Field name -> byte offset in the chunk."""
        offsets, end = {}, 0
        for field in self.fields:
            offsets[field.name] = end
            end += -(-field.nbytes // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES
        return offsets

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one chunk, padding included."""
        return sum(-(-f.nbytes // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES for f in self.fields)

    @cached_property
    def fingerprint(self) -> str:
        """Hex name of (model, chunk size, fields): chunks of equal fingerprints are interchangeable."""
        text = repr((self.model, self.chunk_tokens, [(f.name, f.shape, str(f.dtype)) for f in self.fields]))
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def field(self, name: str) -> Field:
        """The field ``name``; :class:`KeyError` when there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    @cached_property
    def layer_nbytes(self) -> int:
        """Bytes of one layer of a chunk whose fields all begin with the layers."""
        return sum(field.nbytes // field.shape[0] for field in self.fields)

    def layer_parts(self, layer: int) -> list[slice]:
        """The bytes of ``layer`` in a chunk, one slice for each field."""
        sizes = [(self.offsets[field.name], field.nbytes // field.shape[0]) for field in self.fields]
        return [slice(start + layer * size, start + (layer + 1) * size) for start, size in sizes]

    def layer_view(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """``[n, 1, *shape of a layer]`` of field ``name`` over uint8 rows that hold the bytes of :meth:`layer_parts` in
        order."""
        start = 0
        for field in self.fields:
            size = field.nbytes // field.shape[0]
            if field.name == name:
                return rows[:, start : start + size].contiguous().view(field.dtype).view(-1, 1, *field.shape[1:])
            start += size
        raise KeyError(name)

    def view(self, slots: torch.Tensor, name: str) -> torch.Tensor:
        """A typed view ``[slots, *shape]`` of field ``name`` over uint8 ``[slots, nbytes]``, of any row stride."""
        field = self.field(name)
        start = self.offsets[name]
        rows = slots[:, start : start + field.nbytes].view(field.dtype)
        stride = slots.stride(0) // field.dtype.itemsize
        inner = torch.empty(field.shape, device="meta").stride()
        return rows.as_strided((len(slots), *field.shape), (stride, *inner))


def attention_layout(
    model: str, *, layers: int, kv_heads: int, head_dim: int, chunk_tokens: int, dtype: torch.dtype
) -> ChunkLayout:
    """Llama-like models: ``kv: [layers, 2, kv_heads, chunk_tokens, head_dim]``.

    In fp8 also ``scale: [layers, 2, kv_heads]`` float32, the factor of the numbers of a chunk's head.
    """
    fields = [Field("kv", (layers, 2, kv_heads, chunk_tokens, head_dim), dtype)]
    if dtype == torch.float8_e4m3fn:
        fields.append(Field("scale", (layers, 2, kv_heads), torch.float32))
    return ChunkLayout(model, chunk_tokens, tuple(fields))


def cold_layout(hot: ChunkLayout, cold_dtype: Literal["auto", "fp8"]) -> ChunkLayout:
    """Layout of the arena for a pool of layout ``hot``: the same (``auto``, or a pool in fp8), or fp8 K/V.

    Raises :class:`UnsupportedModelError` for fp8 where a chunk is not plain K/V.
    """
    if cold_dtype == "auto":
        return hot
    if {field.name for field in hot.fields} - {"kv", "scale"}:
        raise UnsupportedModelError(
            "--cold-dtype fp8 is for chunks of plain K/V, which this model's are not; use auto."
        )
    return with_dtype(hot, torch.float8_e4m3fn)


def with_dtype(layout: ChunkLayout, dtype: torch.dtype) -> ChunkLayout:
    """The same K/V in ``dtype``; ``layout`` is one of :func:`attention_layout`."""
    layers, _, kv_heads, chunk_tokens, head_dim = layout.field("kv").shape
    return attention_layout(
        layout.model, layers=layers, kv_heads=kv_heads, head_dim=head_dim, chunk_tokens=chunk_tokens, dtype=dtype
    )


def chunk_fingerprint(hot: ChunkLayout, cold: ChunkLayout) -> str:
    """The fingerprint for chunk keys. It covers the cold format too, since chunks in another one come back as other
    numbers."""
    if hot == cold:
        return hot.fingerprint
    return blake2b(f"{hot.fingerprint} {cold.fingerprint}".encode(), digest_size=16).hexdigest()
