"""Memory tiers through Ray: for the workers of a tier's node, whose bytes go through the mapped arena, and for other
tiers, whose bytes go through Ray's object store."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import uniform
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from forecache.workers.errors import ArenaError, ArenaMissingError, ChunkLostError, OverloadedError
from forecache.workers.memory.arena import Arena
from forecache.workers.memory.chunk_batch import ChunkBatch
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.protocol import Reservation, SlotRef, TierStats

RETRY_S = 0.2


class RemoteMemory:
    """`ColdMemory` over a `MemoryTier` actor of the same node.

    Name holders as :class:`.holders.Holder` does: by their worker the tier reclaims them when the worker has died.
    A tier that has died is waited for, ``restart_deadline_s`` at most, and what was held in its former life is held
    again. Raises :class:`ChunkLostError` if the tier does not answer in ``deadline_s`` (it may do what was asked even
    so), and :class:`ArenaError` when it does not come back, or with another arena than the one mapped here.
    """

    def __init__(
        self,
        find_tier: "Callable[[], ActorHandle[Any]]",
        deadline_s: float,
        *,
        fetch_deadline_s: float = 30.0,
        start_deadline_s: float = 120.0,
        restart_deadline_s: float = 30.0,
    ) -> None:
        """Waits ``start_deadline_s`` for a tier that is just being made: reserving a large arena takes a while.

        ``fetch_deadline_s``: how long the tier may take to bring a prefix from other nodes. Raises
        :class:`ArenaError` when the tier could not make its arena.
        """
        self._find_tier = find_tier
        self._tier = find_tier()
        self._deadline_s = deadline_s
        self._fetch_deadline_s = fetch_deadline_s
        self._restart_deadline_s = restart_deadline_s
        # in the order of the chunks; who lets go of something may do so in another thread than who gets it
        self._held: dict[str, dict[ChunkKey, None]] = {}
        self._promised: dict[str, int] = {}
        self._lock = threading.Lock()
        self._arena = self._attach(time.monotonic() + start_deadline_s)
        self._life = self._arena.life

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        return self._arena

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored on any node; return its places here."""
        deadline_s = self._deadline_s + self._fetch_deadline_s
        refs = cast(list[SlotRef], self._call("hold_prefix", holder, keys, deadline_s=deadline_s))
        self._note(holder, keys[: len(refs)])
        return refs

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        refs = cast(list[SlotRef | None], self._call("hold", holder, keys))
        self._note(holder, [key for key, ref in zip(keys, refs, strict=True) if ref is not None])
        return refs

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Places to write ``keys`` into, as :meth:`ArenaStore.reserve` gives them."""
        places = cast(list[Reservation], self._call("reserve", holder, keys))
        self._note(holder, [place.key for place in places if place.stored])
        return places

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """These reserved slots are written and sealed: from now on others find them."""
        self._call("commit", holder, refs)
        self._note(holder, [key for key, _ in refs])

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it everywhere."""
        self._call("drop", key, ref)

    def promise(self, holder: str, chunks: int) -> None:
        """``holder`` may need so many slots in all, as :meth:`ArenaStore.promise` says."""
        self._call("promise", holder, chunks)
        with self._lock:
            self._promised[holder] = chunks

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds; unknown holders are fine."""
        with self._lock:
            self._held.pop(holder, None)
            self._promised.pop(holder, None)
        self._call("release", holder)

    def record_session(self, session_id: str, keys: Sequence[ChunkKey]) -> None:
        """A request of the session has ended with the chunks ``keys``."""
        self._call("record_session", session_id, list(keys))

    def stats(self) -> TierStats:
        """Asked once: raises :class:`ChunkLostError` while the tier is away."""
        return cast(TierStats, _get(self._tier.stats.remote(), "the memory tier, asked for stats,", self._deadline_s))

    def close(self) -> None:
        """Let go of the arena's file; the mapping ends with the last tensor over it."""
        self._arena.close()

    def _attach(self, end_s: float) -> Arena:
        while True:
            try:
                path = _get(self._tier.arena_path.remote(), "the memory tier", max(0.0, end_s - time.monotonic()))
                return Arena.attach(cast(str, path))
            except (ChunkLostError, ArenaMissingError):
                # it is being restarted, or about to find that its file is not as it was
                if time.monotonic() > end_s:
                    raise
            time.sleep(RETRY_S)
            self._tier = self._find_tier()

    def _note(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            self._held.setdefault(holder, {}).update(dict.fromkeys(keys))

    def _call(self, method: str, *args: object, deadline_s: float | None = None) -> object:
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        whom = f"the memory tier, asked to {method},"
        end_s = time.monotonic() + self._restart_deadline_s
        while True:
            try:
                self._hold_again()
                return _get(getattr(self._tier, method).remote(*args), whom, deadline_s)
            except TierAwayError as error:
                if time.monotonic() > end_s:
                    raise ArenaError(f"the memory tier of this node does not come back: {error}") from error
            time.sleep(RETRY_S * uniform(0.5, 1))
            self._tier = self._find_tier()

    def _hold_again(self) -> None:
        """After the tier was restarted it does not know who holds what."""
        if not self._arena.is_intact():
            raise ArenaError(f"the arena {self._arena.path} is not the one that is mapped here any more")
        life = self._arena.life
        if life == self._life:
            return
        with self._lock:
            held = {holder: list(keys) for holder, keys in self._held.items()}
            promised = dict(self._promised)
        whom = "the memory tier, restarted,"
        for holder in {**held, **promised}:
            _get(self._tier.hold.remote(holder, held.get(holder, [])), whom, self._deadline_s)
            if holder in promised:
                with suppress(OverloadedError):  # new work came first; what runs goes on
                    _get(self._tier.promise.remote(holder, promised[holder]), whom, self._deadline_s)
            with self._lock:
                released = holder not in self._held and holder not in self._promised
            if released:
                self._tier.release.remote(holder)
        self._life = life


class TierAwayError(ChunkLostError):
    """The tier's process is not there: not yet, or no more."""


def _get(ref: "ray.ObjectRef[Any]", whom: str, deadline_s: float) -> object:
    """What a tier answers. Raises its own errors, and :class:`ChunkLostError` when it does not answer in time."""
    try:
        return ray.get(ref, timeout=deadline_s)
    except RayTaskError as error:
        raise error.cause from error  # the tier's own, typed error
    except GetTimeoutError as error:
        raise ChunkLostError(f"{whom} did not answer within {deadline_s:g} s") from error
    except RayActorError as error:
        if error.actor_init_failed:
            # Ray gives the tier's own error as text only; its last line is the type and the sentence.
            raise ArenaError(f"no memory tier: {str(error).splitlines()[-1].partition(': ')[2]}") from error
        raise TierAwayError(f"{whom} can't be reached: {error}") from error
    except RayError as error:
        raise ChunkLostError(f"{whom} can't be reached: {error}") from error


FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class RemotePeers:
    """The other tiers of a cluster, named actors of ``namespace``: `exchange.Peers`.

    One that did not answer is left alone for a while, and longer each time.
    """

    def __init__(self, namespace: str, deadline_s: float) -> None:
        self._namespace = namespace
        self._deadline_s = deadline_s
        self._asleep: dict[str, tuple[float, float]] = {}  # tier id -> (until, how long)

    def read(self, tier_id: str, keys: Sequence[ChunkKey]) -> "PendingRead":
        """Copies of those of ``keys`` that the tier has; does not wait."""
        return PendingRead(self, tier_id, self._ask(tier_id, "read_chunks", list(keys)))

    def take_in(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        """Have the tier store ``batch`` and answer for it; returns the keys that it has now."""
        ref = self._ask(tier_id, "take_in", batch, copied_only)
        return cast(list[ChunkKey], self.wait(tier_id, ref, self._deadline_s))

    def set_copied(self, tier_id: str, keys: Sequence[ChunkKey]) -> None:
        """Tell the tier that another one answers for ``keys``; does not wait."""
        self._ask(tier_id, "set_copied", list(keys))

    def wait(self, tier_id: str, ref: "ray.ObjectRef[Any] | None", timeout_s: float) -> object:
        """What the tier answers, at the latest after the deadline of calls."""
        if ref is None:
            raise ChunkLostError(f"{tier_id} is not asked: it did not answer lately")
        try:
            answer = _get(ref, tier_id, min(timeout_s, self._deadline_s))
        except (ChunkLostError, ArenaError) as error:
            self._put_to_sleep(tier_id)
            raise ChunkLostError(str(error)) from error
        self._asleep.pop(tier_id, None)
        return answer

    def _ask(self, tier_id: str, method: str, *args: object) -> "ray.ObjectRef[Any] | None":
        until_s, _ = self._asleep.get(tier_id, (0.0, 0.0))
        if time.monotonic() < until_s:
            return None
        try:
            tier = ray.get_actor(tier_id, namespace=self._namespace)
        except ValueError:  # there is no such actor, or no longer
            self._put_to_sleep(tier_id)
            return None
        return cast("ray.ObjectRef[Any]", getattr(tier, method).remote(*args))

    def _put_to_sleep(self, tier_id: str) -> None:
        _, last_s = self._asleep.get(tier_id, (0.0, FIRST_BACKOFF_S / 2))
        duration_s = min(MAX_BACKOFF_S, 2 * last_s)
        self._asleep[tier_id] = time.monotonic() + duration_s * uniform(0.5, 1), duration_s


class PendingRead:
    """Chunks on their way from another tier."""

    def __init__(self, peers: RemotePeers, tier_id: str, ref: "ray.ObjectRef[Any] | None") -> None:
        self._peers = peers
        self._tier_id = tier_id
        self._ref = ref

    def result(self, timeout_s: float) -> ChunkBatch:
        """Raises :class:`ChunkLostError` when the tier does not answer in time, or is gone."""
        return cast(ChunkBatch, self._peers.wait(self._tier_id, self._ref, timeout_s))
