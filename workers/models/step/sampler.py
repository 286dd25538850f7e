"""Draws tokens from logits. A token depends on (seed, position) only, never on the rest of the batch.

Nothing here waits for the device: a drawn token can be the next step's input before the host reads it. Rows with the
same kind of truncation (top-k, top-p, both or none) are drawn together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forecache.workers.core.requests import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The next tokens for ``logits``, float32 [rows, vocab], at ``positions`` of their sequences.

    Returns tokens, int64 [rows], and the largest logit of each row, float32 [rows]. If the latter is not finite, the
    row has no distribution, and its token is meaningless. Rows of temperature 0 are greedy (ties: the lowest id);
    :func:`draw_rows` draws the others.
    """
    best, tokens = logits.max(dim=-1)
    draw_rows(logits, params, positions, tokens)
    return tokens, best


def draw_rows(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], tokens: Tensor) -> None:
    """Draw for the rows whose temperature is above 0, into ``tokens``, int64 [rows].

    The distribution is cut to the ``top_k`` likeliest tokens, then to the smallest set that holds ``top_p`` of what is
    left, and inverted at one uniform number. A token whose logit is -inf is never drawn.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, settings in enumerate(params):
        if settings.temperature > 0:
            top_k = settings.top_k if 0 < settings.top_k < logits.shape[-1] else 0
            groups.setdefault((top_k, settings.top_p < 1), []).append(row)
    for (top_k, nucleus), rows in groups.items():
        members = [params[row] for row in rows]
        numbers = [uniform(params[row].seed, positions[row]) for row in rows]
        columns = [[m.temperature for m in members], [m.top_p for m in members], numbers]
        temperature, top_p, number = _put(np.array(columns), logits.device).unsqueeze(-1)
        index = None if len(rows) == len(logits) else _put(np.array(rows), logits.device)
        drawn = _draw(logits if index is None else logits[index], top_k, nucleus, temperature, top_p, number)
        if index is None:
            tokens.copy_(drawn)
        else:
            tokens[index] = drawn


def _draw(logits: Tensor, top_k: int, nucleus: bool, temperature: Tensor, top_p: Tensor, number: Tensor) -> Tensor:
    """int64 [rows]; ``temperature``, ``top_p`` and ``number`` are float64 [rows, 1]."""
    tokens: Tensor | None = None
    if top_k:
        logits, tokens = logits.topk(top_k)
    elif nucleus:
        # float16 and bfloat16 models give many equal logits: only a stable order makes the draw reproducible
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # measured from the largest, the quotient can't overflow however small the temperature
    scaled = (logits.double() - logits.amax(-1, keepdim=True).double()) / temperature
    cumulative = (probabilities := scaled.softmax(dim=-1)).cumsum(dim=-1)
    last = torch.full_like(number, logits.shape[-1] - 1, dtype=torch.int64)
    if nucleus:
        # a token stays while what stands before it is less than top_p: at least one always does
        last = (cumulative - probabilities < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
    target = number * cumulative.gather(-1, last)
    index = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    return (index if tokens is None else tokens.gather(-1, index)).squeeze(-1)


def _put(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments (Philox, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())
