"""How many chunks of a sequence may be resident, and how that follows what its retrieval heads look for.

A budget doubles when coverage is low, and halves again when half of it was enough for some time (docs/architecture.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks, recency_chunks
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.sequence import TokenSequence

STEADY_BOUNDARIES = 2
"""A budget halves after so many boundaries in a row at which half of it would have done."""
EVENT_CREDIT = 1.0
"""Event mass taken for covered before any is counted: that of one head that looks at one chunk alone. Else one head's
passing glance at one chunk, a coverage of 0, would double a budget."""
GRAPH_WIDENINGS = 2
"""Where budgets may double, decode steps are made for tables this many times as wide as a first budget needs."""


@dataclass(frozen=True)
class Coverage:
    """Retrieval events of one step on chunks that are neither sink nor recency: their ``mass``, what of it fell on
    chunks that count as ``covered``, and how many of the chunks with events are among these (``hits``) or not."""

    mass: float
    covered: float
    hits: int
    misses: int

    @property
    def share(self) -> float | None:
        """Coverage (docs/architecture.md), 0 to 1; ``None`` where there was no event."""
        return min(self.covered / self.mass, 1.0) if self.mass > 0 else None


def measure(event_mass: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_], *, sinks: int, recency: int) -> Coverage:
    """How much of ``event_mass``, float32 [chunks], falls on chunks that are ``kept``, bool [chunks]; the first
    ``sinks`` and the last ``recency`` chunks are left out."""
    looked = slice(sinks, max(len(event_mass) - recency, sinks))
    mass, here = event_mass[looked].astype(np.float64), kept[looked]
    events = mass > 0
    return Coverage(
        mass=float(mass.sum()),
        covered=float(mass[here].sum()),
        hits=int((events & here).sum()),
        misses=int((events & ~here).sum()),
    )


class Budgets:
    """Budgets of one engine's sequences, and the hot slots they need.

    ``spare`` tells how many slots of the pool's ``pool_slots`` no sequence was promised: a budget grows into these.
    """

    def __init__(
        self, config: EngineConfig, selection: SelectionConfig, pool_slots: int, spare: Callable[[], int]
    ) -> None:
        self._config = config
        self._selection = selection
        self._pool_slots = pool_slots
        self._spare = spare

    def first(self, seq: TokenSequence, chunks: int) -> int:
        """What a sequence begins with: chunks of ``seq`` that may be resident when it has ``chunks``."""
        if seq.policy == "full":
            return chunks
        return budget_chunks(chunks, seq.keep_ratio, self._selection)

    def window_steps(self, seq: TokenSequence) -> int:
        """Decode steps between two resident sets of ``seq``."""
        return seq.cache.window_steps or self._config.window_steps

    def of(self, seq: TokenSequence, chunks: int) -> int:
        """Chunks of ``seq`` that may be resident now, when it has ``chunks``."""
        return min(self.first(seq, chunks) * seq.widening, chunks)

    def slots(self, seq: TokenSequence, widening: int) -> int:
        """Hot slots that ``seq`` needs with its first budget times ``widening``: the budget, half of it again for a
        turn, and the chunks a window can add."""
        budget = self.first(seq, seq.max_chunks) * widening
        everything = seq.max_chunks + 1
        if budget >= seq.max_chunks:
            return everything
        return min(everything, budget + -(-budget // 2) + self.window_steps(seq) // seq.chunk_tokens + 2)

    def widest_table(self, max_tokens: int) -> int:
        """Most slots that a decode step of a sequence of ``max_tokens`` usually reads, at the configured keep ratio:
        the set, and what was completed since it was chosen, which was up to two windows ago."""
        config = self._config
        chunks = -(-max_tokens // config.chunk_tokens)
        budget = budget_chunks(chunks, config.keep_ratio, self._selection)
        if config.fallback:
            budget = min(budget * GRAPH_WIDENINGS, chunks)
        return min(budget + 2 * (config.window_steps // config.chunk_tokens) + 4, self._pool_slots)

    def observe(
        self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], resident: npt.NDArray[np.bool_]
    ) -> Coverage:
        """A step of ``seq`` that read the chunks ``resident`` had ``event_mass``: count it. Both are [chunks]."""
        found = self._measure(seq, event_mass, resident)
        seq.attended = frozenset(np.flatnonzero((event_mass > 0) & resident).tolist())
        counters = seq.counters
        counters.event_hits += found.hits
        counters.event_misses += found.misses
        if found.share is not None:
            counters.coverage_sum += found.share
            counters.coverages += 1
        return found

    def too_low(self, found: Coverage) -> bool:
        """Whether coverage is a reason to double a budget."""
        if not self._config.fallback:
            return False
        return found.covered + EVENT_CREDIT < self._config.coverage_floor * (found.mass + EVENT_CREDIT)

    def misses(self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], chosen: list[int]) -> bool:
        """Whether the set ``chosen`` is too small already for the events it was chosen by."""
        return self.too_low(self._measure(seq, event_mass, mask_of(chosen, len(event_mass))))

    def streams(self, seq: TokenSequence) -> bool:
        """Whether the next doubling of ``seq`` is more than the whole pool."""
        return self.slots(seq, seq.widening * 2) > self._pool_slots

    def widen(self, seq: TokenSequence) -> bool:
        """Double the budget of ``seq``, where that is more than it has and the pool has spare slots for it."""
        if self.of(seq, seq.max_chunks) >= seq.max_chunks:
            return False
        more = self.slots(seq, seq.widening * 2) - seq.reserved_slots
        if more > self._spare():
            seq.counters.refused_fallbacks += 1
            return False
        seq.reserved_slots += max(more, 0)
        seq.widening *= 2
        seq.steady_boundaries = 0
        seq.counters.fallbacks += 1
        return True

    def narrow(self, seq: TokenSequence, event_mass: npt.NDArray[np.float32]) -> None:
        """Halve the budget of ``seq`` if half of it would have done, now and at the boundaries before."""
        if seq.widening == 1:
            return
        kept = np.ones(len(event_mass), dtype=np.bool_)
        kept[: len(seq.half_set)] = seq.half_set[: len(event_mass)]
        enough = not self.too_low(self._measure(seq, event_mass, kept))
        seq.steady_boundaries = seq.steady_boundaries + 1 if enough else 0
        if seq.steady_boundaries >= STEADY_BOUNDARIES:
            seq.widening //= 2
            seq.steady_boundaries = 0

    def swapped(self, seq: TokenSequence) -> None:
        """A new set of ``seq`` has taken over: what a halved budget leaves free is nobody's now."""
        seq.reserved_slots = min(seq.reserved_slots, self.slots(seq, seq.widening))

    def _measure(
        self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_]
    ) -> Coverage:
        # of the first budget: what counts as recent must not change with what is measured
        recency = recency_chunks(self.first(seq, len(event_mass)), self._selection)
        return measure(event_mass, kept, sinks=self._selection.sink_chunks, recency=recency)


def mask_of(numbers: list[int], chunks: int) -> npt.NDArray[np.bool_]:
    """Whether each chunk is one of ``numbers``: bool [chunks]."""
    mask = np.zeros(chunks, dtype=np.bool_)
    mask[numbers] = True
    return mask
