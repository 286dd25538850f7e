"""Keys and partial sums of checksums, in PyTorch. `reference.slot_checksums` defines the checksum."""

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
GAMMA = 0x9E3779B97F4A7C15
MIX = 0xBF58476D1CE4E5B9


def word_keys(i_word: Tensor) -> Tensor:
    """Odd 64-bit keys of the words with the numbers ``i_word``, as int64: one round of splitmix64."""
    z = (i_word + 1) * _signed(GAMMA)
    return (z ^ ((z >> 32) & 0xFFFFFFFF)) * _signed(MIX) | 1


def _signed(x: int) -> int:
    return x - (1 << 64)


def add_layer(sums: Tensor, kv: Tensor, layer: int, slots: Tensor, chunks: Tensor, scale: Tensor | None) -> None:
    """Add one layer's part of `slot_checksums`; ``chunks``: ``[2, kv_heads, n, chunk_tokens, head_dim]``."""
    words = chunks.flatten(3).view(torch.int32)
    heads = torch.arange(kv.shape[3], device=sums.device) * kv.stride(3)
    parts = torch.arange(2, device=sums.device) * kv.stride(2)
    starts = (layer * kv.stride(1) + parts[:, None] + heads) * kv.dtype.itemsize // 4
    keys = word_keys(starts[:, :, None] + torch.arange(words.shape[-1], device=sums.device))
    sums += ((words.long() & 0xFFFFFFFF) * keys[:, :, None]).sum((0, 1, 3))
    if scale is not None:
        heads = torch.arange(kv.shape[3], device=sums.device) * scale.stride(3)
        parts = torch.arange(2, device=sums.device) * scale.stride(2)
        first = (scale.data_ptr() - kv.data_ptr()) // 4 + layer * scale.stride(1)
        words = scale[slots, layer].view(torch.int32)
        sums += ((words.long() & 0xFFFFFFFF) * word_keys(first + parts[:, None] + heads)).sum((1, 2))
