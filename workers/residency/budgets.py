"""How many chunks of a sequence may be resident, and how that follows what its retrieval heads attend to.

A budget doubles when the resident set misses much of what retrieval heads attend to, and halves when half of it would
have been enough for some time (docs/architecture.md).
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks, recency_chunks
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.sequence import TokenSequence

STEADY_BOUNDARIES = 2
"""A budget halves after this many boundaries in a row at which half of it would have covered enough."""
EVENT_CREDIT = 1.0
"""Prior event mass that counts as covered, so that one stray glance cannot double a budget. It is the mass of one head
that attends to a single chunk."""
GRAPH_WIDENINGS = 2
"""Where budgets may double, decode graphs are captured for tables this many times as wide as the first budget needs."""


@dataclass
class Reservations:
    """Hot slots that are reserved for the ``running`` sequences, of the ``pool_slots`` of the pool."""

    pool_slots: int
    running: list[TokenSequence] = field(default_factory=list)

    @property
    def spare_slots(self) -> int:
        """Slots that are reserved for no running sequence."""
        return self.pool_slots - sum(seq.residency.reserved_slots for seq in self.running)


@dataclass(frozen=True)
class Coverage:
    """Retrieval events of one step, on chunks that are neither sink nor recency.

    Attributes:
        mass: their attention mass.
        covered: the part of it on chunks of the measured set.
        hits: chunks with events that are in the set.
        misses: chunks with events that are not.
    """

    mass: float
    covered: float
    hits: int
    misses: int

    @property
    def share(self) -> float | None:
        """Coverage (docs/architecture.md), 0 to 1; ``None`` without events."""
        return min(self.covered / self.mass, 1.0) if self.mass > 0 else None


def measure(event_mass: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_], *, sinks: int, recency: int) -> Coverage:
    """Coverage of ``event_mass``, float32 [chunks], by the ``kept`` chunks, bool [chunks].

    Leaves out the first ``sinks`` and the last ``recency`` chunks.
    """
    measured = slice(sinks, max(len(event_mass) - recency, sinks))
    mass, here = event_mass[measured].astype(np.float64), kept[measured]
    events = mass > 0
    return Coverage(
        mass=float(mass.sum()),
        covered=float(mass[here].sum()),
        hits=int((events & here).sum()),
        misses=int((events & ~here).sum()),
    )


class Budgets:
    """Budgets of one engine's sequences, in chunks, and the hot slots that they reserve."""

    def __init__(self, config: EngineConfig, selection: SelectionConfig, reservations: Reservations) -> None:
        self._config = config
        self._selection = selection
        self._reservations = reservations

    @property
    def spare_slots(self) -> int:
        """Hot slots that are reserved for no running sequence."""
        return self._reservations.spare_slots

    def first(self, seq: TokenSequence, chunks: int) -> int:
        """The budget that ``seq`` starts decoding with, if it has ``chunks`` chunks."""
        if seq.policy == "full":
            return chunks
        return budget_chunks(chunks, seq.keep_ratio, self._selection, self._least_chunks(seq))

    def window_steps(self, seq: TokenSequence) -> int:
        """Decode steps between two resident sets of ``seq``."""
        return seq.cache.window_steps or self._config.window_steps

    def current(self, seq: TokenSequence, chunks: int) -> int:
        """The budget of ``seq`` now, if it has ``chunks`` chunks."""
        return min(self.first(seq, chunks) * seq.residency.widening, chunks)

    def slots(self, seq: TokenSequence, widening: int) -> int:
        """Hot slots that ``seq`` needs with its first budget times ``widening``.

        These are the budget, half of it again for the chunks that a swap replaces, and the chunks a window can add.
        """
        budget = self.first(seq, seq.max_chunks) * widening
        everything = seq.max_chunks + 1
        if budget >= seq.max_chunks:
            return everything
        return min(everything, budget + -(-budget // 2) + self._window_slots(seq))

    def widest_table(self, max_tokens: int) -> int:
        """Slots that a decode step of a sequence of ``max_tokens`` tokens usually reads at most.

        At the configured keep ratio these are the set, and the chunks completed since it was chosen, up to two windows
        ago.
        """
        config = self._config
        chunks = -(-max_tokens // config.chunk_tokens)
        least_chunks = -(-config.min_resident_tokens // config.chunk_tokens)
        budget = budget_chunks(chunks, config.keep_ratio, self._selection, least_chunks)
        if config.fallback:
            budget = min(budget * GRAPH_WIDENINGS, chunks)
        widest = budget + 2 * (config.window_steps // config.chunk_tokens) + 4
        return min(widest, self._reservations.pool_slots)

    def observe(
        self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], resident: npt.NDArray[np.bool_]
    ) -> Coverage:
        """Count the coverage of a step of ``seq`` that read the chunks ``resident``, bool [chunks].

        ``event_mass``: float32 [chunks], the retrieval events of that step.
        """
        found = self._measure(seq, event_mass, resident)
        seq.residency.attended = frozenset(np.flatnonzero((event_mass > 0) & resident).tolist())
        counters = seq.counters
        counters.event_hits += found.hits
        counters.event_misses += found.misses
        if found.share is not None:
            counters.coverage_sum += found.share
            counters.coverages += 1
        return found

    def too_low(self, found: Coverage) -> bool:
        """Whether ``found`` is a reason to double a budget; never without ``--fallback``."""
        if not self._config.fallback:
            return False
        return found.covered + EVENT_CREDIT < self._config.coverage_floor * (found.mass + EVENT_CREDIT)

    def misses(self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], chosen: list[int]) -> bool:
        """Whether the set ``chosen`` covers too little of ``event_mass``, float32 [chunks], by which it was chosen."""
        return self.too_low(self._measure(seq, event_mass, mask_of(chosen, len(event_mass))))

    def streams(self, seq: TokenSequence) -> bool:
        """Whether the budget of ``seq``, doubled once more, exceeds the whole pool."""
        return self.slots(seq, seq.residency.widening * 2) > self._reservations.pool_slots

    def widen(self, seq: TokenSequence) -> bool:
        """Double the budget of ``seq``, unless it is all chunks already or the pool lacks spare slots."""
        residency = seq.residency
        if self.current(seq, seq.max_chunks) >= seq.max_chunks:
            return False
        more = self.slots(seq, residency.widening * 2) - residency.reserved_slots
        if more > self.spare_slots:
            seq.counters.refused_fallbacks += 1
            return False
        residency.reserved_slots += max(more, 0)
        residency.widening *= 2
        residency.steady_boundaries = 0
        seq.counters.fallbacks += 1
        return True

    def narrow(self, seq: TokenSequence, event_mass: npt.NDArray[np.float32]) -> None:
        """Halve the budget of ``seq`` if half of it would have covered enough of ``event_mass``, float32 [chunks], and
        of that at the boundaries before."""
        residency = seq.residency
        if residency.widening == 1:
            return
        kept = np.ones(len(event_mass), dtype=np.bool_)
        kept[: len(residency.half_set)] = residency.half_set[: len(event_mass)]
        enough = not self.too_low(self._measure(seq, event_mass, kept))
        residency.steady_boundaries = residency.steady_boundaries + 1 if enough else 0
        if residency.steady_boundaries >= STEADY_BOUNDARIES:
            residency.widening //= 2
            residency.steady_boundaries = 0

    def swapped(self, seq: TokenSequence) -> None:
        """Give back the slots that a halved budget no longer needs, once its smaller set has taken over."""
        residency = seq.residency
        residency.reserved_slots = min(residency.reserved_slots, self.slots(seq, residency.widening))

    def _least_chunks(self, seq: TokenSequence) -> int:
        """Chunks that ``seq`` keeps whatever its keep ratio is, as far as the pool can hold them.

        A pool that is too small shrinks the set; streaming the sequence instead would slow its steps many times.
        """
        least, pool_slots = -(-seq.min_resident_tokens // seq.chunk_tokens), self._reservations.pool_slots
        if seq.max_chunks <= least and seq.max_chunks < pool_slots:
            return least  # attended whole, so its set is never swapped
        # the largest budget whose `slots` are at most those of the pool
        return min(least, max(pool_slots - self._window_slots(seq), 0) * 2 // 3)

    def _window_slots(self, seq: TokenSequence) -> int:
        """Hot slots for the chunks that ``seq`` completes during a window, and for its open chunk."""
        return self.window_steps(seq) // seq.chunk_tokens + 2

    def _measure(
        self, seq: TokenSequence, event_mass: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_]
    ) -> Coverage:
        # recency of the first budget: which chunks count must not depend on the budget that is measured
        recency = recency_chunks(self.first(seq, len(event_mass)), self._selection)
        return measure(event_mass, kept, sinks=self._selection.sink_chunks, recency=recency)


def mask_of(numbers: list[int], chunks: int) -> npt.NDArray[np.bool_]:
    """Whether each chunk is one of ``numbers``: bool [chunks]."""
    mask = np.zeros(chunks, dtype=np.bool_)
    mask[numbers] = True
    return mask
