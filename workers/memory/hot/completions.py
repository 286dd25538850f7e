"""Results of the prefetcher's jobs, which the engine drains."""

from dataclasses import dataclass

from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot.copies import CopyItem

RecallItem = CopyItem


@dataclass(frozen=True)
class PrefixHeld:
    """The longest stored prefix is held for ``holder``, in the slots ``refs``.

    ``session_keys``: keys of its last chunks, which only the session may use. ``state``: slots of the snapshot's
    pieces, for models with a state. ``failure``: cold memory has no room for the sequence, so nothing is held;
    ``too_large``: even empty cold memory would not have it. ``quota``: its slots on this node, if it is spread over
    several.
    """

    holder: str
    refs: tuple[SlotRef, ...]
    session_keys: tuple[ChunkKey, ...] = ()
    failure: str = ""
    overloaded: bool = True
    too_large: bool = False
    quota: SpreadQuota | None = None
    state: tuple[SlotRef, ...] = ()


@dataclass(frozen=True)
class Recalled:
    """A recall is done. ``lost``: items whose chunk was gone or damaged; their slots hold nothing.

    It took ``duration_s`` to copy and verify ``recalled_chunks`` chunks, ``recalled_bytes`` bytes of cold memory.
    """

    ticket: int
    lost: tuple[RecallItem, ...]
    recalled_bytes: int
    duration_s: float
    recalled_chunks: int


@dataclass(frozen=True)
class WrittenBack:
    """Cold memory has the chunk ``key`` of ``slot`` at ``ref``; ``None``: it had no room, or did not answer.

    ``written_bytes`` is 0 where an equal chunk was stored already; ``duration_s`` is this chunk's part of the time that
    its batch took to copy and seal.
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
    """``holder`` has neither holds nor a quota in cold memory any more."""

    holder: str


Completion = PrefixHeld | Recalled | Released | WrittenBack
