"""Runs the steps of a model: from a plan to tokens. Each architecture brings the forward over one step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forecache.workers.core.prompt_logprobs import score
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, Plan
from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.models.step.cold_reads import ColdReads
from forecache.workers.models.step.graphs import batch_buckets
from forecache.workers.models.step.in_flight_step import CapturedTensors, Probe, RunningStep, Written
from forecache.workers.models.step.logits import LogitAdjuster, logprobs_of
from forecache.workers.models.step.sampler import draw_rows, sample


class StepAbortedError(Exception):
    """A sequence of the running step was cancelled; what the step has computed so far is void."""


class PastLostError(ChunkLostError):
    """Chunks of the past of ``request_id`` can't be read any more: the step is void, and that request restarts."""

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


@dataclass(frozen=True)
class Forward:
    """What a model computed of one step.

    ``logits``: float32 [sampled + scored, vocab], first one row for each of ``sampled``, then the rows of scored prompt
    tokens. ``non_finite``: uint8 [packed tokens], marks keys or values that are not finite. ``best``: float32
    [sampled], the largest logits, if the forward left the greedy tokens in ``last_tokens`` already. ``queries``: by
    layer, [decode rows, heads, head_dim], if captures need them. ``cold``: what was read of the arena; ``probes``: by
    request id, what the last tokens of a prompt attend to.
    """

    sampled: list[TokenSequence]
    logits: Tensor
    non_finite: Tensor
    best: Tensor | None = None
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    cold: Sequence[ColdReads] = ()
    probes: Mapping[str, Probe] = field(default_factory=dict)


class Runner(ABC):
    """Computes plans for models with ``vocab`` tokens; at most ``max_rows`` sequences are sampled in one step.

    Chunks are written into the slots that their sequences hold. State of a sequence outside its chunks belongs to the
    runner; :meth:`snapshot` and :meth:`resume` carry it over.
    """

    def __init__(self, vocab: int, device: torch.device, arena: Arena | None, max_rows: int) -> None:
        self._device = device
        self._arena = arena
        self._last_tokens = torch.zeros(batch_buckets(max_rows)[-1], dtype=torch.int64, device=device)
        self._last_rows: dict[str, int] = {}
        self._adjuster = LogitAdjuster(vocab, device)

    @torch.inference_mode()
    def launch(self, plan: Plan, aborted: Callable[[], bool] = lambda: False) -> RunningStep:
        """Enqueue ``plan``; every chunk that it writes has its slot in the sequence's ``open_slots``.

        On a GPU this returns while the step runs. Raises :class:`StepAbortedError` if ``aborted`` turns true on the
        way: then no state has changed that the step would not write again.
        """
        forward = self._forward_plan(plan, aborted)
        sampled = forward.sampled
        scored, logits = score(plan.streams, forward.logits[len(sampled) :]), forward.logits[: len(sampled)]
        positions = [seq.num_computed + plan.tokens_of(seq) for seq in sampled]
        settings = [seq.sampling for seq in sampled]
        adjusted = self._adjuster.adjust(logits, sampled)
        tokens, best = self._last_tokens[: len(sampled)], forward.best
        if best is None:
            drawn, best = sample(adjusted, settings, positions)
            tokens.copy_(drawn)
        else:
            if adjusted is not logits:
                tokens.copy_(adjusted.argmax(-1))
            draw_rows(adjusted, settings, positions, tokens)
        self._last_rows = {seq.request_id: row for row, seq in enumerate(sampled)}
        self._adjuster.drawn(tokens, sampled, positions)
        captured = [self._captured(request, forward) for request in plan.captures]
        return RunningStep(
            sampled,
            tokens,
            best,
            logits,
            logprobs_of(logits, tokens, sampled),
            scored,
            plan.captures,
            captured,
            forward.probes,
            forward.cold,
            self._arena,
            Written.by(plan, forward.non_finite),
        )

    @abstractmethod
    def _forward_plan(self, plan: Plan, aborted: Callable[[], bool]) -> Forward:
        """Run the model over ``plan``; see :meth:`launch`."""

    @abstractmethod
    def _captured(self, request: Capture, forward: Forward) -> CapturedTensors:
        """Queries and records for the indexer, after ``forward``."""

    @abstractmethod
    def warm_up(
        self,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        max_chunks: int,
        cuda_graphs: bool | None,
        torch_compile: bool,
    ) -> None:
        """Prepare kernels and graphs on a GPU, before the first request."""

    @abstractmethod
    def index_record(self, slot: int) -> Tensor:
        """The index record of the completed chunk in ``slot``: uint8 [spec.nbytes]. Called by another thread."""

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a sequence's state outside its chunks; 0: there is none."""
        return 0

    def snapshot(self, seq: TokenSequence, stop: int) -> Tensor | None:
        """The state of ``seq`` behind its token ``stop - 1``, where a chunk ends: uint8 [snapshot_nbytes], if kept."""
        return None

    def resume(self, seq: TokenSequence, snapshot: Tensor) -> None:  # noqa: B027 - nothing to do without state
        """Let ``seq`` continue after its known chunks, of which this runner has computed nothing."""

    def wipe(self, seq: TokenSequence) -> None:  # noqa: B027 - nothing to do without state
        """Zero the state of ``seq`` outside its chunks: its last step was not finite. :meth:`forget` follows."""

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` has left, or starts over."""
        self._adjuster.forget(seq.request_id)

    def check_integrity(self) -> None:  # noqa: B027 - nothing to do without state
        """Raise ``AssertionError`` if the per-sequence state is inconsistent."""
