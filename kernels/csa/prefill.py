"""Attention of many tokens of one sequence over its compressed entries and its sliding window: prefill of DeepSeek-V4.

In PyTorch, in blocks of tokens, so that memory stays bounded. One vector per entry or token is both key and value for
all heads. Tests compare these functions with those of decode steps, `reference.py`.
"""

import math

import torch
from torch import Tensor

from forecache.kernels.csa.reference import index_logits

BLOCK_ELEMENTS = 1 << 24
"""Logits computed at a time: 64 MiB in float32."""
CUDA_BLOCK_ELEMENTS = 1 << 27
"""The same on a GPU, where small blocks leave it idle: 512 MiB."""
MAX_BLOCK_TOKENS = 128


def score_entries_of_one(q: Tensor, weights: Tensor, keys: Tensor, lens: Tensor) -> Tensor:
    """Scores ``Σ_h w_h relu(q_h · k)`` (DeepSeek-V4, §2.3.1) of one sequence's entries for several of its tokens.

    Args:
        q: ``[tokens, index_heads, index_dim]``.
        weights: float32 ``[tokens, index_heads]``, already multiplied by the constant factors.
        keys: ``[entries, index_dim]``.
        lens: integer ``[tokens]``, each token sees so many entries, from the first.

    Returns:
        float32 ``[tokens, entries]``, -inf for entries that a token may not see.
    """
    tokens, heads, _ = q.shape
    scores = torch.empty(tokens, len(keys), dtype=torch.float32, device=q.device)
    k = keys.float()
    block = max(1, _elements(q) // max(heads * len(keys), 1))
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        scores[part] = index_logits(q[part].float(), weights[part], k)
    hidden = torch.arange(len(keys), device=q.device) >= lens.unsqueeze(1)
    return scores.masked_fill_(hidden, -math.inf)


def attend_prefill(
    q: Tensor,
    window: Tensor,
    window_tokens: int,
    sinks: Tensor,
    scale: float,
    *,
    entries: Tensor | None = None,
    lens: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Attention of consecutive tokens over the window, some of their entries, and the sinks.

    Args:
        q: ``[tokens, heads, dim]``.
        window: ``[past + tokens, dim]``, K/V of earlier tokens, then of the tokens themselves.
        window_tokens: tokens of the window that a token sees, including itself.
        sinks: ``[heads]``, one logit per head, whose value vector is zero.
        entries: ``[entries, dim]``.
        lens: integer ``[tokens]``: each token attends to so many entries, from the first.
        selected: int32 ``[tokens, k]``: each token attends to these entries; -1 is no entry. Exactly one of ``lens``
            and ``selected`` is given with ``entries``.

    Returns:
        ``[tokens, heads, dim]`` like ``q``.
    """
    tokens, heads, dim = q.shape
    past = len(window) - tokens
    assert past >= 0, f"{len(window)} window rows for {tokens} tokens"
    assert entries is None or (lens is None) != (selected is None), "with entries, give either lens or selected"
    out = torch.empty_like(q)
    far = 0 if entries is None or not len(entries) else len(entries) if selected is None else selected.shape[1]
    gathered = 0 if selected is None else dim
    block = max(1, min(MAX_BLOCK_TOKENS, _elements(q) // (heads * (far + 2 * window_tokens) + far * gathered)))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        mine = q[start:stop].float()
        first = max(past + start - window_tokens + 1, 0)
        near = window[first : past + stop].float()
        at = torch.arange(past + start, past + stop, device=q.device).unsqueeze(1)
        key = torch.arange(first, past + stop, device=q.device)
        masked = (key > at) | (key <= at - window_tokens)
        parts = [(mine @ near.T * scale).masked_fill_(masked.unsqueeze(1), -math.inf)]
        values: Tensor | None = None
        if entries is not None and far:
            if selected is not None:
                chosen = selected[start:stop].long()
                values = entries[chosen.clamp(min=0)].float()
                missing = chosen < 0
                logits = mine @ values.transpose(1, 2)
            else:
                assert lens is not None
                values = entries.float()
                missing = torch.arange(far, device=q.device) >= lens[start:stop].unsqueeze(1)
                logits = mine @ values.T
            parts.append((logits * scale).masked_fill_(missing.unsqueeze(1), -math.inf))
        parts.append(sinks.float().view(1, heads, 1).expand(stop - start, heads, 1))
        weights = torch.cat(parts, 2).softmax(2)
        width = len(near)
        found = weights[:, :, :width] @ near
        if values is not None:
            found = found + weights[:, :, width : width + far] @ values
        out[start:stop] = found.to(q.dtype)
    return out


def _elements(q: Tensor) -> int:
    return CUDA_BLOCK_ELEMENTS if q.is_cuda else BLOCK_ELEMENTS
