"""Sessions at a tier: the chunks of each, and which of them are pinned."""

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
    """The session records that came through this tier, and all pins, for its store and for the catalog.

    The catalog has all records. It gets them from the tiers again when it comes back empty, and a restarted tier reads
    the pins from it. Both keep at most ``most_bytes`` of records: the least recently used sessions without a pin are
    forgotten. Their chunks stay, and the next request with the same prompt finds them.
    """

    def __init__(self, store: ArenaStore, catalog: Catalog, most_bytes: int) -> None:
        self._store = store
        self._catalog = catalog
        self._lock = threading.Lock()
        self._most_bytes = most_bytes
        self._nbytes = 0
        self._records: OrderedDict[str, SessionRecord] = OrderedDict()  # least recently used first

    def record(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with these chunks and pieces of a snapshot; a pin moves on to them."""
        with self._lock:
            known = self._records.get(session_id)
        with suppress(CatalogUnavailableError):  # use what this tier knows
            entered = self._catalog.session(session_id)
            if entered is not None and (known is None or entered.changed_unix_s >= known.changed_unix_s):
                known = entered
        record = SessionRecord(session_id, tuple(keys), state_keys=tuple(state_keys))
        if known is not None:
            record = replace(record, pinned_until_unix_s=known.pinned_until_unix_s).after(known)
        self.set(record)
        self.publish([session_id])

    def told(self, record: SessionRecord) -> int:
        """:meth:`set` for a record that was in the catalog before this tier knew of it.

        A late record is ignored: if the session has a newer one, or has ended, its pin would never end.
        """
        with suppress(CatalogUnavailableError):  # use the record as it is
            entered = self._catalog.session(record.session_id)
            if entered is None or entered.changed_unix_s > record.changed_unix_s:
                return 0
        return self.set(record)

    def set(self, record: SessionRecord) -> int:
        """Take over ``record`` with its pin, unless a newer one is known. Returns how many of its chunks here yield to
        quotas, see :meth:`ArenaStore.pin`."""
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
        """The session has ended; unknown ones are fine."""
        with self._lock:
            self._forget(session_id)
            self._store.unpin(session_id)

    def tick(self) -> None:
        """Remove pins and records that have expired."""
        with self._lock:
            for record in list(self._records.values()):
                if record.pinned_until_unix_s and not record.is_pinned:
                    self._records[record.session_id] = replace(record, pinned_until_unix_s=0.0)
                    self._store.unpin(record.session_id)
                if record.expiry_s <= 0:
                    self._forget(record.session_id)
            self._make_room()

    def load(self) -> None:
        """Read the pins from the catalog."""
        for record in self._catalog.sessions():
            if record.is_pinned:
                self.set(record)

    def publish(self, session_ids: Sequence[str] | None = None) -> None:
        """Write the records of ``session_ids``, or all, to the catalog, if Redis answers."""
        with self._lock:
            names = self._records if session_ids is None else session_ids
            records = [record for name in names if (record := self._records.get(name)) and record.expiry_s > 0]
        try:
            for record in records:
                self._catalog.set_session(record, self._most_bytes)
        except CatalogUnavailableError:
            return  # the publisher sends all when Redis is back

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when bytes are miscounted, or records exceed their limit."""
        with self._lock:
            assert self._nbytes == sum(record.nbytes for record in self._records.values()), "records are miscounted"
            some_may_go = any(not record.pinned_until_unix_s for record in self._records.values())
            assert self._nbytes <= self._most_bytes or not some_may_go, "session records exceed their limit"

    # Call the methods below with the lock held.

    def _forget(self, session_id: str) -> None:
        known = self._records.pop(session_id, None)
        self._nbytes -= 0 if known is None else known.nbytes

    def _make_room(self) -> None:
        for session_id in list(self._records) if self._nbytes > self._most_bytes else ():
            if self._nbytes <= self._most_bytes:
                break
            if not self._records[session_id].pinned_until_unix_s:
                self._forget(session_id)
