"""The books of an arena: which chunk lies in which slot, who holds it, and what may be evicted."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.eviction import Idle, IdleSlots
from forecache.workers.memory.arena.headers import FIRST_WRITER, RETIRED, UNKNOWN
from forecache.workers.memory.arena.ledger import Claims, Holds, PinLimits, Pins, PinShare, Quotas, tenant_of
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.arena.writers import Quarantine, Reserved, WriterNews
from forecache.workers.memory.format.hold_id import Released, worker_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef

logger = logging.getLogger(__name__)

FAILURES = 2
"""A slot is retired once its bytes were found wrong this many times."""

Listener = Callable[[ChunkKey, bool], None]
"""Called with (key, True) when a chunk is stored, (key, False) when it is gone. It runs under the store's lock, so it
must be quick."""


class ArenaStore:
    """The owner's side of an arena. It is the in-process `ColdMemory`; any thread may call.

    A slot is in exactly one of five places: ``_free``; ``_idle`` (stored, without a holder); held by at least one
    holder; ``_quarantine`` (taken back from a process that may still write to it); or ``_retired`` (bad memory). A held
    slot is *stored* when ``_stored`` maps a key to it. Otherwise it is private to its holder (not committed yet,
    committed second, or dropped) and becomes free on release.

    An arena that was adopted from a dead owner keeps its sealed chunks.
    """

    def __init__(self, arena: Arena, listener: Listener | None = None, pin_limits: PinLimits | None = None) -> None:
        """``pin_limits``: how much pins may keep, by default :class:`PinLimits`; the rest serves requests."""
        self._arena = arena
        self._listener = listener
        self._lock = threading.Lock()
        self._stored: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * arena.slots
        self._free: deque[int] = deque()  # taken from the right
        self._idle = IdleSlots()
        self._copied: set[ChunkKey] = set()  # stored here; another store answers for them too
        # starts above the marks of an earlier owner, since late calls may still name those
        self._mark = time.time_ns()
        self._answers: dict[ChunkKey, int] = {}  # stored chunk -> mark when this store last started to answer for it
        self._pins = Pins()
        self._pin_limits = pin_limits or PinLimits()
        self._claims = Claims(arena.slots, self._pin_limits)
        self._holds = Holds(arena.slots)
        self._released = Released()
        self._reserved: dict[int, Reserved] = {}  # not committed yet
        self._quarantine = Quarantine(arena.living)
        self._retired: set[int] = set()
        self._failures: dict[int, set[int]] = {}  # slot -> generations whose bytes were found wrong
        self._misread: dict[int, int] = {}  # slot -> last generation that a reader found wrong and this store did not
        self._quotas = Quotas(
            arena.slots,
            lambda: self._idle.count(Idle.PINNED),
            lambda: len(self._retired) + len(self._quarantine),
        )
        self._evicted = self._dropped = 0
        for slot in range(self._arena.slots - 1, -1, -1):
            key = arena.sealed_key(slot)
            if key is not None and key not in self._stored:
                self._keys[slot] = key
                self._idle.add(slot, Idle.SOLE)
                self._insert(key, slot)
            elif (writer := self._arena.writer_of(slot)) == RETIRED:
                self._retired.add(slot)
            elif key is not None or not self._quarantine.add(slot, writer, self._writers(writer), None):
                self._make_free(slot)

    @property
    def arena(self) -> Arena:
        return self._arena

    @property
    def spread(self) -> None:
        """Always ``None``: a single arena has no other nodes."""

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest stored run of ``keys``, from the first; return its slots."""
        with self._lock:
            self._released.check(holder)
            slots = []
            for key in keys:
                slot = self._stored.get(key)
                if slot is None:
                    break
                slots.append(slot)
            return self._hold_all(holder, slots)

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """As :meth:`hold_prefix`; the run never continues elsewhere."""
        return self.hold_prefix(holder, keys), False

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold the stored ones of ``keys``; ``None`` for each that is not stored."""
        with self._lock:
            self._released.check(holder)
            slots = [self._stored.get(key) for key in keys]
            refs = iter(self._hold_all(holder, [slot for slot in slots if slot is not None]))
            return [None if slot is None else next(refs) for slot in slots]

    def find(self, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Slots of the stored ones of ``keys``, without a hold; ``None`` for each that is not stored.

        A reader must compare generations after it has read. A lookup does not count as a use for the order of eviction.
        """
        with self._lock:
            slots = [self._stored.get(key) for key in keys]
            return [None if slot is None else SlotRef(slot, self._arena.generation_of(slot)) for slot in slots]

    def reserve_slots(
        self,
        holder: str,
        keys: Sequence[ChunkKey],
        *,
        copied_only: bool = False,
        writer: int = UNKNOWN,
        begun: int | None = None,
    ) -> list[Reservation]:
        """Reserve slots to write ``keys`` into, held for ``holder`` at once. Evicts idle chunks to make room; with
        ``copied_only`` only chunks that another store answers for.

        ``writer`` is the :attr:`Arena.writer` of the process that will write there, and ``begun`` the last number it
        has given to a reservation.

        A key that another holder has reserved but not committed gets a second slot: the first commit wins. Raises
        :class:`OverloadedError`, and changes nothing, when too few slots are free or idle.
        """
        with self._lock:
            self._released.check(holder)
            self._sweep()
            stored = {key: self._stored[key] for key in keys if key in self._stored}
            needed = sum(key not in stored for key in keys)
            kinds = [Idle.COPIED] if copied_only else [Idle.COPIED, Idle.SOLE, Idle.YIELDING]
            evictable = sum(map(self._idle.count, kinds))
            evictable -= sum(self._idle.is_any_of(slot, kinds) for slot in set(stored.values()))
            if needed > len(self._free) + evictable:
                raise OverloadedError(
                    f"no room for {needed} chunks in the memory tier: of {self._arena.slots} slots "
                    f"{len(self._free)} are free, {evictable} can be evicted, "
                    f"{self._idle.count(Idle.PINNED)} are pinned, {len(self._quarantine)} are in quarantine until a "
                    f"worker ends, {len(self._retired)} have bad memory, the rest is in use. "
                    "Try again later, or raise --cold-bytes."
                )
            refs = dict(zip(stored, self._hold_all(holder, list(stored.values())), strict=True))
            return [
                Reservation(key, refs[key], stored=True)
                if key in refs
                else Reservation(key, self._take(key, Reserved(holder, writer, begun)), stored=False)
                for key in keys
            ]

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]], *, copied: bool = False) -> None:
        """The bytes of these reserved slots are in place and sealed: from now on others find them.

        ``copied``: another store answers for those that are new here, and continues to. Where an equal chunk was stored
        meanwhile, that one stays, and the slot remains private to ``holder``. A slot that was taken back from
        ``holder`` becomes free, since a commit means that its writer is done.

        Raises :class:`ChunkLostError`, and stores nothing, if a slot is not the holder's or not sealed.
        """
        with self._lock:
            held = self._holds.of(holder)
            for _, ref in refs:
                self._written(ref)
            for key, ref in refs:
                if ref.slot not in held or self._keys[ref.slot] != key:
                    raise ChunkLostError(f"slot {ref.slot} is not reserved by {holder} any more: reserve again")
                if not self._arena.is_sealed(ref, key):
                    raise ChunkLostError(f"{holder} committed slot {ref.slot} without a seal: write it again")
            for key, ref in refs:
                self._reserved.pop(ref.slot, None)
                self._arena.forget_writer(ref.slot)
                if key not in self._stored:
                    self._insert(key, ref.slot)
                    if copied:
                        self._copied.add(key)
                        self._claims.set(key, None)

    def apply_report(self, news: WriterNews) -> None:
        """Note which writes a process that maps the arena has finished; frees its quarantined slots."""
        with self._lock:
            for slot in self._quarantine.apply_report(news, self._arena.life):
                self._make_free(slot)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """Forget a chunk: its reader found wrong bytes at ``ref``, or its writer found other bytes than it wrote.

        Holders keep the slot until they release it. A slot whose bytes were wrong :data:`FAILURES` times is retired as
        bad memory. If the slot of a stored chunk has the sealed checksums here, the reader read wrongly, and the slot
        does not count as failed. The chunk is forgotten even so, to keep its reader from finding it again.

        Ignores a remote ``ref``: only an index record lies there, and :meth:`RecordSlots.put` writes a damaged one
        again.
        """
        if ref.slot >= self._arena.slots:
            return
        is_sound = self._arena.check(ref, key)  # before taking the lock: it reads the whole chunk
        with self._lock:
            if self._arena.generation_of(ref.slot) != ref.generation:
                return  # gone already
            if self._stored.get(key) == ref.slot:
                self._remove(key)
                self._dropped += 1
                self._arena.clear(ref.slot)
                self._found_wrong(ref, is_sound)
                if ref.slot in self._idle:
                    self._idle.discard(ref.slot)
                    self._make_free(ref.slot)
            elif ref.slot in self._quarantine or self._keys[ref.slot] == key:
                # Trust a writer that reports wrong bytes: it may have sealed the wrong bytes itself.
                is_written = ref.slot not in self._quarantine and ref.slot not in self._reserved
                self._found_wrong(ref, is_sound and is_written)
                self._written(ref)

    def reserve_quota(self, holder: str, chunks: int) -> None:
        """Reserve a quota of ``chunks`` slots in all for ``holder``. Call it after the stored ones of them are held:
        pinned slots without a holder can't be part of a quota. Raises :class:`OverloadedError`."""
        with self._lock:
            self._released.check(holder)
            self._quotas.reserve(holder, chunks)
            self._keep_yielding()

    def reserve_quota_up_to(self, holder: str, chunks: int) -> int:
        """As :meth:`reserve_quota`, for as many of ``chunks`` as there is room for, but never fewer than before.
        Returns the quota."""
        with self._lock:
            self._released.check(holder)
            return self._quotas.reserve_up_to(holder, chunks)

    def release_chunks(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        """``holder`` stops holding those of ``keys`` that are stored here."""
        with self._lock:
            self._release_slots(holder, [self._stored.get(key, -1) for key in keys])

    def release(self, holder: str) -> None:
        """Release all that ``holder`` holds, for good: a later call for this :class:`.hold_id.HoldId` raises
        :class:`ReleasedError`. Unknown holders are fine. The holder's process must have finished its writes."""
        with self._lock:
            self._released.add(holder)
            self._release(holder)

    def start_over(self, holder: str) -> None:
        """Release the slots and the quota of ``holder``, which stays alive. Its process must have finished its
        writes."""
        with self._lock:
            self._release(holder)

    def release_prefix(self, prefix: str) -> int:
        """Release every holder whose name starts with ``prefix``, the name of a dead worker. Returns how many there
        were.

        The process may still be alive and write to slots that it has reserved. These wait in quarantine until it is
        gone, or says that it has finished.
        """
        with self._lock:
            holders = [holder for holder in self._all_holders() if holder.startswith(prefix)]
            for holder in holders:
                self._release(holder, may_write=True)
            self._released.forget(worker_of(prefix))
            return len(holders)

    def released_below(self, worker_id: str) -> int:
        """All serials of the worker's holders below this one are released."""
        with self._lock:
            return self._released.floor(worker_id)

    def forget_released(self, worker_id: str, floor: int) -> None:
        """All serials of the worker's holders below ``floor`` are released, so they need not be remembered one by
        one."""
        with self._lock:
            self._released.raise_floor(worker_id, floor)

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """Does nothing: a single arena pins no sessions, and finds their chunks by key."""

    def holders(self) -> list[str]:
        """Names of all that hold slots or a quota."""
        with self._lock:
            return self._all_holders()

    def keys(self) -> list[ChunkKey]:
        """Keys of all stored chunks."""
        with self._lock:
            return list(self._stored)

    def stored(self, keys: Iterable[ChunkKey]) -> list[bool]:
        """Which of ``keys`` are stored."""
        with self._lock:
            return [key in self._stored for key in keys]

    @property
    def room(self) -> int:
        """Slots available without loss: free, or of idle chunks that another store answers for."""
        with self._lock:
            return len(self._free) + self._idle.count(Idle.COPIED)

    def coldest(self, count: int, *, copied: bool = False) -> list[ChunkKey]:
        """At most ``count`` idle chunks in the order of their eviction: those that only this store answers for, or
        (``copied``) those that another store answers for."""
        kinds = [Idle.COPIED] if copied else [Idle.SOLE, Idle.YIELDING]
        with self._lock:
            slots = [slot for kind in kinds for slot in self._idle.of(kind)][: max(count, 0)]
            return [key for slot in slots if (key := self._keys[slot]) is not None]

    def copied(self) -> list[ChunkKey]:
        """Chunks that another store answers for."""
        with self._lock:
            return list(self._copied)

    @property
    def mark(self) -> int:
        """Grows each time that this store starts to answer for a chunk: see :meth:`set_copied`."""
        with self._lock:
            return self._mark

    def set_copied(self, keys: Iterable[ChunkKey], copied: bool, since: int | None = None) -> None:
        """Another store answers for ``keys`` too (or no longer does). Copied chunks are evicted first.

        ``since``: the :attr:`mark` before the other store was given its copies. A chunk that this store has started to
        answer for after that keeps its state. Otherwise two stores that send each other the same chunk at once would
        each rely on the other, and both would evict it first.
        """
        with self._lock:
            known = [key for key in keys if key in self._stored and (since is None or self._answers[key] <= since)]
            if copied:
                self._copied.update(known)
            else:
                self._copied.difference_update(known)
                self._mark += 1
                self._answers.update(dict.fromkeys(known, self._mark))
            self._claim(known)
            self._settle(known)

    def pin(self, name: str, keys: Sequence[ChunkKey]) -> int:
        """Keep ``keys`` from eviction until :meth:`unpin`, both those stored already and those that come later.

        Quotas take precedence, and pins keep no more than :class:`PinLimits` allow. Pinned chunks without room *yield*:
        they are evicted last, and become pinned again once there is room. Returns how many of ``keys`` yield now, or
        would if they had no holder.
        """
        with self._lock:
            changed = self._pins.set(name, keys)
            self._claim(changed)
            self._settle(changed)
            yielding = sum(self._idle.is_any_of(self._stored.get(key, -1), [Idle.YIELDING]) for key in set(keys))
            claimed = sum(key in self._claims for key in set(keys))
            return max(yielding, min(claimed, self._claims.share(tenant_of(name), {}).over))

    def unpin(self, name: str) -> None:
        """Unknown names are fine."""
        self.pin(name, ())

    def pin_share(self, tenant: str) -> PinShare:
        """What a tenant has pinned here, and its limits."""
        with self._lock:
            return self._claims.share(tenant, self._pins.of_tenant(tenant))

    def stats(self) -> TierStats:
        with self._lock:
            self._sweep()
            used = self._arena.slots - len(self._free)
            unusable = len(self._quarantine) + len(self._retired)
            return TierStats(
                slots=self._arena.slots,
                used_slots=used,
                held_slots=used - len(self._idle) - unusable,
                pinned_slots=self._idle.count(Idle.PINNED),
                quota_slots=self._quotas.total,
                copied_slots=self._idle.count(Idle.COPIED),
                stored_chunks=len(self._stored),
                evicted_chunks=self._evicted,
                dropped_chunks=self._dropped,
                quarantined_slots=len(self._quarantine),
                bad_slots=len(self._retired),
            )

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError`, with the reason, unless every slot is in exactly one place."""
        with self._lock:
            self._holds.check_integrity()
            free = set(self._free)
            assert len(free) == len(self._free), "a slot is free twice"
            for slot in range(self._arena.slots):
                no_key = [slot in free, slot in self._quarantine, slot in self._retired]
                places = [*no_key, slot in self._idle, self._holds.count(slot) > 0]
                assert sum(places) == 1, f"slot {slot} is in {sum(places)} of: free, quarantine, retired, idle, held"
                assert (self._keys[slot] is None) == any(no_key), f"slot {slot}: a key and not in use, or neither"
                if slot in self._reserved:
                    assert self._holds.count(slot) == 1, f"slot {slot} is reserved, and not held by its writer alone"
                    assert slot not in self._stored.values(), f"slot {slot} is reserved and stored"
            for kind in Idle:
                for slot in self._idle.of(kind):
                    key = self._keys[slot] or b""
                    assert self._stored.get(key) == slot, f"slot {slot} is idle and not stored"
                    # a yielding chunk is not reconsidered when a pinned slot gets a holder
                    known = (kind, Idle.PINNED) if kind is Idle.YIELDING else (kind,)
                    assert self._kind(slot, key) in known, f"slot {slot} is wrongly counted as {kind.name}"
            self._quotas.check_integrity()
            assert self._copied <= self._stored.keys(), "a chunk is marked as copied and is not stored"
            assert self._answers.keys() == self._stored.keys(), "stored chunks and their marks differ"
            self._pins.check_integrity()
            self._idle.check_integrity()
            claiming = {key for key in self._stored if key in self._pins and key not in self._copied}
            assert claiming == {key for key in self._stored if key in self._claims}, "a pinned chunk claims no slot"
            assert len(self._claims) == len(claiming), "a chunk that is not stored claims a slot"
            pinned, limits, slots = self._idle.count(Idle.PINNED), self._pin_limits, self._arena.slots
            assert pinned <= limits.of_all(slots), "more is pinned than the limit allows"
            for tenant in self._idle.tenants(Idle.PINNED):
                few = self._idle.count_of(Idle.PINNED, tenant) <= limits.of(tenant, slots)
                assert few, f"more is pinned for tenant {tenant!r} than its limit allows"
            for key, slot in self._stored.items():
                assert self._keys[slot] == key, f"slot {slot} is stored under another key"
                ref = SlotRef(slot, self._arena.generation_of(slot))
                assert self._arena.is_sealed(ref, key), f"slot {slot} is stored and its header is not sealed so"

    # Call the methods below with the lock held.

    def _all_holders(self) -> list[str]:
        return list(dict.fromkeys([*self._holds.holders(), *self._quotas.holders()]))

    def _hold_all(self, holder: str, slots: list[int]) -> list[SlotRef]:
        # one call for all: a long prompt has thousands
        if not slots:
            return []
        self._holds.add(holder, slots)
        for slot in slots:
            self._idle.discard(slot)
        generations = self._arena.generation(np.array(slots, np.int64)).tolist()
        return [SlotRef(slot, generation) for slot, generation in zip(slots, generations, strict=True)]

    def _take(self, key: ChunkKey, reserved: Reserved) -> SlotRef:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._idle.pop()
            evicted = self._keys[slot]
            assert evicted is not None
            self._remove(evicted)
            self._evicted += 1
        self._arena.renew(slot, reserved.writer)
        self._keys[slot] = key
        self._reserved[slot] = reserved
        return self._hold_all(reserved.holder, [slot])[0]

    def _writers(self, writer: int) -> Set[int]:
        """The processes that ``writer`` may stand for."""
        if writer == UNKNOWN:
            return self._arena.writers()
        return {writer} if writer >= FIRST_WRITER else frozenset()

    def _sweep(self) -> None:
        if len(self._quarantine):
            for slot in self._quarantine.sweep():
                self._make_free(slot)

    def _written(self, ref: SlotRef) -> None:
        """The writer of ``ref`` has finished there."""
        if self._arena.generation_of(ref.slot) == ref.generation and self._quarantine.written(ref.slot):
            self._make_free(ref.slot)

    def _found_wrong(self, ref: SlotRef, is_sound: bool) -> None:
        """A reader or writer found wrong bytes at ``ref``; ``is_sound``: this store finds the sealed ones."""
        if self._misread.get(ref.slot) == ref.generation:
            return  # a second reader of the same bytes
        if not is_sound:
            self._count_failure(ref.slot)
            return
        self._misread[ref.slot] = ref.generation
        logger.warning(
            "a reader found wrong bytes in slot %d of %s, which holds the right ones: it read wrongly. The slot stays "
            "in use. If this repeats, check the devices of this node's workers.",
            ref.slot, self._arena.path,
        )  # fmt: skip

    def _count_failure(self, slot: int) -> None:
        generations = self._failures.setdefault(slot, set())
        if (generation := self._arena.generation_of(slot)) in generations:
            return  # a second reader of the same bytes
        generations.add(generation)
        if len(generations) == FAILURES:
            logger.error(
                "bad memory: slot %d of %s held wrong bytes %d times and is not used any more",
                slot, self._arena.path, FAILURES,
            )  # fmt: skip

    def _failed(self, slot: int) -> int:
        """How many generations of ``slot`` had wrong bytes."""
        return len(self._failures.get(slot, ()))

    def _release(self, holder: str, *, may_write: bool = False) -> None:
        self._quotas.end(holder)
        # Last chunks first, so that they are evicted first: a prefix is useful without its continuation.
        self._release_slots(holder, list(self._holds.of(holder))[::-1], may_write=may_write)
        self._keep_yielding()
        if not may_write:
            for slot in self._quarantine.released(holder):
                self._make_free(slot)

    def _release_slots(self, holder: str, slots: Sequence[int], *, may_write: bool = False) -> None:
        for slot in self._holds.remove(holder, slots):
            key = self._keys[slot]
            reserved = self._reserved.pop(slot, None)
            if key is not None and self._stored.get(key) == slot:
                self._idle.add(slot, self._kind(slot, key), self._pins.tenant(key) or "")
            elif (
                may_write
                and reserved is not None
                and self._quarantine.add(slot, reserved.writer, self._writers(reserved.writer), reserved)
            ):
                self._keys[slot] = None
            else:
                self._make_free(slot)

    def _make_free(self, slot: int) -> None:
        self._keys[slot] = None
        if self._failed(slot) >= FAILURES:
            self._arena.retire(slot)
            self._retired.add(slot)
            return
        self._arena.clear(slot)
        self._arena.forget_writer(slot)
        # a slot that has failed is reused last
        (self._free.appendleft if self._failed(slot) else self._free.append)(slot)

    def _insert(self, key: ChunkKey, slot: int) -> None:
        self._stored[key] = slot
        self._mark += 1
        self._answers[key] = self._mark
        self._claims.set(key, self._pins.tenant(key))
        if self._listener is not None:
            self._listener(key, True)

    def _kind(self, slot: int, key: ChunkKey) -> Idle:
        if key in self._copied:
            return Idle.COPIED  # pinned or not: the store that answers for it keeps it
        tenant = self._pins.tenant(key)
        if tenant is None:
            return Idle.SOLE
        return Idle.PINNED if self._idle.is_any_of(slot, [Idle.PINNED]) or self._may_pin(tenant) else Idle.YIELDING

    def _may_pin(self, tenant: str) -> bool:
        """Whether one more slot may be pinned for the tenant."""
        slots, limits = self._arena.slots, self._pin_limits
        return (
            self._quotas.room > 0
            and self._idle.count(Idle.PINNED) < limits.of_all(slots)
            and self._idle.count_of(Idle.PINNED, tenant) < limits.of(tenant, slots)
        )

    def _keep_yielding(self) -> None:
        """Pin as many yielding chunks as there is room for now."""
        if not any(map(self._may_pin, self._idle.tenants(Idle.YIELDING))):
            return  # runs at every release, and the chunks above the limits can be many
        for slot in reversed(self._idle.of(Idle.YIELDING)):
            tenant = self._idle.tenant(slot)
            if self._may_pin(tenant):
                self._idle.change(slot, Idle.PINNED, tenant)

    def _claim(self, keys: Iterable[ChunkKey]) -> None:
        """Update the claims of ``keys`` after their pins or copies have changed."""
        for key in keys:
            answers = key in self._stored and key not in self._copied
            self._claims.set(key, self._pins.tenant(key) if answers else None)

    def _settle(self, keys: Iterable[ChunkKey]) -> None:
        """Update the eviction order of ``keys`` after their pins or copies have changed."""
        for key in keys:
            slot = self._stored.get(key)
            if slot is not None:
                self._idle.change(slot, self._kind(slot, key), self._pins.tenant(key) or "")
        self._keep_yielding()

    def _remove(self, key: ChunkKey) -> None:
        del self._stored[key], self._answers[key]
        self._copied.discard(key)
        self._claims.set(key, None)
        if self._listener is not None:
            self._listener(key, False)
