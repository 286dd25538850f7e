"""Processes that write into an arena: what a worker reports of its writes, and the quarantine of its slots.

Docs: docs/integrity.md, "Writers".
"""

import threading
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.slots import SlotRef


@dataclass(frozen=True)
class WriterNews:
    """What a process reports about its writes, with the calls that it makes to the arena's owner anyway.

    ``writer`` is its :attr:`Arena.writer`. It numbers its reservations: ``begun`` is the last number, and all
    reservations below ``ended_before`` are written or abandoned. It reads ``life``, :attr:`Arena.life`, before the
    numbers, so every reservation that an earlier owner gave it has a number up to ``begun``.
    """

    writer: int
    life: int
    begun: int
    ended_before: int


class OpenWrites:
    """A worker's side: the reservations that it may still write. Any thread may call."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._begun = 0
        self._asked: set[int] = set()
        self._places: dict[SlotRef, tuple[int, str]] = {}

    def begin(self) -> int:
        """Call before asking for a reservation; returns its number."""
        with self._lock:
            self._begun += 1
            self._asked.add(self._begun)
            return self._begun

    def answered(self, number: int, holder: str, refs: Sequence[SlotRef]) -> None:
        """Reservation ``number`` gave these slots to write, or none if it was given up."""
        with self._lock:
            self._asked.discard(number)
            self._places.update(dict.fromkeys(refs, (number, holder)))

    def ended(self, refs: Iterable[SlotRef]) -> None:
        """The worker has finished writing these."""
        with self._lock:
            for ref in refs:
                self._places.pop(ref, None)

    def released(self, holder: str) -> None:
        """The worker has finished writing what ``holder`` reserved."""
        with self._lock:
            self._places = {ref: place for ref, place in self._places.items() if place[1] != holder}

    def news(self) -> WriterNews:
        """The report for one call; make a new one for each."""
        life = self._arena.life  # first, see WriterNews
        with self._lock:
            numbers = [*self._asked, *(number for number, _ in self._places.values())]
            return WriterNews(self._arena.writer, life, self._begun, min(numbers, default=self._begun + 1))


@dataclass(frozen=True)
class Reserved:
    """A slot that is reserved and not committed: its holder, the process that writes it, and the last number which that
    process had given to a reservation by then (``None``: it does not number them)."""

    holder: str
    writer: int
    begun: int | None


@dataclass
class _Waiting:
    """``writers``: the processes that may write the slot. ``begun``: the slot is free once its only writer has ended
    all reservations up to this number; ``None``: not known. ``begun_at_news``: take the number from the first report of
    that writer, since an earlier owner gave it the slot."""

    holder: str | None
    writers: Set[int]
    begun: int | None
    begun_at_news: bool


class Quarantine:
    """Slots that were taken back from a holder whose process may still write to them.

    A slot leaves when every process that may write it is gone, or when its writer has reported that it has finished.
    ``living`` returns which of some writers still live. Call with the store's lock held.
    """

    def __init__(self, living: Callable[[Set[int]], Set[int]]) -> None:
        self._living = living
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, slot: int) -> bool:
        return slot in self._waiting

    def add(self, slot: int, writer: int, writers: Set[int], reserved: Reserved | None) -> bool:
        """Quarantine ``slot``, given to ``writer``, if one of the ``writers`` that this number may stand for lives.
        Returns whether it did. ``reserved``: the reservation; ``None``: an earlier owner made it."""
        living = self._living(writers)
        if living:
            holder, begun = (None, None) if reserved is None else (reserved.holder, reserved.begun)
            # reports of an unknown writer can't be matched to the reservation of this slot
            self._waiting[slot] = _Waiting(holder, living, begun, reserved is None and living == {writer})
        return bool(living)

    def apply_report(self, news: WriterNews, life: int) -> list[int]:
        """Apply a writer's report; ``life`` is that of this owner. Returns the slots it has freed."""
        for waiting in self._waiting.values():
            if (
                waiting.begun_at_news
                and waiting.begun is None
                and waiting.writers == {news.writer}
                and news.life == life
            ):
                waiting.begun = news.begun
        return self._pop(
            waiting.writers == {news.writer} and waiting.begun is not None and waiting.begun < news.ended_before
            for waiting in self._waiting.values()
        )

    def released(self, holder: str) -> list[int]:
        """The process of ``holder`` has released it, so its writes have ended; returns the slots freed."""
        return self._pop(waiting.holder == holder for waiting in self._waiting.values())

    def written(self, slot: int) -> bool:
        """The writer of ``slot`` has finished there; returns whether the slot was in quarantine."""
        return self._waiting.pop(slot, None) is not None

    def sweep(self) -> list[int]:
        """Remove and return the slots whose writers are gone."""
        living = self._living({writer for waiting in self._waiting.values() for writer in waiting.writers})
        return self._pop(not waiting.writers & living for waiting in self._waiting.values())

    def _pop(self, free: Iterable[bool]) -> list[int]:
        slots = [slot for slot, is_free in zip(self._waiting, free, strict=True) if is_free]
        for slot in slots:
            del self._waiting[slot]
        return slots
