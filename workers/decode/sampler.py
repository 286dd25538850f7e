"""From logits to tokens. What is drawn depends on (seed, position) alone, never on the rest of the batch.

Nothing here waits for the device: what is drawn can be the next step's input before the host knows it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forecache.workers.decode.messages import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The next tokens for ``logits``: float32 [rows, vocab], to stand at ``positions`` of their sequences.

    Returns tokens, int64 [rows], and the largest logit of each row, float32 [rows]: where that is not finite there is
    no distribution to draw from, and the token means nothing.

    Greedy when the temperature is 0 (ties: the lowest id). Otherwise the distribution is cut to the ``top_k`` likeliest
    tokens, then to the smallest set that holds ``top_p`` of what is left, and inverted at one uniform number. A token
    whose logit is -inf is never drawn.
    """
    best, tokens = logits.max(dim=-1)
    for row, (settings, position) in enumerate(zip(params, positions, strict=True)):
        if settings.temperature > 0:
            tokens[row] = draw(logits[row], settings, uniform(settings.seed, position))
    return tokens, best


def draw(logits: Tensor, params: SamplingParams, number: float) -> Tensor:
    """The token at which the distribution over ``logits`` [vocab], cut as ``params`` say, reaches ``number`` in [0, 1).

    int64, a scalar on the device of ``logits``.
    """
    # measured from the largest, the quotient can't overflow however small the temperature
    scaled = (logits.double() - logits.max().double()) / params.temperature
    count = min(params.top_k or len(scaled), len(scaled))
    values, tokens = scaled.topk(count)
    probabilities = values.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # a token stays while what stands before it is less than top_p: at least one always does
    kept = (cumulative - probabilities < params.top_p).sum().clamp(min=1)
    target = number * cumulative[kept - 1]
    index = torch.searchsorted(cumulative, target.reshape(1), right=True)[0]
    return tokens[torch.minimum(index, kept - 1)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments (Philox, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())
