"""Which chunk lies where in an arena, who holds it, and what may be evicted."""

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
"""A slot whose bytes were found wrong so often is not used any more."""

Listener = Callable[[ChunkKey, bool], None]
"""Called with (key, True) when a chunk is stored, (key, False) when it is gone. Under the lock: be quick."""


class ArenaStore:
    """The owner's side of an arena: `ColdMemory` in-process, safe to call from any thread.

    A slot is in one of five places: ``_free``; ``_idle`` (stored, held by nobody); held by at least one holder;
    ``_quarantine``, where it waits for the end of a writer that it was taken from; or ``_retired``, since its memory is
    bad. A held slot is *stored* when ``_stored`` leads to it; else it is private to its holder (reserved and not
    committed, committed second, or dropped) and freed by it.

    An arena that was adopted from a dead owner keeps its sealed chunks.
    """

    def __init__(self, arena: Arena, listener: Listener | None = None, pin_limits: PinLimits | None = None) -> None:
        """``pin_limits``: what pins may keep at most, by default those of :class:`PinLimits`; the rest serves
        requests."""
        self._arena = arena
        self._listener = listener
        self._lock = threading.Lock()
        self._stored: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * arena.slots
        self._free: deque[int] = deque()  # taken from the right
        self._idle = IdleSlots()
        self._copied: set[ChunkKey] = set()  # stored here, and somebody else answers for them
        # begins above the marks of an earlier owner, which calls that are still on their way may name
        self._mark = time.time_ns()
        self._answers: dict[ChunkKey, int] = {}  # stored chunk -> mark at which this store last came to answer for it
        self._pins = Pins()
        self._pin_limits = pin_limits or PinLimits()
        self._claims = Claims(arena.slots, self._pin_limits)
        self._holds = Holds(arena.slots)
        self._released = Released()
        self._reserved: dict[int, Reserved] = {}  # not committed yet
        self._quarantine = Quarantine(arena.living)
        self._retired: set[int] = set()
        self._failures: dict[int, set[int]] = {}  # slots → the generations whose bytes were found wrong
        self._misread: dict[int, int] = {}  # slots → the last generation whose bytes a reader alone found wrong
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
        """A single arena has no other nodes."""

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored; return its places."""
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
        """As :meth:`hold_prefix`: there is no other place."""
        return self.hold_prefix(holder, keys), False

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        with self._lock:
            self._released.check(holder)
            slots = [self._stored.get(key) for key in keys]
            refs = iter(self._hold_all(holder, [slot for slot in slots if slot is not None]))
            return [None if slot is None else next(refs) for slot in slots]

    def find(self, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Places of those of ``keys`` that are stored; ``None`` for each that is not. Nobody holds them: whoever reads
        there compares generations afterwards, and has not used them, as far as the order of eviction goes."""
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
        """Places to write ``keys`` into, held for ``holder`` at once; evicts idle chunks to make room, or only those
        that somebody else answers for.

        ``writer`` is the :attr:`Arena.writer` of the process that will write there, and ``begun`` the last number that
        it has given to a reservation.

        A key that someone has reserved but not committed gets a place of its own: the first commit wins.
        Raises :class:`OverloadedError`, and changes nothing, when too few slots are free or idle.
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
                    f"{self._idle.count(Idle.PINNED)} are pinned, {len(self._quarantine)} wait for a worker's end, "
                    f"{len(self._retired)} have bad memory, the rest is in use. "
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

        ``copied``: another store answers for those that are new here, and goes on to do so.
        Where an equal chunk was stored meanwhile, that one stays and the slot remains private to ``holder``. Slots that
        were taken back from it are free now, since it writes there no more.
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
                    raise ChunkLostError(f"slot {ref.slot} was committed by {holder} without a seal: write again")
            for key, ref in refs:
                self._reserved.pop(ref.slot, None)
                self._arena.forget_writer(ref.slot)
                if key not in self._stored:
                    self._insert(key, ref.slot)
                    if copied:
                        self._copied.add(key)
                        self._claims.set(key, None)

    def hear(self, news: WriterNews) -> None:
        """What a process that writes into the arena tells of its writes."""
        with self._lock:
            for slot in self._quarantine.hear(news, self._arena.life):
                self._make_free(slot)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong, or its writer found other bytes there than it wrote: forget it.

        Holders keep the slot until they release. A slot whose bytes were wrong :data:`FAILURES` times is not used any
        more: its memory is bad. If a stored chunk has the bytes that were sealed, its reader read them wrongly, and
        the slot is as good as it was. The chunk is forgotten then too, so that its reader does not find it again.

        A remote ``ref`` changes nothing here: only an index record lies there, and :meth:`RecordSlots.put` writes a
        damaged one anew.
        """
        if ref.slot >= self._arena.slots:
            return
        is_sound = self._arena.check(ref, key)  # before the lock: it reads the whole chunk
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
                # a writer knows what it wrote, and may have sealed what came of it
                is_written = ref.slot not in self._quarantine and ref.slot not in self._reserved
                self._found_wrong(ref, is_sound and is_written)
                self._written(ref)

    def reserve_quota(self, holder: str, chunks: int) -> None:
        """``holder`` may need so many slots in all. Ask it after what is stored of them is held: pinned slots that
        nobody holds can't be promised. Raises :class:`OverloadedError`."""
        with self._lock:
            self._released.check(holder)
            self._quotas.reserve(holder, chunks)
            self._keep_yielding()

    def reserve_quota_up_to(self, holder: str, chunks: int) -> int:
        """As :meth:`promise`, of as many of ``chunks`` as there is room for, and no fewer than before."""
        with self._lock:
            self._released.check(holder)
            return self._quotas.reserve_up_to(holder, chunks)

    def release_chunks(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        """``holder`` needs those of ``keys`` no longer that are stored here."""
        with self._lock:
            self._release_slots(holder, [self._stored.get(key, -1) for key in keys])

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds, for good: what is asked for a :class:`.holders.HoldId` from now on comes
        too late, and raises :class:`ReleasedError`. Unknown holders are fine. Its process writes to none of it any
        more."""
        with self._lock:
            self._released.add(holder)
            self._release(holder)
            for slot in self._quarantine.released(holder):
                self._make_free(slot)

    def start_over(self, holder: str) -> None:
        """Let go of all that ``holder`` holds and was promised; it goes on. Its process writes to none of it any
        more."""
        with self._lock:
            self._release(holder)
            for slot in self._quarantine.released(holder):
                self._make_free(slot)

    def release_prefix(self, prefix: str) -> int:
        """Release every holder whose name starts with ``prefix``, that of a worker that is gone; return how many there
        were. If its process is not quite gone, it may still write what it has reserved: no other gets such slots before
        it is, or has told that it does not."""
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
        """All serials of the worker's holders below ``floor`` are released, and need not be remembered one by one."""
        with self._lock:
            self._released.raise_floor(worker_id, floor)

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """Chunks of a session are found by their keys; there is nobody here who would pin it."""

    def holders(self) -> list[str]:
        """Names of all that hold something."""
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
        """Slots that can be had without loss: free, or of chunks that somebody else answers for."""
        with self._lock:
            return len(self._free) + self._idle.count(Idle.COPIED)

    def coldest(self, count: int, *, copied: bool = False) -> list[ChunkKey]:
        """At most ``count`` chunks that only this store answers for, or (``copied``) that somebody else does: those
        that would be evicted first."""
        kinds = [Idle.COPIED] if copied else [Idle.SOLE, Idle.YIELDING]
        with self._lock:
            slots = [slot for kind in kinds for slot in self._idle.of(kind)][: max(count, 0)]
            return [key for slot in slots if (key := self._keys[slot]) is not None]

    def copied(self) -> list[ChunkKey]:
        """Chunks that somebody else answers for."""
        with self._lock:
            return list(self._copied)

    @property
    def mark(self) -> int:
        """Grows each time that this store comes to answer for a chunk: see :meth:`set_copied`."""
        with self._lock:
            return self._mark

    def set_copied(self, keys: Iterable[ChunkKey], copied: bool, since: int | None = None) -> None:
        """Another store answers for ``keys`` too (or does no longer): such chunks are evicted first.

        ``since``: the :attr:`mark` before the other store was given its copies. A chunk that this store has come to
        answer for after that stays as it is. Else two stores that send each other a chunk at once would each count on
        the other, and both evict it first.
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
        """``keys`` are not evicted until :meth:`unpin`, whether they are stored already or come later.

        Slots that are promised go before, and no more is kept than :class:`PinLimits` say: pinned chunks that this
        leaves no room for are evicted last, and kept once there is room. Returns how many of ``keys`` are such now, or
        would be, were they held by nobody.
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
        """What a tenant has pinned here, and may."""
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
        """Raise :class:`AssertionError`, saying what is wrong, unless every slot is in exactly one place."""
        with self._lock:
            self._holds.check_integrity()
            free = set(self._free)
            assert len(free) == len(self._free), "a slot is free twice"
            for slot in range(self._arena.slots):
                no_key = [slot in free, slot in self._quarantine, slot in self._retired]
                places = [*no_key, slot in self._idle, self._holds.count(slot) > 0]
                assert sum(places) == 1, f"slot {slot} is in {sum(places)} of free, quarantine, retired, idle, held"
                assert (self._keys[slot] is None) == any(no_key), f"slot {slot}: a key and not in use, or neither"
                if slot in self._reserved:
                    assert self._holds.count(slot) == 1, f"slot {slot} is reserved, and not held by its writer alone"
                    assert slot not in self._stored.values(), f"slot {slot} is reserved and stored"
            for kind in Idle:
                for slot in self._idle.of(kind):
                    key = self._keys[slot] or b""
                    assert self._stored.get(key) == slot, f"slot {slot} is idle and not stored"
                    # who yields is not asked again when a pinned slot becomes a held one
                    known = (kind, Idle.PINNED) if kind is Idle.YIELDING else (kind,)
                    assert self._kind(slot, key) in known, f"slot {slot} is among the {kind.name} and is not"
            self._quotas.check_integrity()
            assert self._copied <= self._stored.keys(), "a chunk has copies and is not stored"
            assert self._answers.keys() == self._stored.keys(), "stored chunks and their marks differ"
            self._pins.check_integrity()
            self._idle.check_integrity()
            claiming = {key for key in self._stored if key in self._pins and key not in self._copied}
            assert claiming == {key for key in self._stored if key in self._claims}, "a pinned chunk claims no slot"
            assert len(self._claims) == len(claiming), "what is not stored claims a slot"
            pinned, limits, slots = self._idle.count(Idle.PINNED), self._pin_limits, self._arena.slots
            assert pinned <= limits.of_all(slots), "more is pinned than may be"
            for tenant in self._idle.tenants(Idle.PINNED):
                few = self._idle.count_of(Idle.PINNED, tenant) <= limits.of(tenant, slots)
                assert few, f"more is pinned for tenant {tenant!r} than may be"
            for key, slot in self._stored.items():
                assert self._keys[slot] == key, f"slot {slot} is stored under another key"
                ref = SlotRef(slot, self._arena.generation_of(slot))
                assert self._arena.is_sealed(ref, key), f"slot {slot} is stored and its header does not say so"

    # Below: called with the lock held.

    def _all_holders(self) -> list[str]:
        return list(dict.fromkeys([*self._holds.holders(), *self._quotas.holders()]))

    def _hold_all(self, holder: str, slots: list[int]) -> list[SlotRef]:
        # thousands in one call, when a long prompt is found
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
        """The processes that ``writer`` may be."""
        if writer == UNKNOWN:
            return self._arena.writers()
        return {writer} if writer >= FIRST_WRITER else frozenset()

    def _sweep(self) -> None:
        if len(self._quarantine):
            for slot in self._quarantine.sweep():
                self._make_free(slot)

    def _written(self, ref: SlotRef) -> None:
        """The writer of ``ref`` writes there no more."""
        if self._arena.generation_of(ref.slot) == ref.generation and self._quarantine.written(ref.slot):
            self._make_free(ref.slot)

    def _found_wrong(self, ref: SlotRef, is_sound: bool) -> None:
        """Somebody has found wrong bytes at ``ref``; ``is_sound``: this store finds those that were sealed."""
        if self._misread.get(ref.slot) == ref.generation:
            return  # another reader of the same bytes
        if not is_sound:
            self._count_failure(ref.slot)
            return
        self._misread[ref.slot] = ref.generation
        logger.warning(
            "slot %d of %s holds the bytes that were written there, and a reader found others: it read wrongly. The "
            "slot stays in use. If this repeats, check the devices of this node's workers.",
            ref.slot, self._arena.path,
        )  # fmt: skip

    def _count_failure(self, slot: int) -> None:
        generations = self._failures.setdefault(slot, set())
        if (generation := self._arena.generation_of(slot)) in generations:
            return  # another reader of the same bytes
        generations.add(generation)
        if len(generations) == FAILURES:
            logger.error(
                "bad memory: slot %d of %s was found to hold wrong bytes %d times and is not used any more",
                slot, self._arena.path, FAILURES,
            )  # fmt: skip

    def _failed(self, slot: int) -> int:
        """How often wrong bytes were found in ``slot``."""
        return len(self._failures.get(slot, ()))

    def _release(self, holder: str, *, may_write: bool = False) -> None:
        self._quotas.end(holder)
        # Last chunks first: a prefix is of use without its continuation, not the other way round.
        self._release_slots(holder, list(self._holds.of(holder))[::-1], may_write=may_write)
        self._keep_yielding()

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
        # one that has failed is taken last of all
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
            return Idle.COPIED  # pinned or not: it is where it is answered for
        tenant = self._pins.tenant(key)
        if tenant is None:
            return Idle.SOLE
        return Idle.PINNED if self._idle.is_any_of(slot, [Idle.PINNED]) or self._may_pin(tenant) else Idle.YIELDING

    def _may_pin(self, tenant: str) -> bool:
        """Whether one more slot may be kept for a pin of the tenant's."""
        slots, limits = self._arena.slots, self._pin_limits
        return (
            self._quotas.room > 0
            and self._idle.count(Idle.PINNED) < limits.of_all(slots)
            and self._idle.count_of(Idle.PINNED, tenant) < limits.of(tenant, slots)
        )

    def _keep_yielding(self) -> None:
        """Room there may be that there was not before: pinned chunks that had to yield are kept, as many as can."""
        if not any(map(self._may_pin, self._idle.tenants(Idle.YIELDING))):
            return  # asked with every release: chunks that are more than may be pinned can be many
        for slot in reversed(self._idle.of(Idle.YIELDING)):
            tenant = self._idle.tenant(slot)
            if self._may_pin(tenant):
                self._idle.change(slot, Idle.PINNED, tenant)

    def _claim(self, keys: Iterable[ChunkKey]) -> None:
        """Pins or copies of ``keys`` have changed."""
        for key in keys:
            answers = key in self._stored and key not in self._copied
            self._claims.set(key, self._pins.tenant(key) if answers else None)

    def _settle(self, keys: Iterable[ChunkKey]) -> None:
        """Pins or copies of ``keys`` have changed."""
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
