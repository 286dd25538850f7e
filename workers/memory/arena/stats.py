"""Figures of a memory tier."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """Slots are of now, chunks and bytes since start, but for ``stored_chunks``.

    ``pinned_slots`` and ``copied_slots``: of those that nobody holds, which may not be evicted, and which go first.
    ``quota_slots``: that sequences may need in all, held by them already or not; with those that are pinned never
    more than there are.
    """

    slots: int
    used_slots: int
    held_slots: int
    stored_chunks: int
    evicted_chunks: int
    dropped_chunks: int
    pinned_slots: int = 0
    quota_slots: int = 0
    copied_slots: int = 0
    fetched_chunks: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    replicated_chunks: int = 0
    moved_chunks: int = 0
    disk_slots: int = 0
    disk_used_slots: int = 0
    spilled_chunks: int = 0
    disk_recalled_chunks: int = 0
    quarantined_slots: int = 0
    """Taken back from a worker that may still write there."""
    bad_slots: int = 0
    """Not used any more, since their bytes were found wrong twice: the node's memory is bad."""
    disk_bad_slots: int = 0
    """The same of the slots on disk."""
    remote_records: int = 0
    """Of chunks that lie on other nodes, held by sequences of this one."""

    @property
    def committed_slots(self) -> int:
        """Promised or pinned, so that no other sequence is promised them."""
        return self.quota_slots + self.pinned_slots
