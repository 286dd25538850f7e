"""Chunk kernels in plain PyTorch: the CPU backend, and the reference in the tests of the Triton kernels."""

from itertools import pairwise

import torch
from torch import Tensor

from forecache.kernels.chunks import checksums
from forecache.kernels.common import checks
from forecache.kernels.common.columns import Columns

FP8_MAX = 448.0  # of float8_e4m3fn
SCALE_MIN = torch.finfo(torch.float32).tiny  # the smallest number whose reciprocal is finite


def slot_checksums(memory: Tensor, slots: Tensor, first_word: int = 0) -> Tensor:
    """Multilinear checksums of rows (Lemire and Kaser, arXiv 1202.4961, section 2, without the constant).

    ``memory``: uint8 ``[slots, nbytes]``, ``nbytes`` a multiple of 4; ``slots``: int64 ``[n]``. Returns int64
    ``[n]``: the sum of key(i) * w(i) modulo 2^64 over a row's little-endian unsigned 32-bit words, in two's complement.
    Keys are odd, so a change of one word always changes the sum. The checksum of a row is the sum of the checksums of
    its parts: if ``memory`` holds only part of longer rows, ``first_word`` is the row's word at which it begins.
    """
    checks.checksums(memory, slots, first_word)
    words = memory.view(torch.int32)
    sums = torch.zeros(len(slots), dtype=torch.int64, device=slots.device)
    block = max(64, (1 << 22) // max(1, len(slots)))
    for first in range(0, words.shape[1], block):
        some = words[:, first : first + block].index_select(0, slots).long() & 0xFFFFFFFF
        start = first_word + first
        sums += (some * checksums.word_keys(torch.arange(start, start + some.shape[1], device=slots.device))).sum(1)
    return sums


def score_chunks(
    records: Tensor,
    slots: Tensor,
    queries: Tensor,
    query_starts: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    copies: Tensor | None = None,
    copy_slots: Tensor | None = None,
    into: Columns | None = None,
) -> Tensor:
    """Log-sum-exp of each query's logits over each chunk's tokens: float32 ``[query_heads, n]``, all sums in float32.

    Args:
        records: uint8 ``[rows, nbytes]``. A row holds keys ``[kv_heads, chunk_tokens, head_dim]`` of ``dtype``, then
            for int8 their float16 scales ``[kv_heads, chunk_tokens]``, then padding.
        slots: int64 ``[n]``, the rows to read.
        queries: float32 ``[query_heads, head_dim]``, already multiplied by the scale of the logits.
        query_starts: int32 ``[kv_heads + 1]``; queries ``query_starts[h]`` to ``query_starts[h + 1]`` read KV head h.
        copies, copy_slots: a table like ``records``, and the rows of it, int64 ``[n]``, that receive a copy of what
            was read, without padding. They differ from each other; -1: no copy.
        into: write the result there; see `Columns`.
    """
    checks.records(records, slots, queries, query_starts, chunk_tokens, dtype, copies, copy_slots, into)
    some = slice(None) if into is None else slice(*into.span.tolist())
    slots, copy_slots = slots[some], None if copy_slots is None else copy_slots[some]
    n, kv_heads, (query_heads, head_dim) = len(slots), len(query_starts) - 1, queries.shape
    rows, key_bytes = records.index_select(0, slots), kv_heads * chunk_tokens * head_dim * dtype.itemsize
    end = key_bytes if dtype.is_floating_point else key_bytes + 2 * kv_heads * chunk_tokens
    if copies is not None and copy_slots is not None:
        copies[copy_slots[copy_slots >= 0], :end] = rows[copy_slots >= 0, :end]
    keys = rows[:, :key_bytes].view(dtype).view(n, kv_heads, chunk_tokens, head_dim)
    scales = rows[:, key_bytes:end].view(torch.float16).view(n, kv_heads, chunk_tokens) if end > key_bytes else None
    lse = torch.empty(query_heads, n, device=slots.device)
    for h, (first, last) in enumerate(pairwise(query_starts.tolist())):
        logits = torch.einsum("gd,ntd->gnt", queries[first:last], keys[:, h].float())
        lse[first:last] = (logits if scales is None else logits * scales[:, h].float()).logsumexp(2)
    if into is not None:
        into.lse[:, into.columns[some]] = lse
    return lse if into is None else into.lse


def quantize_chunks(kv: Tensor, slots: Tensor, out_kv: Tensor, out_scale: Tensor, out_slots: Tensor) -> None:
    """Quantise chunks to fp8 with one scale per (chunk, layer, keys or values, head): largest magnitude / 448.

    The scale of zeros is 1. ``kv``: ``[slots, layers, 2, kv_heads, chunk_tokens, head_dim]``, read at ``slots``;
    ``out_kv``: float8_e4m3fn of the same shape except for the number of slots, and ``out_scale``: float32 ``[slots,
    layers, 2, kv_heads]``, both written at ``out_slots``. ``slots``, ``out_slots``: int64 ``[n]``. One head of one
    chunk must be contiguous; other strides are free.
    """
    checks.chunks(kv, slots, out_kv, out_slots, fp8=out_kv, scale=out_scale)
    chunks = kv.index_select(0, slots).float()
    amax = chunks.flatten(4).abs().amax(-1)
    scale = (amax / FP8_MAX).clamp(min=SCALE_MIN).where(amax > 0, torch.ones((), device=amax.device))
    out_scale[out_slots] = scale
    quantized = (chunks * (1 / scale)[..., None, None]).to(out_kv.dtype)
    out_kv.view(torch.uint8)[out_slots] = quantized.view(torch.uint8)


def dequantize_chunks(kv: Tensor, scale: Tensor, slots: Tensor, out_kv: Tensor, out_slots: Tensor) -> None:
    """The inverse of `quantize_chunks`: fp8 ``kv`` at ``slots`` times ``scale``, written to ``out_kv``."""
    checks.chunks(kv, slots, out_kv, out_slots, fp8=kv, scale=scale)
    chunks = kv.view(torch.uint8).index_select(0, slots).view(kv.dtype).float()
    out_kv[out_slots] = (chunks * scale[slots][..., None, None]).to(out_kv.dtype)
