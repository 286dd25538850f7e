"""The bytes of one chunk, described: what a slot of the hot pool and of an arena holds."""

import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch

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
    """Fields of a chunk, laid one after another, each aligned to 256 bytes.

    ``model`` is the model's fingerprint (design §3): it makes chunks of different weights different.
    """

    model: str
    chunk_tokens: int
    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Field name → byte offset in the chunk."""
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

    def view(self, slots: torch.Tensor, name: str) -> torch.Tensor:
        """A typed view ``[slots, *shape]`` of field ``name`` over uint8 ``[slots, nbytes]``, of any row stride."""
        field = next(f for f in self.fields if f.name == name)
        start = self.offsets[name]
        rows = slots[:, start : start + field.nbytes].view(field.dtype)
        stride = slots.stride(0) // field.dtype.itemsize
        inner = torch.empty(field.shape, device="meta").stride()
        return rows.as_strided((len(slots), *field.shape), (stride, *inner))


def attention_layout(
    model: str, *, layers: int, kv_heads: int, head_dim: int, chunk_tokens: int, dtype: torch.dtype
) -> ChunkLayout:
    """Llama-like models: one field ``kv: [layers, 2, kv_heads, chunk_tokens, head_dim]``."""
    return ChunkLayout(model, chunk_tokens, (Field("kv", (layers, 2, kv_heads, chunk_tokens, head_dim), dtype),))
