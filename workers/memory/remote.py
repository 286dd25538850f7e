"""Cold memory as the workers of its node use it: calls go through Ray, bytes through the mapped arena."""

from collections.abc import Sequence
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from forecache.workers.errors import ArenaError, ChunkLostError
from forecache.workers.memory.arena import Arena
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.protocol import Reservation, SlotRef, TierStats


class RemoteMemory:
    """`ColdMemory` over a `MemoryTier` actor of the same node.

    Name holders ``<worker id>/…``: by that the tier reclaims them when the worker has died. Raises
    :class:`ChunkLostError` if the tier does not answer in ``deadline_s``; it may do what was asked even so.
    """

    def __init__(self, tier: "ActorHandle[Any]", deadline_s: float, *, start_deadline_s: float = 120.0) -> None:
        """Waits ``start_deadline_s`` for a tier that is just being made: reserving a large arena takes a while.

        Raises :class:`ArenaError` when the tier could not make its arena.
        """
        self._tier = tier
        self._deadline_s = start_deadline_s
        self._arena = Arena.attach(cast(str, self._call("arena_path")))
        self._deadline_s = deadline_s

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        return self._arena

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored; return its places."""
        return cast(list[SlotRef], self._call("hold_prefix", holder, keys))

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        return cast(list[SlotRef | None], self._call("hold", holder, keys))

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Places to write ``keys`` into, as :meth:`ArenaStore.reserve` gives them."""
        return cast(list[Reservation], self._call("reserve", holder, keys))

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """These reserved slots are written and sealed: from now on others find them."""
        self._call("commit", holder, refs)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it everywhere."""
        self._call("drop", key, ref)

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds; unknown holders are fine."""
        self._call("release", holder)

    def stats(self) -> TierStats:
        return cast(TierStats, self._call("stats"))

    def close(self) -> None:
        """Let go of the arena's file; the mapping ends with the last tensor over it."""
        self._arena.close()

    def _call(self, method: str, *args: object) -> object:
        try:
            return ray.get(getattr(self._tier, method).remote(*args), timeout=self._deadline_s)
        except RayTaskError as error:
            raise error.cause from error  # the tier's own, typed error
        except GetTimeoutError as error:
            raise ChunkLostError(f"the memory tier did not answer {method} within {self._deadline_s} s") from error
        except RayActorError as error:
            if error.actor_init_failed:
                # Ray gives the tier's own error as text only; its last line is the type and the sentence.
                raise ArenaError(f"no memory tier: {str(error).splitlines()[-1].partition(': ')[2]}") from error
            raise ChunkLostError(f"the memory tier can't be reached for {method}: {error}") from error
        except RayError as error:
            raise ChunkLostError(f"the memory tier can't be reached for {method}: {error}") from error
