"""What the prefetcher tells the engine of its jobs."""

from dataclasses import dataclass

from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot.copies import CopyItem

RecallItem = CopyItem


@dataclass(frozen=True)
class PrefixHeld:
    """The longest stored run of the asked keys is held for ``holder``; ``refs`` are its places.

    The last of them are those of ``others``, the keys that were asked for behind that run. ``failure``: cold memory has
    no room for what ``holder`` may need, so that it holds nothing; ``too_large``: nor would it were all of it free.
    ``quota``: it has room on other nodes, and so much
    here. ``state``: places of the pieces of a snapshot behind them, where sequences have a state.
    """

    holder: str
    refs: tuple[SlotRef, ...]
    others: tuple[ChunkKey, ...] = ()
    failure: str = ""
    overloaded: bool = True
    too_large: bool = False
    quota: SpreadQuota | None = None
    state: tuple[SlotRef, ...] = ()


@dataclass(frozen=True)
class Recalled:
    """A recall is done. ``lost`` names the items whose chunk was gone or damaged; their slots hold nothing.

    ``recalled_bytes`` of cold memory, in ``recalled_chunks`` chunks, took ``duration_s`` to copy and verify.
    """

    ticket: int
    lost: tuple[RecallItem, ...]
    recalled_bytes: int
    duration_s: float
    recalled_chunks: int


@dataclass(frozen=True)
class WrittenBack:
    """Cold memory has the chunk ``key`` of ``slot`` at ``ref``; ``None``: it had no room, or was out of reach.

    ``written_bytes`` is 0 where an equal chunk was stored already; ``duration_s`` is this chunk's quota of the time its
    batch took to copy and seal.
    """

    holder: str
    key: ChunkKey
    slot: int
    ref: SlotRef | None
    failure: str = ""
    overloaded: bool = False
    too_large: bool = False
    written_bytes: int = 0
    duration_s: float = 0.0


@dataclass(frozen=True)
class Released:
    """Cold memory holds nothing for ``holder`` any more, and promises it nothing."""

    holder: str


Completion = PrefixHeld | Recalled | Released | WrittenBack
