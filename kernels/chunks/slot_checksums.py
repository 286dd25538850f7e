"""Checksums of whole pool rows, in Triton, and the keys with which other kernels sum parts of rows.

The memory may be the GPU's, or pinned or registered host memory. In PyTorch: `reference.slot_checksums`.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.chunks import checksums
from forecache.kernels.common import checks

GAMMA: tl.constexpr = tl.constexpr(checksums.GAMMA)
MIX: tl.constexpr = tl.constexpr(checksums.MIX)
_PIECE_WORDS = 8192
_BLOCK_WORDS = 2048


@triton.jit
def word_keys(i_word):
    """uint64 keys of the words with the numbers ``i_word``, uint32: with 64-bit numbers the product would be slower."""
    z = (i_word.to(tl.uint64) + 1) * GAMMA
    z = (z ^ (z >> 32)) * MIX
    return z | 1


@triton.jit
def words_of(b_elements, BLOCK: tl.constexpr):
    """``BLOCK`` neighbouring elements of 1, 2 or 4 bytes as uint32 words, low bytes first."""
    bits: tl.constexpr = b_elements.dtype.primitive_bitwidth
    if bits == 32:
        b_words = b_elements.to(tl.uint32, bitcast=True)
    else:
        per_word: tl.constexpr = 32 // bits
        b_parts = b_elements.to(tl.uint16 if bits == 16 else tl.uint8, bitcast=True)
        # [BLOCK / per_word, per_word]: the parts of a word are in one thread
        b_parts = tl.reshape(b_parts.to(tl.uint32), [BLOCK // per_word, per_word])
        o_shift = (tl.arange(0, per_word) * bits).to(tl.uint32)
        b_words = tl.sum(b_parts << o_shift[None, :], 1)
    return b_words


@triton.jit(do_not_specialize=["first_word"])
def _checksum_kernel(
    memory,  # [slots, words] int32
    slots,  # [n]
    sums,  # [n] int64, zeros
    slot_stride,
    words,
    first_word,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_slot = tl.program_id(1)
    p_row = memory + tl.load(slots + i_slot) * slot_stride
    b_sum = tl.zeros([BLOCK], tl.uint64)
    for start in tl.static_range(0, PIECE, BLOCK):
        o_word = tl.program_id(0) * PIECE + start + tl.arange(0, BLOCK)
        b_words = tl.load(p_row + o_word, mask=o_word < words, other=0).to(tl.uint32, bitcast=True)
        b_sum += word_keys((first_word + o_word).to(tl.uint32)) * b_words.to(tl.uint64)
    tl.atomic_add(sums + i_slot, tl.sum(b_sum, 0).to(tl.int64, bitcast=True), sem="relaxed")


def slot_checksums(memory: Tensor, slots: Tensor, first_word: int = 0) -> Tensor:
    """See `reference.slot_checksums`; the result is on the device of ``slots``."""
    checks.checksums(memory, slots, first_word)
    as_words = memory.view(torch.int32)
    n, words = slots.shape[0], as_words.shape[1]
    sums = torch.zeros(n, dtype=torch.int64, device=slots.device)
    for first in range(0, n, 1 << 15):  # the second axis of a grid has at most 65,535 programs
        some = slots[first : first + (1 << 15)]
        _checksum_kernel[(triton.cdiv(words, _PIECE_WORDS), some.shape[0])](
            as_words, some, sums[first:], as_words.stride(0), words, first_word, PIECE=_PIECE_WORDS, BLOCK=_BLOCK_WORDS
        )
    return sums
