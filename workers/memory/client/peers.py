"""Calls to memory tiers through Ray, and the tiers of other nodes. Chunks travel through Ray's object store."""

import math
import time
from collections.abc import Mapping, Sequence
from random import uniform
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from forecache.workers.errors import ArenaError, ChunkLostError, ReleasedError
from forecache.workers.memory.format.chunk_batch import ChunkBatch, LayerBatch, RecordBatch
from forecache.workers.memory.format.keys import ChunkKey


class TierAwayError(ChunkLostError):
    """The tier's process is not running: not yet, or no longer."""


def get_answer(ref: "ray.ObjectRef[Any]", whom: str, deadline_s: float) -> object:
    """The answer of a tier. Raises the tier's own errors, and :class:`ChunkLostError` when it does not answer in
    time."""
    try:
        return ray.get(ref, timeout=deadline_s)
    except RayTaskError as error:
        raise error.cause from error  # the tier's own, typed error
    except GetTimeoutError as error:
        raise ChunkLostError(f"{whom} did not answer within {deadline_s:g} s") from error
    except RayActorError as error:
        if error.actor_init_failed:
            # Ray passes the tier's error on as text only; its last line is the type and the message.
            raise ArenaError(f"no memory tier: {str(error).splitlines()[-1].partition(': ')[2]}") from error
        raise TierAwayError(f"{whom} can't be reached: {error}") from error
    except RayError as error:
        raise ChunkLostError(f"{whom} can't be reached: {error}") from error


FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class RemotePeers:
    """The other tiers of a cluster: named Ray actors of ``namespace``.

    Calls raise :class:`ChunkLostError` when the tier can't be reached. A tier that did not answer is not asked again
    for a while, twice as long each time.
    """

    def __init__(self, namespace: str, deadline_s: float) -> None:
        self._namespace = namespace
        self._deadline_s = deadline_s
        self._asleep: dict[str, tuple[float, float]] = {}  # tier id -> (until, how long)

    def read(self, tier_id: str, keys: Sequence[ChunkKey]) -> "PendingRead":
        """Copies of those of ``keys`` that the tier stores; does not wait."""
        return PendingRead(self, tier_id, self._ask(tier_id, "read_chunks", list(keys)))

    def store_batch(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        """Have the tier store ``batch`` and answer for it; returns the keys that it stores now."""
        return cast(list[ChunkKey], self._call(tier_id, "store_batch", batch, copied_only))

    def set_copied(self, tier_id: str, keys: Sequence[ChunkKey], since: int) -> None:
        """Tell the tier that another one answers for ``keys``, which were read there at its mark ``since``; does not
        wait."""
        self._ask(tier_id, "set_copied", list(keys), since)

    def reserve_hosted_quota(self, tier_id: str, holder: str, chunks: int) -> int:
        """Have the tier reserve a quota for a sequence of this node; returns for how many chunks it does."""
        return cast(int, self._call(tier_id, "reserve_hosted_quota", holder, chunks))

    def hold_hosted(self, tier_id: str, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        """Have the tier hold those of ``keys`` that it stores; returns their index records."""
        return cast(RecordBatch, self._call(tier_id, "hold_hosted", holder, list(keys)))

    def store_hosted(self, tier_id: str, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        """Have the tier store and hold ``batch``; returns the keys that it holds now."""
        return cast(list[ChunkKey], self._call(tier_id, "store_hosted", holder, batch))

    def release_hosted(self, tier_id: str, holders: Sequence[str]) -> None:
        """Have the tier release all that these hold there."""
        self._call(tier_id, "release_hosted", list(holders))

    def hosted_holders(self, tier_id: str, floors: Mapping[str, int]) -> list[str]:
        """Holders of these workers that hold something at the tier. All serials of a worker below its floor are
        released."""
        return cast(list[str], self._call(tier_id, "hosted_holders", dict(floors)))

    def read_layer(
        self, tier_id: str, holder: str, keys: Sequence[ChunkKey], layer: int
    ) -> "ray.ObjectRef[Any] | None":
        """One layer of chunks that the tier holds for ``holder``; does not wait."""
        return self._ask(tier_id, "read_hosted_layer", holder, list(keys), layer)

    def wait(self, tier_id: str, ref: "ray.ObjectRef[Any] | None", timeout_s: float) -> object:
        """The tier's answer, after the deadline of calls at the latest."""
        if ref is None:
            raise ChunkLostError(f"{tier_id} is not called for a while: its last call was not answered")
        try:
            answer = get_answer(ref, tier_id, min(timeout_s, self._deadline_s))
        except ReleasedError:
            self._asleep.pop(tier_id, None)
            raise
        except (ChunkLostError, ArenaError) as error:
            self._put_to_sleep(tier_id)
            raise ChunkLostError(str(error)) from error
        self._asleep.pop(tier_id, None)
        return answer

    def _call(self, tier_id: str, method: str, *args: object) -> object:
        return self.wait(tier_id, self._ask(tier_id, method, *args), self._deadline_s)

    def _ask(self, tier_id: str, method: str, *args: object) -> "ray.ObjectRef[Any] | None":
        until_s, _ = self._asleep.get(tier_id, (0.0, 0.0))
        if time.monotonic() < until_s:
            return None
        try:
            tier = ray.get_actor(tier_id, namespace=self._namespace)
        except ValueError:  # there is no such actor, or no longer
            self._put_to_sleep(tier_id)
            return None
        # Process boundary: `MemoryTier.<method>`, in `tier/actor.py`, on another node.
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


class PendingRows:
    """One layer of chunks on its way from several tiers."""

    def __init__(
        self,
        peers: RemotePeers,
        keys: Sequence[ChunkKey],
        asked: "Sequence[tuple[str, ray.ObjectRef[Any] | None]]",
    ) -> None:
        self._peers = peers
        self._keys = keys
        self._asked = asked

    def result(self) -> npt.NDArray[np.uint8]:
        """uint8 ``[chunks, ChunkLayout.layer_nbytes]``, in the order asked for. Raises :class:`ChunkLostError` when a
        chunk is missing or damaged."""
        found: dict[ChunkKey, npt.NDArray[np.uint8]] = {}
        for tier_id, ref in self._asked:
            batch = cast(LayerBatch, self._peers.wait(tier_id, ref, math.inf))
            if not batch.is_sound:
                raise ChunkLostError(f"a layer of {len(batch.keys)} chunks came damaged from {tier_id}")
            found |= dict(zip(batch.keys, batch.rows, strict=True))
        if len(found) < len(self._keys):
            raise ChunkLostError(
                f"{len(self._keys) - len(found)} of {len(self._keys)} chunks are gone from their nodes"
            )
        return np.stack([found[key] for key in self._keys])
