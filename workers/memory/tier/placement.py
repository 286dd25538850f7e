"""Where chunks go: rendezvous hashing, so that all agree without asking, and few chunks move when tiers come and go."""

from collections.abc import Iterable

import xxhash

from forecache.workers.memory.format.keys import ChunkKey


def rendezvous(key: ChunkKey, tier_ids: Iterable[str]) -> list[str]:
    """``tier_ids`` in the order in which they should hold ``key``: highest random weight first.

    Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.
    """
    return sorted(tier_ids, key=lambda tier_id: xxhash.xxh3_64_intdigest(tier_id.encode() + key), reverse=True)
