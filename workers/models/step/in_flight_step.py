"""A step under way: what it will tell the host, and what it read of the arena."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from forecache.indexer.serving.protocol import StepState
from forecache.workers.core.prompt_logprobs import Scored
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, Captured, NonFinite, Plan, Sampled, StepOutput
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.models.step.cold_reads import ColdReads
from forecache.workers.models.step.logits import Logprobs


@dataclass(frozen=True)
class CapturedTensors:
    """The tensors that a :class:`.step_plan.Capture` requests, on the device.

    ``hidden``, float16 [target layers, hidden], and ``steps`` belong to a trained indexer's history; ``weights``,
    float32 [query heads], to index keys of entries.
    """

    queries: Tensor
    tail_lse: Tensor
    records: Tensor
    hidden: Tensor | None = None
    steps: int = 0
    weights: Tensor | None = None

    def to_host(self) -> "CapturedTensors":
        return CapturedTensors(
            _to_host(self.queries),
            _to_host(self.tail_lse),
            _to_host(self.records),
            None if self.hidden is None else _to_host(self.hidden),
            self.steps,
            None if self.weights is None else _to_host(self.weights),
        )

    def answer(self, request: Capture) -> Captured:
        """As :class:`Captured`, after :meth:`to_host` and the end of the step."""
        state = None
        if self.hidden is not None:
            state = StepState(request.position, self.steps, self.hidden.numpy())
        weights = None if self.weights is None else self.weights.numpy()
        return Captured(request, self.queries.numpy(), self.tail_lse.numpy(), self.records.numpy(), state, weights)


class Probe(Protocol):
    """The attention of a prompt's last tokens. ``mass``: float32 [chunks]."""

    @property
    def mass(self) -> Tensor: ...


@dataclass(frozen=True)
class Written:
    """The tokens that a step computed.

    ``sequences``: each with the number of its restarts so far; ``tokens``: the packed tokens of each; ``non_finite``:
    uint8 [tokens], marks those with infinity or NaN.
    """

    sequences: tuple[tuple[TokenSequence, int], ...]
    tokens: tuple[slice, ...]
    non_finite: Tensor

    @classmethod
    def by(cls, plan: Plan, non_finite: Tensor) -> "Written":
        """The tokens of ``plan``, its decode rows first."""
        sequences = [*plan.decode, *(part.sequence for part in plan.streams)]
        ends = [*itertools.accumulate([*(1 for _ in plan.decode), *(part.tokens for part in plan.streams)])]
        tokens = (slice(start, stop) for start, stop in itertools.pairwise([0, *ends]))
        return cls(tuple((seq, seq.restarts) for seq in sequences), tuple(tokens), non_finite)


class RunningStep:
    """A step that :meth:`.runner.Runner.launch` has enqueued.

    ``logits``: float32 [sampled, vocab], on the device, valid until the next launch.
    """

    def __init__(
        self,
        sampled: Sequence[TokenSequence],
        tokens: Tensor,
        best: Tensor,
        logits: Tensor,
        logprobs: Logprobs | None,
        scored: Sequence[Scored],
        captures: Sequence[Capture],
        captured: Sequence[CapturedTensors],
        probes: Mapping[str, Probe],
        cold: Sequence[ColdReads],
        arena: Arena | None,
        written: Written,
    ) -> None:
        self.logits = logits
        self._written = replace(written, non_finite=_to_host(written.non_finite))
        self._sampled = [(seq, seq.restarts) for seq in sampled]
        self._captures = tuple(captures)
        self._cold = tuple(cold)
        self._arena = arena
        self._tokens, self._best = _to_host(tokens), _to_host(best)
        self._logprobs = None if logprobs is None else logprobs.mapped(_to_host)
        self._scored = [replace(one, logprobs=_to_host(one.logprobs), tokens=_to_host(one.tokens)) for one in scored]
        self._captured = [tensors.to_host() for tensors in captured]
        self._masses = {request_id: _to_host(probe.mass) for request_id, probe in probes.items()}
        self._sums = [None if reads.sums is None else _to_host(reads.sums) for reads in cold]
        self._done: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(tokens.device))

    def result(self) -> StepOutput:
        """Wait for the end of the step; returns its results."""
        if self._done is not None:
            self._done.synchronize()
        tokens, best = self._tokens.tolist(), self._best.tolist()
        asked = {} if self._logprobs is None else {row: i for i, row in enumerate(self._logprobs.rows)}
        sampled = tuple(
            Sampled(seq, restarts, tokens[row], best[row], self._logprobs.of(asked[row], tokens[row]))
            if self._logprobs is not None and row in asked
            else Sampled(seq, restarts, tokens[row], best[row])
            for row, (seq, restarts) in enumerate(self._sampled)
        )
        captured = tuple(
            tensors.answer(request) for request, tensors in zip(self._captures, self._captured, strict=True)
        )
        masses = {request_id: mass.numpy() for request_id, mass in self._masses.items()}
        damaged = {}
        for reads, sums in zip(self._cold, self._sums, strict=True):
            numbers = reads.damaged(None if sums is None else sums.numpy(), self._arena)
            if numbers:
                damaged[reads.request_id] = numbers
        return StepOutput(sampled, captured, masses, damaged, tuple(self._scored), self._non_finite(sampled))

    def _non_finite(self, sampled: Sequence[Sampled]) -> tuple[NonFinite, ...]:
        """The sequences for which the step computed infinity or NaN, each once, with a description."""
        found: dict[str, NonFinite] = {}
        for drawn in sampled:
            if not math.isfinite(drawn.best):
                what = f"{drawn.best} as its largest logit at position {len(drawn.sequence.token_ids)}"
                found[drawn.sequence.request_id] = NonFinite(drawn.sequence, drawn.restarts, what)
        for scored in self._scored:
            if scored.logprobs.isnan().any():
                what = "no number as the log-probability of a prompt's token"
                found[scored.sequence.request_id] = NonFinite(scored.sequence, scored.restarts, what)
        flags = self._written.non_finite
        if flags.any():
            for (seq, restarts), own in zip(self._written.sequences, self._written.tokens, strict=True):
                if flags[own].any():
                    what = "keys or values that are not finite"
                    found[seq.request_id] = NonFinite(seq, restarts, what)
        return tuple(found.values())


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in page-locked host memory, valid once the current stream has come this far."""
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor.clone()
