"""The quota of arena slots on its own node for a spread sequence, one that does not fit into that arena as a whole."""

from dataclasses import dataclass

MIN_SLOTS = 8
"""Least slots of a quota, if the arena has so many."""
ARENA_PARTS = 4
"""A quota is at most this part of the arena: 4 means a quarter."""


@dataclass(frozen=True)
class SpreadQuota:
    """``local_chunks``: the sequence's first chunks, which stay in the arena. ``max_in_flight``: most chunks that may
    be on their way at once, in each direction."""

    local_chunks: int
    max_in_flight: int

    @property
    def slots(self) -> int:
        """Slots in all."""
        return self.local_chunks + 2 * self.max_in_flight


def spread_quota(slots: int) -> SpreadQuota:
    """The quota of one sequence in an arena of so many ``slots``; about half of it is for its first chunks."""
    whole = min(slots, max(MIN_SLOTS, slots // ARENA_PARTS))
    in_flight = max(1, whole // 4)
    return SpreadQuota(max(whole - 2 * in_flight, 0), in_flight)
