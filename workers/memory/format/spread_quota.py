"""What a sequence that is more than its node's arena gets of that arena."""

from dataclasses import dataclass

LEAST_SLOTS, PART = 8, 4
"""At least so many slots, and this part of all."""


@dataclass(frozen=True)
class Share:
    """``stays``: chunks that stay in the arena; ``at_once``: how many may be on their way, in each direction."""

    stays: int
    at_once: int

    @property
    def slots(self) -> int:
        return self.stays + 2 * self.at_once


def share_of(slots: int) -> Share:
    """A sequence's share of an arena of so many ``slots``: one half is for its first chunks."""
    whole = min(slots, max(LEAST_SLOTS, slots // PART))
    at_once = max(1, whole // 4)
    return Share(max(whole - 2 * at_once, 0), at_once)
