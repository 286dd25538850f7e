"""One step's tokens in a row: first those of decode sequences, one each, then those of streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.workers.core.prompt_logprobs import targets_of
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.models.step.hidden_history import HiddenHistory


@dataclass
class PackedStep:
    """``tokens`` and ``positions`` of all packed tokens; of streams, ``starts`` are their first packed tokens.

    ``awaited``: (packed token, row of the step before) of tokens that the host does not know yet; 0 stands in
    ``tokens``. A token is drawn for each of ``sampled``, from the logits of the packed token in ``logits_rows``; the
    logits of ``scored_rows`` give log-probabilities of prompt tokens. ``kept``: (packed token, line, position) of
    hidden states for the indexer's history.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    awaited: list[tuple[int, int]] = field(default_factory=list)
    sampled: list[TokenSequence] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    scored_rows: list[int] = field(default_factory=list)
    kept: list[tuple[int, int, int]] = field(default_factory=list)

    def token_ids(self, last_tokens: Tensor, *, padding: int = 0) -> Tensor:
        """int64 [tokens + padding] on the device of ``last_tokens``, the tokens that the step before drew."""
        token_ids = put([*self.tokens, *[0] * padding], last_tokens.device)
        if self.awaited:
            places, rows = zip(*self.awaited, strict=True)
            token_ids[list(places)] = last_tokens[list(rows)]
        return token_ids


def pack(plan: Plan, last_rows: Mapping[str, int], histories: HiddenHistory | None) -> PackedStep:
    """``plan`` as packed tokens. ``last_rows``: by request id, the row of the step before that drew its last token."""
    packed = PackedStep()
    for seq in plan.decode:
        packed.sampled.append(seq)
        packed.logits_rows.append(len(packed.tokens))
        _append(packed, seq, 1, last_rows, histories)
    for part in plan.streams:
        start = len(packed.tokens)
        packed.starts.append(start)
        _append(packed, part.sequence, part.tokens, last_rows, histories)
        if part.draws:
            packed.sampled.append(part.sequence)
            packed.logits_rows.append(len(packed.tokens) - 1)
        packed.scored_rows += range(start, start + len(targets_of(part)))
    return packed


def _append(
    packed: PackedStep,
    seq: TokenSequence,
    count: int,
    last_rows: Mapping[str, int],
    histories: HiddenHistory | None,
) -> None:
    start, first, stop = len(packed.tokens), seq.num_computed, seq.num_computed + count
    if histories is not None:
        line, remembered = histories.begin(seq, first, stop)
        packed.kept += [(start + position - first, line, position) for position in remembered]
    if first < len(seq.token_ids):
        packed.tokens += seq.token_ids[first:stop]
    else:
        packed.awaited.append((start, last_rows[seq.request_id]))
        packed.tokens.append(0)
    packed.positions += range(first, stop)


def put(values: npt.ArrayLike, device: torch.device, dtype: npt.DTypeLike = np.int64) -> Tensor:
    """``values`` on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device, non_blocking=True)


def padded(tables: Sequence[Sequence[int] | npt.NDArray[np.int32]], device: torch.device) -> Tensor:
    """Tables of different lengths, filled up with zeros: int32 [rows, longest, at least 1]."""
    table = np.zeros((len(tables), max(1, max(len(row) for row in tables))), dtype=np.int32)
    for number, row in enumerate(tables):
        table[number, : len(row)] = row
    return put(table, device, np.int32)
