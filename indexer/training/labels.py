"""Labels of predictions: the chunks from which the steps of the coming window retrieved."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from forecache.indexer.records.scores import EVENT_SHARE
from forecache.indexer.records.shards import RecordedDocument


@dataclass(frozen=True)
class LabelRule:
    """Which chunks count as needed.

    The window of a prediction at row r with lead ``l`` is the ``window_steps`` steps from r + l on, as far as they were
    recorded. A chunk is golden if in the window at least ``min_heads`` different heads put ``event_share``
    of their attention on it in one step. Chunks that were not complete when the prediction was made, the
    first ``sink_chunks`` and the last ``recency_chunks`` of the completed ones are not candidates, because they are
    always resident. ``heads``: numbers (layer · heads + head) of the heads whose events count; None: all heads.
    """

    window_steps: int = 64
    min_heads: int = 2
    event_share: float = EVENT_SHARE
    sink_chunks: int = 1
    recency_chunks: int = 2
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class WindowLabels:
    """Labels of R predictions over all chunks of a document.

    ``candidates``: bool [R, chunks]; ``golden``: bool [R, chunks], candidates only; ``event_mass``: float32 [R,
    chunks], the sum of the events' shares on candidates; ``heads``: float32 [R, chunks], number of different heads with
    an event there; ``steps``: int64 [R], recorded steps of each window.
    """

    candidates: Tensor
    golden: Tensor
    event_mass: Tensor
    heads: Tensor
    steps: Tensor


def complete_chunks(positions: Tensor, chunk_tokens: int) -> Tensor:
    """Number of chunks that are complete after the tokens at ``positions``: int64 like ``positions``."""
    return (positions + 1) // chunk_tokens


def window_rows(
    document: RecordedDocument, rows: Tensor, lead: int | Tensor, window_steps: int
) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) row of the windows of predictions made at ``rows``; both int64 like ``rows``."""
    ends = document.runs[:, 1].to(rows.device).contiguous()
    end = ends[torch.searchsorted(ends, rows.contiguous(), right=True)]
    first = torch.minimum(rows + lead, end)
    return first, torch.minimum(first + window_steps, end)


@dataclass(frozen=True)
class EventSums:
    """Cumulative sums of a document's events over its steps. The events of a window are the difference of two rows.

    ``mass``: float32 [steps + 1, chunks], the events' shares; ``seen``: int16 [steps + 1, pairs], events of each pair
    of a chunk and a head that has any; ``chunk_of_pair``: int64 [pairs].
    """

    mass: Tensor
    seen: Tensor
    chunk_of_pair: Tensor

    @classmethod
    def of(cls, document: RecordedDocument, rule: LabelRule) -> Self:
        """Sums of the events of ``document`` that count by ``rule``."""
        chunks, device = len(document.records), document.records.device
        counts = document.event_offsets.diff()
        row = torch.arange(document.steps, device=device).repeat_interleave(counts)
        strong = document.event_share >= rule.event_share
        if rule.heads is not None:
            strong &= torch.isin(document.event_head, torch.tensor(rule.heads, device=device))
        row, chunk, head = row[strong], document.event_chunk[strong].long(), document.event_head[strong].long()
        mass = torch.zeros(document.steps + 1, chunks, device=device)
        mass.view(-1).index_add_(0, (row + 1) * chunks + chunk, document.event_share[strong].float())
        heads = int(document.event_head.max()) + 1 if len(document.event_head) else 1
        pairs, pair = torch.unique(chunk * heads + head, return_inverse=True)
        seen = torch.zeros(document.steps + 1, len(pairs), dtype=torch.int16, device=device)
        seen.view(-1).index_fill_(0, (row + 1) * len(pairs) + pair, 1)
        return cls(mass.cumsum(0), seen.cumsum(0, dtype=torch.int16), pairs // heads)


def window_labels(
    document: RecordedDocument,
    rows: Tensor,
    lead: int | Tensor,
    rule: LabelRule,
    *,
    chunk_tokens: int,
    sums: EventSums | None = None,
) -> WindowLabels:
    """Labels of the predictions at ``rows``, int64 [R], for the windows ``lead`` steps (or [R]) later.

    ``sums``: the document's :class:`EventSums` by ``rule``, computed here if not given.
    """
    sums = sums or EventSums.of(document, rule)
    chunks, device = len(document.records), document.records.device
    rows = rows.to(device)
    complete = complete_chunks(document.positions[rows], chunk_tokens).unsqueeze(1)
    numbers = torch.arange(chunks, device=device)
    candidates = (numbers >= rule.sink_chunks) & (numbers < complete - rule.recency_chunks)
    first, last = window_rows(document, rows, lead, rule.window_steps)
    # a head counts once per chunk, even with events in several steps of the window
    present = (sums.seen[last] > sums.seen[first]).float()
    lookers = torch.zeros(len(rows), chunks, device=device).index_add_(1, sums.chunk_of_pair, present)
    return WindowLabels(
        candidates,
        candidates & (lookers >= rule.min_heads),
        (sums.mass[last] - sums.mass[first]).clamp(min=0) * candidates,
        lookers * candidates,
        last - first,
    )


def answer_labels(
    document: RecordedDocument, rows: Tensor, lead: int | Tensor, rule: LabelRule, candidates: Tensor
) -> Tensor:
    """Chunks of the answer, for the predictions at ``rows`` with its first token in their window: bool [R, chunks]."""
    first, last = window_rows(document, rows, lead, rule.window_steps)
    begins = (first <= document.answer_step) & (document.answer_step < last)
    numbers = torch.arange(candidates.shape[1], device=candidates.device)
    holds = (numbers >= document.answer[0]) & (numbers < document.answer[1])
    return candidates & holds & begins.unsqueeze(1)
