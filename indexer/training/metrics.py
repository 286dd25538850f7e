"""Quality of a resident set at a budget: recall of golden chunks and coverage of event mass."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks, select
from forecache.indexer.training.labels import WindowLabels

BUDGETS = (0.05, 0.10, 0.135, 0.20)


def resident_chunks(
    scores: npt.NDArray[np.float32], complete: int, ratio: float, config: SelectionConfig
) -> npt.NDArray[np.int64]:
    """The resident set that the server would select from ``complete`` chunks by ``scores`` [≥ complete]."""
    return select(
        scores[:complete],
        policy="lookahead",
        chunks=complete,
        budget=budget_chunks(complete, ratio, config),
        config=config,
    )


def keep_masks(scores: Tensor, complete: Tensor, ratio: float, config: SelectionConfig) -> Tensor:
    """Resident sets of predictions: ``scores`` [predictions, chunks], ``complete`` [predictions] → bool like scores."""
    table = scores.float().cpu().numpy()
    kept = np.zeros(table.shape, dtype=bool)
    for row, chunks in enumerate(complete.tolist()):
        kept[row, resident_chunks(table[row], chunks, ratio, config)] = True
    return torch.from_numpy(kept).to(scores.device)


def recall(kept: Tensor, labels: WindowLabels) -> Tensor:
    """Share of each prediction's golden chunks that are kept: float32 [predictions], NaN without golden chunks."""
    return (kept & labels.golden).sum(1) / labels.golden.sum(1)


def coverage(kept: Tensor, labels: WindowLabels) -> Tensor:
    """Share of each prediction's event mass on kept chunks: float32 [predictions], NaN without events."""
    return (labels.event_mass * kept).sum(1) / labels.event_mass.sum(1)


def nan_mean(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN; None if there are none."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else None
