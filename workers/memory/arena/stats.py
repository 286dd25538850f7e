"""Figures of a memory tier."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """Slots are the current numbers; chunks and bytes count since start, except ``stored_chunks``.

    ``pinned_slots`` and ``copied_slots`` have no holder: the first are never evicted, the second are evicted first.
    ``quota_slots``: what sequences may need in all, whether they hold it already or not. Quotas and pins together never
    exceed ``slots``.
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
    """Taken back from a worker that may still write to them."""
    bad_slots: int = 0
    """Retired, since their bytes were found wrong twice: the node's memory is bad."""
    disk_bad_slots: int = 0
    """The same on disk."""
    remote_records: int = 0
    """Index records of chunks on other nodes, held by sequences of this one."""

    @property
    def committed_slots(self) -> int:
        """Reserved as quotas or pinned: not available to another sequence."""
        return self.quota_slots + self.pinned_slots
