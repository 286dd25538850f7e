"""Index records of chunks that other nodes hold: the indexer scores them here, with those of local chunks."""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.chunk_batch import RecordBatch
from forecache.workers.memory.format.hold_id import Released
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef

logger = logging.getLogger(__name__)


class RecordSlots:
    """The record slots of an arena, on the owner's side. Any thread may call.

    A slot is free, or holds the record of a key. Records without a holder are evicted, least recently used first, when
    another record needs room. A new owner of the arena keeps the records of the old one.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._slots: dict[ChunkKey, int] = {}
        self._idle: OrderedDict[ChunkKey, None] = OrderedDict()
        self._held: dict[str, set[ChunkKey]] = {}
        self._counts: Counter[ChunkKey] = Counter()
        self._quotas: dict[str, int] = {}
        self._released = Released()
        self._free: list[int] = []
        for slot in range(arena.slots + arena.record_slots - 1, arena.slots - 1, -1):
            key = arena.sealed_key(slot)
            if key is not None and key not in self._slots:
                self._slots[key] = slot
                self._idle[key] = None
            else:
                arena.clear(slot)
                self._free.append(slot)

    def reserve_quota(self, holder: str, records: int) -> None:
        """Set how many records ``holder`` may need in all. Raises :class:`OverloadedError` when the quotas of others
        leave too little."""
        with self._lock:
            self._released.check(holder)
            others = sum(self._quotas.values()) - self._quotas.get(holder, 0)
            if records + others > self._arena.record_slots:
                raise OverloadedError(
                    f"no room for the index records of {records} chunks on other nodes: of {self._arena.record_slots} "
                    f"{others} are reserved for others. Try again later, lower max_tokens, or raise "
                    "--remote-index-bytes."
                )
            self._quotas[holder] = records

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are here; ``None`` for each that is not."""
        with self._lock:
            self._released.check(holder)
            return [self._hold(holder, key) if key in self._slots else None for key in keys]

    def put(self, holder: str, batch: RecordBatch) -> list[SlotRef | None]:
        """Store and hold the records of ``batch``; ``None`` for each without room, or whose slot does not keep what is
        written to it.

        A damaged record is written again. If that fails it is forgotten, and its holders find its slot given away.
        """
        with self._lock:
            self._released.check(holder)
            refs: list[SlotRef | None] = []
            for key, record, checksum in zip(batch.keys, batch.index, batch.checksums.tolist(), strict=True):
                slot = self._slots.get(key)
                if slot is not None and self._arena.check(self._ref(slot), key):
                    refs.append(self._hold(holder, key))
                    continue
                known = slot is not None
                if slot is None and (slot := self._take()) is not None:
                    self._arena.renew(slot)
                if slot is None:
                    refs.append(None)
                    continue
                try:
                    self._arena.write_record(self._ref(slot), key, record, checksum)
                except ChunkLostError as error:
                    logger.warning("the index record of chunk %s was not stored: %s", key.hex(), error)
                    if known:
                        self._forget(key)
                    self._free.insert(0, slot)  # perhaps bad memory: reuse it last
                    refs.append(None)
                    continue
                self._slots[key] = slot
                refs.append(self._hold(holder, key))
            return refs

    def release(self, holder: str) -> None:
        """Release all that ``holder`` holds, for good, as :meth:`ArenaStore.release` does; unknown holders are fine."""
        with self._lock:
            self._released.add(holder)
            self._release(holder)

    def start_over(self, holder: str) -> None:
        """Release the records and the quota of ``holder``, which stays alive."""
        with self._lock:
            self._release(holder)

    def forget_released(self, worker_id: str, floor: int) -> None:
        """As :meth:`ArenaStore.forget_released`."""
        with self._lock:
            self._released.raise_floor(worker_id, floor)

    def holders(self) -> list[str]:
        """Names of all that hold records or a quota."""
        with self._lock:
            return list({**self._held, **self._quotas})

    @property
    def held(self) -> int:
        """Records with a holder."""
        with self._lock:
            return len(self._counts)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError`, with the reason, unless every record slot is in exactly one place."""
        with self._lock:
            counts = Counter(key for keys in self._held.values() for key in keys)
            assert counts == self._counts, "record holds are miscounted"
            assert set(counts) | set(self._idle) == set(self._slots), "a record is neither held nor idle"
            assert not set(counts) & set(self._idle), "a record is held and idle"
            slots = [*self._free, *self._slots.values()]
            assert sorted(slots) == list(range(self._arena.slots, self._arena.slots + self._arena.record_slots)), (
                "a record slot is lost, or there twice"
            )
            for key, slot in self._slots.items():
                assert self._arena.is_sealed(self._ref(slot), key), (
                    f"record slot {slot} is sealed as another key than the books say"
                )

    # Call the methods below with the lock held.

    def _release(self, holder: str) -> None:
        self._quotas.pop(holder, None)
        for key in self._held.pop(holder, ()):
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
                self._idle[key] = None

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        key, _ = self._idle.popitem(last=False)
        return self._slots.pop(key)

    def _forget(self, key: ChunkKey) -> None:
        """Remove the record of ``key`` from the books; its holders hold nothing."""
        self._arena.renew(self._slots.pop(key))
        self._idle.pop(key, None)
        self._counts.pop(key, None)
        for held in self._held.values():
            held.discard(key)

    def _hold(self, holder: str, key: ChunkKey) -> SlotRef:
        held = self._held.setdefault(holder, set())
        if key not in held:
            held.add(key)
            self._counts[key] += 1
            self._idle.pop(key, None)
        return self._ref(self._slots[key])

    def _ref(self, slot: int) -> SlotRef:
        return SlotRef(slot, self._arena.generation_of(slot), remote=True)
