"""A resident set in the making."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.protocol import Prediction
from forecache.workers.memory.hot.completions import RecallItem


@dataclass
class Turn:
    """A resident set in the making, for the first ``chunks`` chunks of a sequence.

    ``resident``: bool [chunks], what the step that asked for it read; ``urgent``: it is not to wait for its boundary.
    ``future`` is the prediction while it is awaited. Then ``selected`` are the chosen chunks, and ``wanted`` those of
    them that the old set lacks, until the pool has slots for all; then they are in ``incoming`` with their slots,
    referenced in the pool, and ``ticket`` names the recall that fills ``copying``.
    """

    boundary: int
    chunks: int
    resident: npt.NDArray[np.bool_] | None = None
    urgent: bool = False
    future: Future[Prediction] | None = None
    selected: frozenset[int] | None = None
    incoming: dict[int, int] = field(default_factory=dict)
    copying: list[RecallItem] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    ticket: int | None = None

    @property
    def ready(self) -> bool:
        return self.selected is not None and not self.wanted and self.ticket is None
