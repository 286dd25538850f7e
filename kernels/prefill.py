"""Exact dense attention of a block of new tokens, in partial results that merge by log-sum-exp."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from forecache.kernels import reference
from forecache.kernels.ops import merge_partials


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Iterable[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of a block of tokens over itself (causal) and over everything before it.

    ``q``: ``[tokens, heads, head_dim]``; ``k``, ``v``: the block's own, ``[kv_heads, tokens, head_dim]``;
    ``past``: segments (k, v) of earlier tokens, each ``[kv_heads, n, head_dim]``, in any order, read one at
    a time. Returns out like ``q``, lse float32 ``[tokens, heads]``.
    """
    out, lse = attend_block(q, k, v, scale, causal=True)
    for past_k, past_v in past:
        if past_k.shape[1]:
            out, lse = merge_partials(out, lse, *attend_block(q, past_k, past_v, scale, causal=False))
    return out, lse


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of a block of tokens over one segment of keys.

    ``q``: ``[tokens, heads, head_dim]``; ``k``, ``v``: ``[kv_heads, n, head_dim]``, ``n > 0``. With
    ``causal``, ``n`` equals ``tokens`` and token ``i`` sees keys 0 to ``i``. Returns out like ``q``, lse
    float32 ``[tokens, heads]``.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, n, _ = k.shape
    assert heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups"
    assert not causal or n == tokens, f"a causal block has as many keys ({n}) as queries ({tokens})"
    group = heads // kv_heads
    if not causal or tokens == 1:
        # Without a mask all rows of a group are alike: folding its heads into the tokens reads K/V once.
        folded = q.reshape(tokens, kv_heads, group, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
        out, lse = _fused(folded.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale, causal=False)
        out = out.reshape(kv_heads, tokens, group, head_dim).transpose(0, 1)
        lse = lse.reshape(kv_heads, tokens, group).transpose(0, 1)
        return out.reshape(q.shape), lse.reshape(tokens, heads)
    rows = q.transpose(0, 1).unsqueeze(0)
    keys, values = (_repeat_heads(x, group).unsqueeze(0) for x in (k, v))
    out, lse = _fused(rows, keys, values, scale, causal=True)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One fused attention call, ``[1, heads, rows, head_dim]`` each; lse ``[1, heads, rows]``."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype in (torch.bfloat16, torch.float16):
        if can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, False)):
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
        else:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        positions = torch.arange(q.shape[2], device=q.device) if causal else None
        out, lse = reference.attend_exact(q[0], k[0], v[0], scale, positions)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _repeat_heads(x: Tensor, group: int) -> Tensor:
    """``[kv_heads, n, head_dim]`` to ``[kv_heads * group, n, head_dim]``, each KV head ``group`` times."""
    return x.unsqueeze(1).expand(-1, group, -1, -1).flatten(0, 1) if group > 1 else x
