"""What one step is to compute, and what came of it."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from forecache.indexer.serving.protocol import StepState
from forecache.workers.core.prompt_logprobs import Scored
from forecache.workers.core.requests import TokenLogprobs
from forecache.workers.core.sequence import State, TokenSequence


@dataclass(frozen=True)
class StreamPart:
    """The next ``tokens`` of ``sequence``, attending to its whole past; of the last ``probe`` of them it is asked what
    they attend to."""

    sequence: TokenSequence
    tokens: int
    probe: int = 0

    @property
    def draws(self) -> bool:
        """Whether a token is drawn behind the last of them: where the prompt ends, and in every step of the answer,
        known already or not. To be asked before the step is accounted for."""
        seq = self.sequence
        return seq.state is not State.PREFILL or seq.num_computed + self.tokens >= seq.prefill_target


@dataclass(frozen=True)
class Capture:
    """What the indexer wants of decode row ``row``, for the turn at ``boundary``.

    Its queries at ``position``, their log-sum-exp over the tokens after the complete chunks (this step's own included),
    and the index records of those complete chunks in ``local_slots`` that cold memory does not have yet. ``chunks``
    chunks are complete, this step's token included; they lie at ``ref_slots`` (-1: local), with ``generations``: int64
    [chunks] each; ``resident``, bool [chunks], are those that the step reads. ``recent_slots`` holds the
    chunk that this step writes to, and before it those that older steps of a trained indexer's history wrote to, as far
    as they are hot, from chunk ``first_recent`` on. ``restarts``: as in :class:`Sampled`.
    """

    row: int
    sequence: TokenSequence
    restarts: int
    boundary: int
    position: int
    recent_slots: tuple[int, ...]
    first_recent: int
    local_slots: tuple[int, ...]
    ref_slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.int64]
    resident: npt.NDArray[np.bool_]

    @property
    def chunks(self) -> int:
        return len(self.ref_slots)


@dataclass(frozen=True)
class Captured:
    """``queries``: float32 [query heads, head_dim]; ``tail_lse``: float32 [query heads], -inf without a tail;
    ``records``: uint8 [local slots, index bytes]. ``state`` is there for a trained indexer alone, ``weights`` float32
    [query heads] where index keys are those of entries."""

    request: Capture
    queries: npt.NDArray[np.float32]
    tail_lse: npt.NDArray[np.float32]
    records: npt.NDArray[np.uint8]
    state: StepState | None = None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Plan:
    """One step's work: ``decode`` sequences take one token over their resident set, ``streams`` several over all their
    past."""

    decode: tuple[TokenSequence, ...]
    streams: tuple[StreamPart, ...]
    captures: tuple[Capture, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(part.tokens for part in self.streams)

    def tokens_of(self, seq: TokenSequence) -> int:
        return next((part.tokens for part in self.streams if part.sequence is seq), 1)


@dataclass(frozen=True)
class Sampled:
    """The token drawn for ``sequence``; ``best`` is its largest logit, and not finite where nothing could be drawn.

    ``restarts`` is how often the sequence had started over when the step was launched: if it did so since, the token is
    void.
    """

    sequence: TokenSequence
    restarts: int
    token: int
    best: float
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class NonFinite:
    """Of ``sequence`` a step has computed ``what``, infinite or no number: nothing of the step is its. ``restarts`` as
    in :class:`Sampled`."""

    sequence: TokenSequence
    restarts: int
    what: str


@dataclass(frozen=True)
class StepOutput:
    """What the host learns of a step. ``masses``: float32 [chunks] for each probed stream, by request id; ``damaged``:
    by request id, the numbers of chunks whose bytes in the arena were not those that were stored; ``scored``: prompt
    tokens whose log-probabilities were wanted; ``non_finite``: sequences whose part of the step is void."""

    sampled: tuple[Sampled, ...]
    captured: tuple[Captured, ...] = ()
    masses: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    damaged: dict[str, list[int]] = field(default_factory=dict)
    scored: tuple[Scored, ...] = ()
    non_finite: tuple[NonFinite, ...] = ()


@dataclass(frozen=True)
class DecodeRow:
    """One row of a decode step, on the host. ``token`` is -1 while the host does not know it: then it is the one drawn
    in row ``source`` of the step before. ``table`` are the slots to read, ``context_len`` tokens in all, this one
    included; ``version``, a holder's name and a number, changes when ``table`` does, and is never another sequence's,
    nor that of another try. ``line``: where its hidden states are kept, see :mod:`.hidden_history`."""

    token: int
    source: int
    position: int
    slot: int
    offset: int
    context_len: int
    table: npt.NDArray[np.int32]
    version: tuple[str, int]
    line: int = 0


@dataclass(frozen=True)
class DecodeRows:
    """``block_table``: int32 [batch, max_chunks] of slots; ``context_lens``: int32 [batch], this token included."""

    block_table: torch.Tensor
    context_lens: torch.Tensor
