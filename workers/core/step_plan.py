"""What one step computes, and its results."""

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
    """The next ``tokens`` of ``sequence``, which attend to all tokens before them.

    ``probe``: of the last ``probe`` tokens, return what they attend to.
    """

    sequence: TokenSequence
    tokens: int
    probe: int = 0

    @property
    def draws(self) -> bool:
        """Whether a token is drawn after the last of them: at the prompt's end and in every step of the answer.

        Valid until the step's tokens are counted as computed.
        """
        seq = self.sequence
        return seq.state is not State.PREFILL or seq.num_computed + self.tokens >= seq.prefill_target


@dataclass(frozen=True)
class Capture:
    """What a step captures of decode row ``row``, for the prediction of the set at ``boundary``.

    It captures the row's queries, their log-sum-exp over the tokens after the complete chunks, this step's token
    included, and the index records of complete chunks that are not stored yet.

    Attributes:
        restarts: as in :class:`Sampled`.
        position: of the step's token.
        recent_slots: hot slots of the chunk that the step writes to, last, and of those before it that the steps of a
            trained indexer's history wrote to, as far back as they are hot; the first is chunk ``first_recent``.
        local_slots: hot slots of the complete chunks that are not stored.
        ref_slots: int64 [chunks], arena slots of the complete chunks, this step's included; -1: not stored.
        generations: int64 [chunks], of these slots.
        resident: bool [chunks], the chunks that the step reads.
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
    """What a step has captured for ``request``.

    Attributes:
        queries: float32 [query heads, head_dim].
        tail_lse: float32 [query heads]; -inf without tokens after the complete chunks.
        records: uint8 [local slots, index bytes].
        state: for a trained indexer.
        weights: float32 [query heads], where index keys are those of compressed entries.
    """

    request: Capture
    queries: npt.NDArray[np.float32]
    tail_lse: npt.NDArray[np.float32]
    records: npt.NDArray[np.uint8]
    state: StepState | None = None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Plan:
    """One step's work: each of ``decode`` computes one token over its resident set; ``streams`` compute one or more
    tokens over their whole past."""

    decode: tuple[TokenSequence, ...]
    streams: tuple[StreamPart, ...]
    captures: tuple[Capture, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode) + sum(part.tokens for part in self.streams)

    def tokens_of(self, seq: TokenSequence) -> int:
        """Tokens of ``seq``, which is part of the step."""
        return next((part.tokens for part in self.streams if part.sequence is seq), 1)


@dataclass(frozen=True)
class Sampled:
    """The token drawn for ``sequence``.

    ``best`` is the largest logit; if it is not finite, no token could be drawn. ``restarts``: how often the sequence
    had started over when the step was launched; if it has done so since, the token is void.
    """

    sequence: TokenSequence
    restarts: int
    token: int
    best: float
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class NonFinite:
    """A step computed ``what``, infinity or NaN, for ``sequence``; the step is void for it.

    ``restarts``: as in :class:`Sampled`.
    """

    sequence: TokenSequence
    restarts: int
    what: str


@dataclass(frozen=True)
class StepOutput:
    """What the host reads of a step.

    Attributes:
        sampled: the tokens drawn.
        captured: queries for predictions.
        masses: float32 [chunks] for each probed stream, by request id: attention of the probed tokens.
        damaged: chunks whose bytes in the arena differ from those that were stored, by request id.
        scored: log-probabilities of prompt tokens.
        non_finite: sequences that the step is void for.
    """

    sampled: tuple[Sampled, ...]
    captured: tuple[Captured, ...] = ()
    masses: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    damaged: dict[str, list[int]] = field(default_factory=dict)
    scored: tuple[Scored, ...] = ()
    non_finite: tuple[NonFinite, ...] = ()


@dataclass(frozen=True)
class DecodeRow:
    """One row of a decode step, on the host.

    Attributes:
        token: -1 if the host has not read it: then row ``source`` of the step in flight draws it.
        position: of the token in the sequence.
        slot, offset: hot slot of the open chunk, and the token's place in it.
        context_len: tokens in ``table``, this one included.
        table: int32 [chunks], the hot slots to read.
        version: holder name and number; changes with ``table``, and differs between sequences and restarts.
        line: where the row's hidden states are kept, see :mod:`forecache.workers.models.step.hidden_history`.
    """

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
    """Rows on the device. ``block_table``: int32 [batch, max_chunks], hot slots; ``context_lens``: int32 [batch], in
    tokens, the step's token included."""

    block_table: torch.Tensor
    context_lens: torch.Tensor
