"""The other tiers, as a tier needs them. `remote.py` reaches them through Ray."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from forecache.workers.memory.format.chunk_batch import ChunkBatch, RecordBatch
from forecache.workers.memory.format.keys import ChunkKey


class PendingBatch(Protocol):
    def result(self, timeout_s: float) -> ChunkBatch:
        """Raises :class:`ChunkLostError` when the tier does not answer in time, or is gone."""
        ...


class Peers(Protocol):
    """The other tiers. Every method raises :class:`ChunkLostError` when one can't be reached."""

    def read(self, tier_id: str, keys: Sequence[ChunkKey]) -> PendingBatch:
        """Copies of those of ``keys`` that the tier has; does not wait."""
        ...

    def take_in(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        """Have the tier store ``batch`` and answer for it; returns the keys that it has now."""
        ...

    def set_copied(self, tier_id: str, keys: Sequence[ChunkKey], since: int) -> None:
        """Tell the tier that another one answers for ``keys``, which were read there at its mark ``since``; does not
        wait."""
        ...

    def promise_for(self, tier_id: str, holder: str, chunks: int) -> int:
        """Have the tier promise room for ``chunks`` of a sequence of another node; returns for how many it does."""
        ...

    def hold_for(self, tier_id: str, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        """Have the tier hold those of ``keys`` that it has, for a sequence of another node; returns their records."""
        ...

    def take_in_for(self, tier_id: str, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        """Have the tier store ``batch`` and hold it for a sequence of another node; returns what it holds now."""
        ...

    def release_for(self, tier_id: str, holders: Sequence[str]) -> None:
        """Have the tier let go of all that it holds for these sequences."""
        ...

    def hosted(self, tier_id: str, floors: Mapping[str, int]) -> list[str]:
        """Names of the holders of these workers that hold something at the tier; all serials of a worker below its
        floor are released."""
        ...
