"""Attention kernels in plain PyTorch: the CPU backend, and the reference in the tests of the Triton kernels.

`kv` is one field of the hot pool, ``[slots, layers, 2, kv_heads, chunk_tokens, head_dim]`` with any slot
stride: keys at index 0 of the third axis, values at 1. Query head ``h`` reads KV head ``h // (heads //
kv_heads)``. ``layer`` may be a tensor of one integer, which a captured CUDA graph reads at each replay.
"""

import math
from typing import cast

import torch
from torch import Tensor

from forecache.kernels.chunks import checksums
from forecache.kernels.chunks.reference import FP8_MAX, SCALE_MIN
from forecache.kernels.common import checks

_FUSED_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_LOGITS = 1 << 26
_PIECE_TOKENS = 16384
"""Tokens of the past that `ragged_prefill` gathers at once."""


def sparse_decode(
    q: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per sequence over the chunks in its row of the block table.

    Args:
        q: ``[batch, heads, head_dim]``.
        block_table: integer ``[batch, max_chunks]`` of slots.
        context_lens: integer ``[batch]``, tokens to attend to. They fill the chunks in the first
            ``ceil(len / chunk_tokens)`` entries of the row; the last chunk holds the remainder.
        scale: factor of the logits.
        k_scale, v_scale: float32 ``[slots, layers, kv_heads]``, factors of fp8 keys and values.

    Returns:
        out like ``q`` and lse float32 ``[batch, heads]``, the natural log of the sum of exp(scaled logits). A
        sequence of length 0 has out 0 and lse -inf.
    """
    batch, heads, head_dim = q.shape
    kv_heads, chunk_tokens = kv.shape[3:5]
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads), -math.inf, dtype=torch.float32, device=q.device)
    for i, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        slots = block_table[i, : -(-length // chunk_tokens)].long()
        k, v = gather_layer(kv, layer, slots)
        if k_scale is not None and v_scale is not None:
            k = _dequantize(k, k_scale[slots, layer], chunk_tokens)
            v = _dequantize(v, v_scale[slots, layer], chunk_tokens)
        row = q[i : i + 1].to(torch.float32 if k_scale is not None else q.dtype)
        k, v = k[:, :length].to(row.dtype), v[:, :length].to(row.dtype)
        grouped_out, grouped_lse = attend_grouped(row.reshape(kv_heads, -1, head_dim), k, v, scale)
        out[i] = grouped_out.reshape(heads, head_dim)
        lse[i] = grouped_lse.reshape(heads)
    return out, lse


def ragged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    starts: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens of several sequences, packed one after another, over their past and themselves.

    Args:
        q: ``[tokens, heads, head_dim]``.
        k, v: ``[tokens, kv_heads, head_dim]`` of ``q``'s dtype, the new tokens' own keys and values. A token sees
            those of its sequence up to its own; the pool need not contain them.
        block_table: int32 ``[sequences, max_chunks]`` of slots. ``max_chunks`` may be 0.
        past_lens: int32 ``[sequences]``, earlier tokens, all of which the new ones see. They fill the chunks in the
            first ``ceil(len / chunk_tokens)`` entries of the row, in any order; the last chunk holds the remainder.
        starts: int32 ``[sequences + 1]``, not decreasing: sequence ``s`` has the tokens ``starts[s]`` to
            ``starts[s + 1]`` (exclusive). Tokens before ``starts[0]`` and from ``starts[-1]`` on have no sequence.
        scale: factor of the logits.
        k_scale, v_scale: float32 ``[slots, layers, kv_heads]``, factors of fp8 keys and values in the pool.

    Returns:
        out like ``q`` and lse float32 ``[tokens, heads]``, the natural log of the sum of exp(scaled logits), which
        `merge_partials` needs for attention to more of the past. Tokens without a sequence have out 0 and lse -inf.
    """
    checks.ragged(q, k, v, kv, layer, block_table, past_lens, starts, k_scale, v_scale)
    kv_heads, chunk_tokens = kv.shape[3:5]
    group = q.shape[1] // kv_heads
    piece = max(1, _PIECE_TOKENS // chunk_tokens)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
    bounds = starts.tolist()
    for i, past in enumerate(past_lens.tolist()):
        own = slice(bounds[i], bounds[i + 1])
        if own.start == own.stop:
            continue
        heads_q = q[own].transpose(0, 1)
        own_k, own_v = (x[own].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        part_out, part_lse = attend_causal(heads_q, own_k, own_v, scale)
        # [kv_heads, group * tokens], so that one product reads K/V once for a group's heads; sums in float32
        rows, total_out = (x.reshape(kv_heads, -1, x.shape[2]) for x in (heads_q, part_out.float()))
        total_lse = part_lse.reshape(kv_heads, -1)
        slots = block_table[i, : -(-past // chunk_tokens)].long()
        for first in range(0, len(slots), piece):
            part = slots[first : first + piece]
            past_k, past_v = gather_layer(kv, layer, part)
            if k_scale is not None and v_scale is not None:
                past_k = _dequantize(past_k, k_scale[part, layer], chunk_tokens)
                past_v = _dequantize(past_v, v_scale[part, layer], chunk_tokens)
            keys = slice(past - first * chunk_tokens)
            partial = attend_grouped(rows, past_k[:, keys].to(q.dtype), past_v[:, keys].to(q.dtype), scale)
            total_out, total_lse = merge_partials(total_out, total_lse, *partial)
        out[own] = total_out.view(part_out.shape).transpose(0, 1).to(q.dtype)
        lse[own] = total_lse.view(part_lse.shape).T
    return out, lse


def chunk_mass(
    q: Tensor,
    lse: Tensor,
    kv: Tensor,
    layers: Tensor,
    kv_heads: Tensor,
    block_table: Tensor,
    positions: Tensor,
    starts: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The largest share of attention that some tokens of a sequence, at some heads, put on each of its chunks.

    Args:
        q: ``[rows, pairs, head_dim]``, queries of tokens at pairs of a layer and a query head.
        lse: float32 ``[rows, pairs]``, the natural log of the sum of exp(scaled logits) of a row's whole attention.
        layers, kv_heads: integer ``[pairs]``, the layer of a pair and the KV head of its query head.
        block_table: int32 ``[sequences, max_chunks]``, slots of all chunks of a sequence, in the order of its tokens.
            Entries of chunks that none of its rows sees are not read.
        positions: integer ``[rows]``, a row's position in its sequence: it sees the tokens up to and including it,
            which are all in the pool.
        starts: int32 ``[sequences + 1]``, not decreasing: sequence ``s`` has the rows ``starts[s]`` to
            ``starts[s + 1]`` (exclusive).
        scale: factor of the logits.
        k_scale: float32 ``[slots, layers, kv_heads]``, factors of fp8 keys.

    Returns:
        float32 ``[sequences, max_chunks]``, rounded to three decimals: many shares are nearly 1, and rounding errors,
        which depend on where a prompt was cut into steps, must not choose among them. Chunks that no row sees have 0.
    """
    checks.mass(q, lse, kv, layers, kv_heads, block_table, positions, starts, k_scale)
    chunk_tokens = kv.shape[4]
    mass = torch.zeros(block_table.shape, dtype=torch.float32, device=q.device)
    bounds = starts.tolist()
    for i in range(block_table.shape[0]):
        rows = slice(bounds[i], bounds[i + 1])
        if rows.start == rows.stop:
            continue
        last = positions[rows]
        count = int(last.max()) // chunk_tokens + 1
        slots = block_table[i, :count].long()
        hidden = torch.arange(count * chunk_tokens, device=q.device) > last.unsqueeze(1)
        for pair, (layer, head) in enumerate(zip(layers.tolist(), kv_heads.tolist(), strict=True)):
            pool = kv[:, layer, 0, head]
            # indexing reads bytes, not fp8
            keys = (pool.view(torch.uint8)[slots].view(kv.dtype) if kv.dtype.itemsize == 1 else pool[slots]).float()
            if k_scale is not None:
                keys *= k_scale[slots, layer, head].view(-1, 1, 1)
            logits = (q[rows, pair].float() @ keys.flatten(0, 1).T * scale).masked_fill(hidden, -math.inf)
            shares = (logits.view(-1, count, chunk_tokens).logsumexp(2) - lse[rows, pair].unsqueeze(1)).exp()
            mass[i, :count] = torch.maximum(mass[i, :count], shares.amax(0))
    return mass.round(decimals=3)


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    ``out_*``: ``[..., head_dim]``, ``lse_*``: ``[...]``; an lse of -inf is an empty set. FlashAttention's
    rescaling (arXiv 2205.14135, §3.1).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a = (lse_a - shift).exp().unsqueeze(-1)
    weight_b = (lse_b - shift).exp().unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def store_kv(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    slots: Tensor,
    offsets: Tensor,
    *,
    scale: Tensor | None = None,
    non_finite: Tensor | None = None,
) -> None:
    """Write one layer's new keys and values into the pool.

    Args:
        k, v: ``[tokens, kv_heads, head_dim]``. Values too large for an fp8 pool become its largest.
        slots, offsets: int64 ``[tokens]``, the slot of the token's chunk and the position in the chunk. Tokens with
            slot -1 are padding and are not written.
        scale: float32 ``[slots, layers, 2, kv_heads]``, factors of an fp8 pool's values, updated in place. A chunk's
            new scale is the larger of its old scale (0 if the first new token's offset is 0) and the largest magnitude
            of the new tokens / 448. Where it grows, the chunk's older tokens are quantised again. With ``scale``,
            tokens of one chunk must be consecutive, at consecutive offsets.
        non_finite: uint8 ``[tokens]``, set to 1 for tokens whose keys or values contain an infinity or NaN. With
            ``scale`` the flag may be set for the first new token of the chunk instead.
    """
    checks.store(k, v, kv, slots, offsets, scale, non_finite)
    if non_finite is not None:
        largest = torch.maximum(_largest(k), _largest(v))
        non_finite |= ~largest.isfinite() & (slots >= 0)
    kept = slots >= 0
    if not kept.all():
        k, v, slots, offsets = k[kept], v[kept], slots[kept], offsets[kept]
    if scale is not None and len(slots):
        factors = _grow_scales(k, v, kv, layer, slots, offsets, scale)
        k, v = k.float() * factors[:, 0, :, None], v.float() * factors[:, 1, :, None]
    for part, x in enumerate((k, v)):
        pool = kv
        if kv.dtype.itemsize == 1:  # indexing writes bytes, not fp8
            pool, x = kv.view(torch.uint8), x.clamp(-FP8_MAX, FP8_MAX).to(kv.dtype).view(torch.uint8)
        pool[slots, layer, part, :, offsets] = x.to(pool.dtype)


def flag_non_finite(x: Tensor, non_finite: Tensor) -> None:
    """Set ``non_finite``, uint8 ``[rows]``, to 1 for rows of ``x``, ``[rows, ...]``, that are not all finite."""
    checks.flags(non_finite, len(x))
    if x.numel():
        non_finite |= ~_largest(x).isfinite()


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude of each row, NaN if the row contains one."""
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"), dim=tuple(range(1, x.dim())))
    return largest


def _grow_scales(
    k: Tensor, v: Tensor, kv: Tensor, layer: int | Tensor, slots: Tensor, offsets: Tensor, scale: Tensor
) -> Tensor:
    """Update the chunks' scales and quantise their older tokens again where a scale grew.

    Returns float32 ``[tokens, 2, kv_heads]``, the factors that bring the new tokens to fp8.
    """
    first = torch.ones_like(slots, dtype=torch.bool)
    first[1:] = slots[1:] != slots[:-1]
    run = first.cumsum(0) - 1
    slots, starts = slots[first], offsets[first]
    needed = torch.stack((k, v), 1).abs().amax(-1).float() / FP8_MAX
    old = scale[slots, layer].where((starts > 0)[:, None, None], torch.zeros((), device=scale.device))
    new = old.clamp(min=SCALE_MIN).scatter_reduce_(0, run[:, None, None].expand_as(needed), needed, "amax")
    scale[slots, layer] = new
    inverse = 1 / new
    grown = ((new > old) & (starts > 0)[:, None, None]).any(2).any(1)
    if grown.any():
        slots, starts, factor = slots[grown], starts[grown], (old * inverse)[grown, :, :, None, None]
        pool = kv.view(torch.uint8)
        before = pool[slots, layer]
        after = (before.view(kv.dtype).float() * factor).to(kv.dtype).view(torch.uint8)
        older = torch.arange(kv.shape[4], device=kv.device) < starts[:, None]
        rewritten = older[:, None, None, :, None] & (factor != 1)
        pool[slots, layer] = after.where(rewritten, before)
    return inverse[run]


def gather_layer(
    kv: Tensor,
    layer: int | Tensor,
    slots: Tensor,
    *,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer of the chunks in ``slots``, in that order.

    Args:
        slots: int64 ``[n]``.
        scale: float32 ``[slots, layers, 2, kv_heads]``, factors of fp8 chunks.
        out: ``[2, kv_heads, n * chunk_tokens, head_dim]`` to write into, each head contiguous.
        sums: int64 ``[n]``, incremented by the checksum of the bytes that this call reads. After a gather of every
            layer they equal `slot_checksums`, if ``kv`` begins where the slots' rows begin, ``scale`` lies in the
            same rows, and the rest of the rows is zeros.
        dtype: dtype of the result, by default that of ``out`` or ``kv``. Required with ``scale`` unless ``out`` is
            given.

    Returns:
        k, v, each ``[kv_heads, n * chunk_tokens, head_dim]``; contiguous where ``out`` is not given.
    """
    checks.gather(kv, layer, slots, scale, out, sums, dtype)
    index = int(layer)
    pool = kv.view(torch.uint8) if kv.dtype.itemsize == 1 else kv
    # index_select of a permuted view makes a single copy, in the final order
    one_layer = pool.select(1, index).permute(1, 2, 0, 3, 4)
    chunks = one_layer.index_select(2, slots).view(kv.dtype)
    if sums is not None:
        checksums.add_layer(sums, kv, index, slots, chunks, scale)
    if scale is not None:
        chunks = chunks.float() * scale[slots, index].permute(1, 2, 0)[..., None, None]
    gathered = chunks.flatten(2, 3)
    if out is not None:
        gathered = out.copy_(gathered)
    elif dtype is not None:
        gathered = gathered.to(dtype)
    return gathered[0], gathered[1]


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the queries of each KV head over all its keys, no mask.

    ``q``: ``[kv_heads, rows, head_dim]``, rows being (token, head of the group) pairs in any order; ``k``,
    ``v``: ``[kv_heads, n, head_dim]`` with ``n > 0``. Returns out like ``q``, lse float32 ``[kv_heads,
    rows]``.
    """
    if q.device.type == "cpu" and q.dtype in _FUSED_CPU_DTYPES:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale=scale
        )
        return cast(Tensor, out[0]), cast(Tensor, lse[0])
    return attend_exact(q, k, v, scale)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of one sequence: token ``i`` sees the keys 0 to ``i``.

    ``q``, ``k``, ``v``: ``[heads, tokens, head_dim]`` with ``tokens > 0``. Returns out like ``q``, lse float32
    ``[heads, tokens]``.
    """
    if q.device.type == "cpu" and q.dtype in _FUSED_CPU_DTYPES:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, True, scale=scale
        )
        return cast(Tensor, out[0]), cast(Tensor, lse[0])
    return attend_exact(q, k, v, scale, torch.arange(q.shape[1], device=q.device))


def attend_exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend_grouped` in float32 matrix products, a block of rows at a time: for correctness, not speed.

    ``positions``: integer ``[rows]``; a row sees the keys up to and including its position (default: all).
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    kv_heads, rows, _ = q.shape
    n = k.shape[1]
    block = max(1, _MAX_LOGITS // n)
    for head in range(kv_heads):
        keys, values = k[head].float(), v[head].float()
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            logits = (q[head, start:stop].float() @ keys.T).mul_(scale)
            if positions is not None:
                future = torch.arange(n, device=q.device) > positions[start:stop, None]
                logits.masked_fill_(future, -math.inf)
            lse[head, start:stop] = logits.logsumexp(-1)
            out[head, start:stop] = (logits.sub_(lse[head, start:stop, None]).exp_() @ values).to(q.dtype)
    return out, lse


def _dequantize(x: Tensor, scales: Tensor, chunk_tokens: int) -> Tensor:
    """fp8 ``[kv_heads, n * chunk_tokens, head_dim]`` times scales ``[n, kv_heads]``, in float32."""
    return x.float() * scales.T.repeat_interleave(chunk_tokens, dim=1).unsqueeze(-1)
