"""Exact dense attention of a block of new tokens, in partial results that merge by log-sum-exp."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from forecache.kernels.attention import reference
from forecache.kernels.attention.ops import merge_partials


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Iterable[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of a block of tokens over itself (causal) and over everything before it.

    ``q``: ``[tokens, heads, head_dim]``; ``k``, ``v``: the block's own, ``[kv_heads, tokens, head_dim]``;
    ``past``: segments (k, v) of earlier tokens, each ``[kv_heads, n, head_dim]``, in any order; they are read one
    at a time. Returns out like ``q``, lse float32 ``[tokens, heads]``.
    """
    return add_segments(q, *attend_block(q, k, v, scale, causal=True), past, scale)


def add_segments(
    q: Tensor, out: Tensor, lse: Tensor, segments: Iterable[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Extend the attention ``out``, ``lse`` of a block of tokens by ``segments`` that all its tokens see.

    ``q``, ``out``: ``[tokens, heads, head_dim]``; ``lse``: float32 ``[tokens, heads]``; ``segments``: (k, v), each
    ``[kv_heads, n, head_dim]``, in any order; they are read one at a time. Returns out like ``q``, and lse.
    """
    tokens, kv_heads = q.shape[0], 0
    rows, dtype = q, out.dtype
    for k, v in segments:
        if k.shape[1] == 0:
            continue
        if not kv_heads:
            kv_heads = k.shape[0]
            # sums in float32: over many segments the rounding errors of bfloat16 would accumulate
            rows, out, lse = _fold(q, kv_heads), _fold(out.float(), kv_heads), _fold(lse, kv_heads)
        out, lse = merge_partials(out, lse, *_fused(rows, k, v, scale, causal=False))
    return (_unfold(out.to(dtype), tokens), _unfold(lse, tokens)) if kv_heads else (out, lse)


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of a block of tokens over one segment of keys.

    ``q``: ``[tokens, heads, head_dim]``; ``k``, ``v``: ``[kv_heads, n, head_dim]``, ``n > 0``. With
    ``causal``, ``n`` equals ``tokens`` and token ``i`` sees keys 0 to ``i``. Returns out like ``q``, lse
    float32 ``[tokens, heads]``.
    """
    tokens, heads, _ = q.shape
    kv_heads, n, _ = k.shape
    assert heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups"
    assert not causal or n == tokens, f"a causal block has as many keys ({n}) as queries ({tokens})"
    if not causal or tokens == 1:
        out, lse = _fused(_fold(q, kv_heads), k, v, scale, causal=False)
        return _unfold(out, tokens), _unfold(lse, tokens)
    group = heads // kv_heads
    out, lse = _fused(q.transpose(0, 1), _repeat_heads(k, group), _repeat_heads(v, group), scale, causal=True)
    return out.transpose(0, 1), lse.transpose(0, 1)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """``[tokens, heads, ...]`` to ``[kv_heads, tokens * group, ...]``.

    Without a mask, all (token, head of the group) pairs can be rows of one product, which reads K/V once per group.
    """
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).transpose(0, 1).flatten(1, 2)


def _unfold(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.reshape(x.shape[0], tokens, -1, *x.shape[2:]).transpose(0, 1).flatten(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One fused attention call over as many KV heads as query heads: ``[heads, rows or n, head_dim]``."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, causal, scale=scale
        )
    elif q.dtype in (torch.bfloat16, torch.float16):
        batch = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        if can_use_cudnn_attention(SDPAParams(*batch, None, 0.0, causal, False)):
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*batch, None, True, 0.0, causal, scale=scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(*batch, 0.0, causal, scale=scale)
    else:
        positions = torch.arange(q.shape[1], device=q.device) if causal else None
        out, lse = reference.attend_exact(q, k, v, scale, positions)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _repeat_heads(x: Tensor, group: int) -> Tensor:
    """``[kv_heads, n, head_dim]`` to ``[kv_heads * group, n, head_dim]``, each KV head ``group`` times."""
    return x.unsqueeze(1).expand(-1, group, -1, -1).flatten(0, 1) if group > 1 else x
