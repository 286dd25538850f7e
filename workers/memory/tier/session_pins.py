"""Sessions as a tier knows them: whose chunks are whose, and which of them must stay."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from forecache.workers.errors import CatalogUnavailableError
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.tier.catalog import Catalog, SessionRecord


class SessionPins:
    """The records that came through this tier, and all pins, in its store and for the catalog.

    The catalog has all records; it gets them again from the tiers when it comes back empty, and a tier that was
    restarted takes the pins from it. Both know records of ``most_bytes`` at most: of sessions that are not pinned those
    that were of use longest ago are forgotten. Their chunks stay, and are found by whoever sends the same prompt.
    """

    def __init__(self, store: ArenaStore, catalog: Catalog, most_bytes: int) -> None:
        self._store = store
        self._catalog = catalog
        self._lock = threading.Lock()
        self._most_bytes = most_bytes
        self._nbytes = 0
        self._records: OrderedDict[str, SessionRecord] = OrderedDict()  # those that were of use longest ago first

    def record(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with these chunks and pieces of a state; a pin goes over to them."""
        with self._lock:
            known = self._records.get(session_id)
        with suppress(CatalogUnavailableError):  # then what this tier knows must do
            entered = self._catalog.session(session_id)
            if entered is not None and (known is None or entered.changed_unix_s >= known.changed_unix_s):
                known = entered
        record = SessionRecord(session_id, tuple(keys), state_keys=tuple(state_keys))
        if known is not None:
            record = replace(record, pinned_until_unix_s=known.pinned_until_unix_s).after(known)
        self.set(record)
        self.publish([session_id])

    def told(self, record: SessionRecord) -> int:
        """As :meth:`set`, of a record that is in the catalog since before this tier was told of it. One that comes so
        late that a newer one is there, or that the session is over, is not taken over: its pin would not end."""
        with suppress(CatalogUnavailableError):  # then it must do
            entered = self._catalog.session(record.session_id)
            if entered is None or entered.changed_unix_s > record.changed_unix_s:
                return 0
        return self.set(record)

    def set(self, record: SessionRecord) -> int:
        """Take over ``record``, pins included, unless a newer one is known; returns how many of its chunks here must
        yield to what is promised, as :meth:`ArenaStore.pin` does."""
        with self._lock:
            known = self._records.get(record.session_id)
            if known is not None and known.changed_unix_s > record.changed_unix_s:
                return 0
            self._forget(record.session_id)
            self._records[record.session_id] = record
            self._nbytes += record.nbytes
            self._make_room()
            return self._store.pin(record.session_id, (*record.keys, *record.state_keys) if record.is_pinned else ())

    def forget(self, session_id: str) -> None:
        """The session is over; unknown ones are fine."""
        with self._lock:
            self._forget(session_id)
            self._store.unpin(session_id)

    def tick(self) -> None:
        """Let go of pins whose time is over, and of records that nobody can ask for any more."""
        with self._lock:
            for record in list(self._records.values()):
                if record.pinned_until_unix_s and not record.is_pinned:
                    self._records[record.session_id] = replace(record, pinned_until_unix_s=0.0)
                    self._store.unpin(record.session_id)
                if record.expiry_s <= 0:
                    self._forget(record.session_id)
            self._make_room()

    def load(self) -> None:
        """Take the pins from the catalog."""
        for record in self._catalog.sessions():
            if record.is_pinned:
                self.set(record)

    def publish(self, session_ids: Sequence[str] | None = None) -> None:
        """Write the records of ``session_ids``, or all, to the catalog, if it is there."""
        with self._lock:
            names = self._records if session_ids is None else session_ids
            records = [record for name in names if (record := self._records.get(name)) and record.expiry_s > 0]
        try:
            for record in records:
                self._catalog.set_session(record, self._most_bytes)
        except CatalogUnavailableError:
            return  # all are published when it is back

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when bytes are miscounted, or more is recorded than may be."""
        with self._lock:
            assert self._nbytes == sum(record.nbytes for record in self._records.values()), "records are miscounted"
            some_may_go = any(not record.pinned_until_unix_s for record in self._records.values())
            assert self._nbytes <= self._most_bytes or not some_may_go, "more is recorded of sessions than may be"

    # Below: called with the lock held.

    def _forget(self, session_id: str) -> None:
        known = self._records.pop(session_id, None)
        self._nbytes -= 0 if known is None else known.nbytes

    def _make_room(self) -> None:
        for session_id in list(self._records) if self._nbytes > self._most_bytes else ():
            if self._nbytes <= self._most_bytes:
                break
            if not self._records[session_id].pinned_until_unix_s:
                self._forget(session_id)
