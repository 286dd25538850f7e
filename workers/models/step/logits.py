"""What a request changes in its logits before a token is drawn, and what it wants to know of them.

Biases and counts of drawn tokens live on the device, a row for each request that asked for them, so that a step changes
all its rows at once and nothing waits for the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forecache.workers.core.requests import TokenLogprobs
from forecache.workers.core.sequence import TokenSequence

FIRST_ROWS = 4


@dataclass(frozen=True)
class Place:
    """The row of one request's state, while it is on its ``restarts``-th start."""

    row: int
    restarts: int


class LogitAdjuster:
    """Biases, penalties and grammar masks of the running requests, over ``vocab`` tokens. Costs nothing unused."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._places: dict[str, Place] = {}
        self._free: list[int] = []
        self._bias = torch.zeros(0, vocab, device=device)
        self._counts = torch.zeros(0, vocab, device=device)

    def adjust(self, logits: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
        """Apply the biases, penalties and masks of ``sequences`` to ``logits``, float32 [rows, vocab].

        Returns the same tensor if no sequence has any.
        """
        weighed = [i for i, seq in enumerate(sequences) if seq.weighs_logits]
        masked = [i for i, seq in enumerate(sequences) if seq.matcher is not None]
        if not weighed and not masked:
            return logits
        logits = logits.clone()
        if weighed:
            members = [sequences[i] for i in weighed]
            rows, places = self._put([weighed, [self._place(seq) for seq in members]])
            penalties = [(s.sampling.frequency_penalty, s.sampling.presence_penalty) for s in members]
            frequency, presence = torch.tensor(penalties).T.unsqueeze(-1).to(self._device, non_blocking=True)
            counts = self._counts[places]
            logits[rows] += self._bias[places] - frequency * counts - presence * (counts > 0)
        if masked:
            words = np.zeros((len(masked), -(-self._vocab // 32)), dtype=np.int32)
            for mask, i in zip(words, masked, strict=True):
                matcher = sequences[i].matcher
                assert matcher is not None
                matcher.fill_mask(mask)
            bits = torch.from_numpy(words).to(self._device, non_blocking=True)
            allowed = (bits.unsqueeze(-1) >> torch.arange(32, device=self._device, dtype=torch.int32)) & 1
            forbidden = allowed.flatten(1)[:, : self._vocab] == 0
            (rows,) = self._put([masked])
            logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)
        return logits

    def drawn(self, tokens: Tensor, sequences: Sequence[TokenSequence], positions: Sequence[int]) -> None:
        """Count ``tokens``, int64 [rows], drawn for ``sequences`` at ``positions``.

        Replayed tokens are not counted again: their position holds a token already.
        """
        counted = [
            (i, self._places[seq.request_id].row)
            for i, (seq, position) in enumerate(zip(sequences, positions, strict=True))
            if seq.weighs_logits and position >= len(seq.token_ids)
        ]
        if counted:
            rows, places = self._put(list(zip(*counted, strict=True)))
            self._counts[places, tokens[rows]] += 1

    def forget(self, request_id: str) -> None:
        """Free the request's row."""
        place = self._places.pop(request_id, None)
        if place is not None:
            self._free.append(place.row)

    def _place(self, seq: TokenSequence) -> int:
        place = self._places.get(seq.request_id)
        if place is None or place.restarts != seq.restarts:
            row = self._allocate() if place is None else place.row
            self._places[seq.request_id] = place = Place(row, seq.restarts)
            self._fill(row, seq)
        return place.row

    def _fill(self, row: int, seq: TokenSequence) -> None:
        """Set the biases and counts of ``seq``. The host knows all its tokens, since it was just prefilled."""
        self._bias[row].zero_()
        self._counts[row].zero_()
        if seq.sampling.logit_bias:
            tokens, values = zip(*seq.sampling.logit_bias, strict=True)
            (index,) = self._put([tokens])
            self._bias[row, index] = torch.tensor(values).to(self._device, non_blocking=True)
        if seq.output_ids:
            (index,) = self._put([seq.output_ids])
            self._counts[row].scatter_add_(0, index, torch.ones(len(index), device=self._device))

    def _allocate(self) -> int:
        if not self._free:
            have = len(self._bias)
            more = max(FIRST_ROWS, have)
            self._free = list(range(have + more - 1, have - 1, -1))
            room = torch.zeros(more, self._vocab, device=self._device)
            self._bias, self._counts = torch.cat([self._bias, room]), torch.cat([self._counts, room])
        return self._free.pop()

    def _put(self, columns: Sequence[Sequence[int]]) -> Tensor:
        return torch.from_numpy(np.array(columns, dtype=np.int64)).to(self._device, non_blocking=True)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of some ``rows`` of a step.

    ``drawn``: float32 [rows, 1]; ``top``: float32, and ``tokens``: int64 [rows, most]. Row ``i`` asked for the first
    ``counts[i]`` of these.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    drawn: Tensor
    top: Tensor
    tokens: Tensor

    def mapped(self, move: Callable[[Tensor], Tensor]) -> "Logprobs":
        return Logprobs(self.rows, self.counts, move(self.drawn), move(self.top), move(self.tokens))

    def of(self, index: int, token: int) -> TokenLogprobs:
        """The log-probabilities of the ``index``-th row, on the host, where ``token`` was drawn."""
        count = self.counts[index]
        pairs = zip(self.tokens[index, :count].tolist(), self.top[index, :count].tolist(), strict=True)
        return TokenLogprobs(token, float(self.drawn[index, 0]), tuple(pairs))


def logprobs_of(logits: Tensor, tokens: Tensor, sequences: Sequence[TokenSequence]) -> Logprobs | None:
    """The log-probabilities of the rows of ``logits``, float32 [rows, vocab], that ask for them. ``tokens``: the drawn
    ones, int64 [rows]."""
    rows = [i for i, seq in enumerate(sequences) if seq.sampling.logprobs is not None]
    if not rows:
        return None
    counts = tuple(min(sequences[i].sampling.logprobs or 0, logits.shape[-1]) for i in rows)
    index = torch.from_numpy(np.array(rows)).to(logits.device, non_blocking=True)
    logprobs = logits[index].log_softmax(-1)
    top, likeliest = logprobs.topk(max(counts))
    return Logprobs(tuple(rows), counts, logprobs.gather(-1, tokens[index].unsqueeze(-1)), top, likeliest)
