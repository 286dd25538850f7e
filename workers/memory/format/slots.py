"""Names for places in an arena."""

from dataclasses import dataclass

from forecache.workers.memory.format.keys import ChunkKey


@dataclass(frozen=True)
class SlotRef:
    """A slot of an arena as it was when handed out; ``generation`` changes whenever the slot is given away.

    ``remote``: only the chunk's index record lies there, its bytes are held for the same holder on another node.
    """

    slot: int
    generation: int
    remote: bool = False


@dataclass(frozen=True)
class Reservation:
    """``ref`` is where to write ``key``; ``stored`` is True when an equal chunk is there already (nothing to write)."""

    key: ChunkKey
    ref: SlotRef
    stored: bool
