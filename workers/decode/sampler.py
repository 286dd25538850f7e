"""From logits to a token. What is drawn depends on (seed, position) alone, never on the rest of the batch."""

import numpy as np
import torch

from forecache.workers.decode.messages import SamplingParams
from forecache.workers.errors import ForecacheError


class BadLogitsError(ForecacheError):
    """There is no distribution to draw from: the logits hold NaN or +inf, or nothing but -inf."""


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The next token for ``logits``: float32 [vocab], to stand at ``position`` of its sequence.

    Greedy when the temperature is 0 (ties: the lowest id). Otherwise the distribution is cut to the ``top_k`` likeliest
    tokens, then to the smallest set that holds ``top_p`` of what is left, and inverted at one uniform number. A token
    whose logit is -inf is never drawn. Raises :class:`BadLogitsError` where the largest logit is not finite.
    """
    best, token = logits.max(dim=-1)
    if not torch.isfinite(best):
        raise BadLogitsError(f"the model gave {float(best)} as its largest logit at position {position}")
    if params.temperature == 0:
        return int(token)
    # measured from the largest, the quotient can't overflow however small the temperature
    scaled = (logits.double() - best.double()) / params.temperature
    count = min(params.top_k or len(scaled), len(scaled))
    values, tokens = scaled.topk(count)
    probabilities = values.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # a token stays while what stands before it is less than top_p: at least one always does
    kept = int((cumulative - probabilities < params.top_p).sum())
    cumulative = cumulative[: max(kept, 1)]
    target = uniform(params.seed, position) * float(cumulative[-1])
    index = int(
        torch.searchsorted(
            cumulative, torch.tensor(target, dtype=cumulative.dtype, device=cumulative.device), right=True
        )
    )
    return int(tokens[min(index, len(cumulative) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments (Philox, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())
