"""Names of holders of chunks. A name tells the worker, whose holds the tier reclaims when it dies, and the request."""

import re
from collections import OrderedDict
from dataclasses import dataclass, field

from forecache.workers.errors import ReleasedError

MOST_WORKERS = 4096
"""Workers whose released names are remembered; beyond it the least recently heard ones are forgotten."""

_TRACE = re.compile(r"[0-9A-Za-z-]{1,128}")
"""Clients choose their ``traceparent``: one that could be confused with another part of a name is left out."""
_NAME = re.compile(rf"(?P<worker>[^/]*)/.*#(?P<serial>\d+)(?:@{_TRACE.pattern})?(?:/(?P<reader>\d+))?", re.DOTALL)


@dataclass(frozen=True)
class HoldId:
    """One sequence of a worker. ``serial``: makes names unique, since a release of an older holder may still be on its
    way. ``traceparent``: of the request's trace (W3C), empty without one. A worker id has no slash."""

    worker_id: str
    request_id: str
    serial: int
    traceparent: str = ""

    @property
    def name(self) -> str:
        """``<worker id>/<request id>#<serial>``, and ``@<traceparent>``."""
        trace = f"@{self.traceparent}" if _TRACE.fullmatch(self.traceparent) else ""
        return f"{self.worker_id}/{self.request_id}#{self.serial}{trace}"


def reader_of(holder: str, number: int) -> str:
    """Name of a reader of ``holder``: it holds chunks fetched for it while they are copied. Each reader of a holder has
    a larger number than the one before, and starts after that was released."""
    return f"{holder}/{number}"


def request_of(name: str) -> tuple[str, str]:
    """(request id, traceparent) of a holder's name; both empty for other names."""
    request_id, mark, rest = name.partition("/")[2].rpartition("#")
    return (request_id, rest.partition("@")[2]) if mark else ("", "")


def worker_of(name: str) -> str:
    """Id of the worker whose holder has this name."""
    return name.partition("/")[0]


@dataclass
class _OfWorker:
    """Released are serials below ``floor``, those in ``serials``, and of each holder the readers below a number."""

    floor: int = 0
    serials: set[int] = field(default_factory=set)
    readers: dict[int, int] = field(default_factory=dict)

    def compact(self) -> None:
        while self.floor in self.serials:
            self.serials.remove(self.floor)
            self.floor += 1
        self.serials = {serial for serial in self.serials if serial > self.floor}
        self.readers = {serial: number for serial, number in self.readers.items() if serial >= self.floor}


class Released:
    """Names that were released. A call for one of them comes too late: no release would follow it.

    Serials of a worker grow, and each is released at some point, so serials below a floor need no entry. A worker has
    one entry for each released name that is younger than its oldest holder. Names of another form than :class:`HoldId`
    and :func:`reader_of` make are not remembered, and may be used again. Not thread-safe.
    """

    def __init__(self) -> None:
        self._workers: OrderedDict[str, _OfWorker] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        parts = _parse(name)
        if parts is None:
            return False
        worker_id, serial, reader = parts
        known = self._workers.get(worker_id)
        if known is None:
            return False
        if serial < known.floor or serial in known.serials:
            return True
        return reader is not None and reader < known.readers.get(serial, 0)

    def __len__(self) -> int:
        """Entries that are kept."""
        return sum(1 + len(known.serials) + len(known.readers) for known in self._workers.values())

    def add(self, name: str) -> None:
        """``name`` is released, and all older readers of the same holder with it."""
        parts = _parse(name)
        if parts is None:
            return
        worker_id, serial, reader = parts
        known = self._of(worker_id)
        if serial < known.floor or serial in known.serials:
            return
        if reader is not None:
            known.readers[serial] = max(reader + 1, known.readers.get(serial, 0))
            return
        known.serials.add(serial)
        known.readers.pop(serial, None)
        if serial == known.floor:
            known.compact()

    def check(self, name: str) -> None:
        """Raise :class:`ReleasedError` for a name that was released."""
        if name in self:
            raise ReleasedError(f"{name} was released: a call for it comes too late and changes nothing")

    def floor(self, worker_id: str) -> int:
        """All serials of the worker below this one are released."""
        known = self._workers.get(worker_id)
        return 0 if known is None else known.floor

    def raise_floor(self, worker_id: str, floor: int) -> None:
        """The worker reports that all its serials below ``floor`` are released."""
        known = self._of(worker_id)
        if floor > known.floor:
            known.floor = floor
            known.compact()

    def forget(self, worker_id: str) -> None:
        """The worker is gone; unknown ones are fine."""
        self._workers.pop(worker_id, None)

    def _of(self, worker_id: str) -> _OfWorker:
        known = self._workers.setdefault(worker_id, _OfWorker())
        self._workers.move_to_end(worker_id)
        if len(self._workers) > MOST_WORKERS:
            self._workers.popitem(last=False)
        return known


def _parse(name: str) -> tuple[str, int, int | None] | None:
    """(worker id, serial, number of the reader); ``None`` for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    reader = match["reader"]
    return match["worker"], int(match["serial"]), None if reader is None else int(reader)
