"""Log-probabilities of a prompt's own tokens, taken while it is prefilled.

Its prefix is computed even where it is stored, since K/V tell nothing of logits; and in steps of few tokens, since a
step has as many rows of logits as tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forecache.workers.core.requests import TokenLogprobs
from forecache.workers.core.sequence import State, TokenSequence

MAX_STEP_TOKENS = 256
"""Of one prompt in one step: 128 MiB of logits, with a vocabulary of 128K."""


class Part(Protocol):
    """A :class:`.step.StreamPart`."""

    @property
    def sequence(self) -> TokenSequence: ...

    @property
    def tokens(self) -> int: ...


def targets_of(part: Part) -> list[int]:
    """The prompt tokens that those of ``part`` predict, if its sequence wants to know; none of the answer."""
    seq = part.sequence
    if not seq.scores_prompt or seq.state is not State.PREFILL:
        return []
    return seq.token_ids[seq.num_computed + 1 : min(seq.num_computed + part.tokens + 1, seq.prompt_len)]


@dataclass(frozen=True)
class Scored:
    """``told``: float32 [targets, 1 + most]: of the token that stands in the prompt, then of the likeliest ``tokens``,
    int64 [targets, most]."""

    sequence: TokenSequence
    restarts: int
    targets: tuple[int, ...]
    told: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, seq: TokenSequence, targets: Sequence[int], logits: Tensor) -> "Scored":
        """``logits``: float32 [targets, vocab]; the result is on their device."""
        most = min(seq.sampling.logprobs or 0, logits.shape[-1])
        logprobs = logits.log_softmax(-1)
        wanted = torch.tensor(targets, device=logits.device).unsqueeze(-1)
        top, tokens = logprobs.topk(most)
        return cls(seq, seq.restarts, tuple(targets), torch.cat([logprobs.gather(-1, wanted), top], -1), tokens)

    def take(self) -> None:
        """Add it to what its sequence knows of its prompt, unless that has started over since. Waits for the device."""
        if self.restarts != self.sequence.restarts:
            return
        rows = zip(self.targets, self.told.tolist(), self.tokens.tolist(), strict=True)
        self.sequence.prompt_logprobs += [
            TokenLogprobs(target, told[0], tuple(zip(tokens, told[1:], strict=True))) for target, told, tokens in rows
        ]


def score(parts: Sequence[Part], logits: Tensor) -> tuple[Scored, ...]:
    """The targets of all ``parts``, in their order, for which ``logits`` are: float32 [targets, vocab]."""
    scored, first = [], 0
    for part in parts:
        if targets := targets_of(part):
            scored.append(Scored.of(part.sequence, targets, logits[first : first + len(targets)]))
            first += len(targets)
    return tuple(scored)
