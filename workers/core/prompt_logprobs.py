"""Log-probabilities of a prompt's own tokens, computed during prefill.

Such a prompt is computed even where its prefix is stored, because logits can't be had from K/V, and in short steps,
because a step has a row of logits for each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forecache.workers.core.requests import TokenLogprobs
from forecache.workers.core.sequence import State, TokenSequence

MAX_STEP_TOKENS = 256
"""Tokens of one such prompt in one step at most: 128 MiB of logits, with a vocabulary of 128K."""


class Part(Protocol):
    """A :class:`forecache.workers.core.step_plan.StreamPart`, which this module can't import."""

    @property
    def sequence(self) -> TokenSequence: ...

    @property
    def tokens(self) -> int: ...


def targets_of(part: Part) -> list[int]:
    """The prompt tokens that the tokens of ``part`` predict, if their log-probabilities are wanted."""
    seq = part.sequence
    if not seq.scores_prompt or seq.state is not State.PREFILL:
        return []
    return seq.token_ids[seq.num_computed + 1 : min(seq.num_computed + part.tokens + 1, seq.prompt_len)]


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the ``targets``, tokens of one prompt.

    Attributes:
        restarts: how often the sequence had started over when the step was launched.
        logprobs: float32 [targets, 1 + likeliest], of the prompt's token, then of the likeliest ``tokens``.
        tokens: int64 [targets, likeliest].
    """

    sequence: TokenSequence
    restarts: int
    targets: tuple[int, ...]
    logprobs: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, seq: TokenSequence, targets: Sequence[int], logits: Tensor) -> "Scored":
        """Of ``logits``, float32 [targets, vocab]; the result is on their device."""
        most = min(seq.sampling.logprobs or 0, logits.shape[-1])
        logprobs = logits.log_softmax(-1)
        wanted = torch.tensor(targets, device=logits.device).unsqueeze(-1)
        top, tokens = logprobs.topk(most)
        return cls(seq, seq.restarts, tuple(targets), torch.cat([logprobs.gather(-1, wanted), top], -1), tokens)

    def take(self) -> None:
        """Add them to the sequence, unless it has started over since. Waits for the device."""
        if self.restarts != self.sequence.restarts:
            return
        rows = zip(self.targets, self.logprobs.tolist(), self.tokens.tolist(), strict=True)
        self.sequence.prompt_logprobs += [
            TokenLogprobs(target, row[0], tuple(zip(tokens, row[1:], strict=True))) for target, row, tokens in rows
        ]


def score(parts: Sequence[Part], logits: Tensor) -> tuple[Scored, ...]:
    """Log-probabilities of the targets of all ``parts``; ``logits``: float32 [targets, vocab], in the parts' order."""
    scored, first = [], 0
    for part in parts:
        if targets := targets_of(part):
            scored.append(Scored.of(part.sequence, targets, logits[first : first + len(targets)]))
            first += len(targets)
    return tuple(scored)
