"""Sequences over several nodes, as a worker sees them: through its own node's tier; layers straight from the others."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from forecache.workers.errors import OverloadedError
from forecache.workers.memory.client.remote_peers import PendingRows, RemotePeers
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import Share


class Begin(Protocol):
    def __call__(self, holder: str, *, again: bool = False) -> None: ...


class RemoteSpread:
    """`OtherNodes` over the `SpreadSequences` of this node's tier, which ``call`` asks; ``peers`` are the others."""

    def __init__(
        self,
        call: Callable[..., object],
        begin: Begin,
        moved: Callable[[str, Sequence[ChunkKey]], None],
        peers: RemotePeers,
    ) -> None:
        """``begin`` is told of holders before they ask for something, and raises :class:`ReleasedError` for those that
        were released; ``moved``, which chunks of a holder this node's arena is to keep no longer."""
        self._call = call
        self._begin = begin
        self._moved = moved
        self._peers = peers
        self._held: dict[str, tuple[int, dict[ChunkKey, str]]] = {}  # holder -> chunks, where those not here are
        self._lock = threading.Lock()

    def spread(self, holder: str, chunks: int) -> None:
        """As :meth:`.protocol.OtherNodes.spread`."""
        self._begin(holder, again=True)
        with self._lock:
            self._held[holder] = chunks, {}
        try:
            self._call("spread_call", "begin", holder, chunks)
        except OverloadedError:
            self.forget(holder)
            raise

    def promise_rest(self, holder: str) -> Share:
        """As :meth:`.protocol.OtherNodes.promise_rest`."""
        return cast(Share, self._call("far_call", "promise_rest", holder, waits=True))

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """As :meth:`.protocol.OtherNodes.move_out`."""
        refs = cast(list[SlotRef | None], self._call("far_call", "move_out", holder, list(keys), waits=True))
        self._moved(holder, keys)
        self.note(holder, [key for key, ref in zip(keys, refs, strict=True) if ref is not None])
        return refs

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """As :meth:`.protocol.OtherNodes.fetch`."""
        self._begin(reader)
        return cast(list[SlotRef | None], self._call("far_call", "fetch", holder, reader, list(keys), waits=True))

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> PendingRows:
        """As :meth:`.protocol.OtherNodes.read_layer`."""
        with self._lock:
            _, places = self._held[holder]
            by_tier: dict[str, list[ChunkKey]] = {}
            for key in keys:
                by_tier.setdefault(places[key], []).append(key)
        asked = [(tier_id, self._peers.read_layer(tier_id, holder, part, layer)) for tier_id, part in by_tier.items()]
        return PendingRows(self._peers, list(keys), asked)

    def note(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        """``keys`` are held for ``holder`` on other nodes now."""
        if keys:
            places = cast(list[str], self._call("spread_call", "places", holder, list(keys)))
            with self._lock:
                if holder in self._held:
                    self._held[holder][1].update(zip(keys, places, strict=True))

    def forget(self, holder: str) -> bool:
        """``holder`` is released. Returns whether it was spread."""
        with self._lock:
            return self._held.pop(holder, None) is not None

    def held(self) -> dict[str, tuple[int, dict[ChunkKey, str]]]:
        """Holder → chunks it may have, and the tiers that hold those that are not here."""
        with self._lock:
            return {holder: (chunks, dict(places)) for holder, (chunks, places) in self._held.items()}
