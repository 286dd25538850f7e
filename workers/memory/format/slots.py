"""References to slots of an arena."""

from dataclasses import dataclass

from forecache.workers.memory.format.keys import ChunkKey


@dataclass(frozen=True)
class SlotRef:
    """A slot of an arena as it was when handed out; ``generation`` changes whenever the slot is given away.

    ``remote``: only the chunk's index record lies there; another node holds its bytes for the same holder.
    """

    slot: int
    generation: int
    remote: bool = False


@dataclass(frozen=True)
class Reservation:
    """``ref`` is where to write ``key``; ``stored``: an equal chunk is there already, so write nothing."""

    key: ChunkKey
    ref: SlotRef
    stored: bool
