"""A worker asks its tier in the name of holders it knows: otherwise a sweep would release their holds."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forecache.workers.errors import ReleasedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.client import memory as remote
from forecache.workers.memory.client import peers
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.format.hold_id import HoldId
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.tier.actor import MemoryTier

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
HOLDER = HoldId("w", "request", 0).name


class Tier:
    """A memory tier's store behind calls like an actor's, which run when their result is fetched."""

    def __init__(self, store: ArenaStore) -> None:
        self.store = store

    def __getattr__(self, method: str) -> Any:
        class Call:
            @staticmethod
            def remote(*args: Any) -> Callable[[], object]:
                return lambda: getattr(self, f"do_{method}")(*args)

        return Call

    def do_arena_path(self) -> str:
        return str(self.store.arena.path)

    def do_hold_prefix(self, holder: str, keys: list[bytes]) -> object:
        return self.store.hold_prefix(holder, keys)

    def do_hold_local_prefix(self, holder: str, keys: list[bytes]) -> object:
        return self.store.hold_prefix(holder, keys), False

    def do_hold(self, holder: str, keys: list[bytes]) -> object:
        return self.store.hold(holder, keys)

    def do_reserve_slots(self, holder: str, keys: list[bytes], *news: object) -> object:
        return self.store.reserve_slots(holder, keys)

    def do_commit(self, holder: str, refs: Any, *news: object) -> None:
        self.store.commit(holder, refs)

    def do_reserve_quota(self, holder: str, chunks: int) -> None:
        self.store.reserve_quota(holder, chunks)

    def do_start_over(self, holder: str) -> None:
        self.store.start_over(holder)

    def do_release(self, holder: str, was_spread: bool = False, *news: object) -> None:
        self.store.release(holder)

    def do_holders_of(self, worker_id: str, floor: int, life: int) -> list[str]:
        self.store.forget_released(worker_id, floor)
        return [holder for holder in self.store.holders() if holder.startswith(f"{worker_id}/")]

    def do_spread_begin(self, holder: str, chunks: int) -> None:
        self.store.reserve_quota(holder, chunks)

    def do_spread_fetch(self, holder: str, reader: str, keys: list[bytes]) -> object:
        return self.store.hold(reader, keys)


@pytest.fixture
def store(tmp_path: Path) -> ArenaStore:
    return ArenaStore(
        Arena.create(
            tmp_path, "t", layout=LAYOUT, index_nbytes=8, index_fingerprint="i",
            capacity_bytes=(2 << 20) + 12 * LAYOUT.nbytes, record_bytes=1 << 12,
        )
    )  # fmt: skip


@pytest.fixture
def memory(store: ArenaStore, monkeypatch: pytest.MonkeyPatch) -> RemoteMemory:
    monkeypatch.setattr(remote, "get_answer", lambda call, whom, deadline_s: call())
    monkeypatch.setattr(remote, "SWEEP_PERIOD_S", 1e6)
    tier: Any = Tier(store)
    return RemoteMemory(lambda: tier, 1.0, peers=RemotePeers("test", 1.0))


KEYS = [bytes([number]) * 16 for number in range(2)]
ASKS: dict[str, Callable[[RemoteMemory, str], object]] = {
    "hold_prefix": lambda memory, holder: memory.hold_prefix(holder, KEYS),
    "hold_local_prefix": lambda memory, holder: memory.hold_local_prefix(holder, KEYS),
    "hold": lambda memory, holder: memory.hold(holder, KEYS),
    "reserve_slots": lambda memory, holder: memory.reserve_slots(holder, KEYS),
    "reserve_quota": lambda memory, holder: memory.reserve_quota(holder, 1),
    "begin": lambda memory, holder: memory.spread.begin(holder, 1) if memory.spread else None,
    "fetch": lambda memory, holder: memory.spread.fetch(HOLDER, holder, KEYS) if memory.spread else None,
}
NOT_ASKING = {
    "commit",
    "release",
    "start_over",
    "move_out",
    "reserve_remote_quota",
    "read_layer",
    "note_places",
    "forget",
}
"""What needs a hold already, or makes none."""


def test_all_calls_that_may_make_a_hold_are_tried() -> None:
    named = {
        name
        for kind in (RemoteMemory, remote.RemoteSpread)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and {"holder", "reader"} & inspect.signature(method).parameters.keys()
    }
    assert named == ASKS.keys() | NOT_ASKING


@pytest.mark.parametrize("method", ASKS)
def test_who_asks_for_something_is_not_swept_until_it_is_released(
    memory: RemoteMemory, store: ArenaStore, method: str
) -> None:
    past = store.reserve_slots("w2/past", KEYS)
    for place in past:
        store.arena.chunks[place.ref.slot] = 1
        store.arena.index[place.ref.slot] = 1
        store.arena.seal(place.ref, place.key, store.arena.digests(place.ref.slot))
    store.commit("w2/past", [(place.key, place.ref) for place in past])
    store.release("w2/past")

    ASKS[method](memory, HOLDER)
    assert memory.holders() == [HOLDER]
    for _ in range(3):
        memory.sweep()
    assert store.holders() == [HOLDER]
    memory.release(HOLDER)
    assert store.holders() == memory.holders() == []
    with pytest.raises(ReleasedError):
        ASKS[method](memory, HOLDER)
    assert store.holders() == memory.holders() == []


def test_a_release_that_did_not_get_to_the_tier_is_made_up_for(memory: RemoteMemory, store: ArenaStore) -> None:
    memory.reserve_quota(HOLDER, 2)
    memory.reserve_quota(HoldId("w", "other", 1).name, 1)
    store.reserve_quota(HoldId("w2", "another", 0).name, 1)
    memory._living.pop(HOLDER)  # what a release does here, before its call gets lost
    memory.sweep()
    assert len(store.holders()) == 3  # its release may be on its way
    memory.sweep()
    assert store.holders() == [HoldId("w", "other", 1).name, HoldId("w2", "another", 0).name]


def test_who_begins_again_holds_nothing_and_goes_on(memory: RemoteMemory, store: ArenaStore) -> None:
    memory.reserve_quota(HOLDER, 2)
    memory.start_over(HOLDER)
    assert store.holders() == [] and memory.holders() == [HOLDER]
    memory.reserve_quota(HOLDER, 3)
    assert store.stats().quota_slots == 3


def test_each_call_of_a_tier_names_a_method_of_its_actor() -> None:
    """Calls cross a process boundary by name, which mypy does not check."""
    source = inspect.getsource(remote) + inspect.getsource(peers)
    named = set(re.findall(r'\._(?:call|ask)\(\s*(?:tier_id, )?"(\w+)"', source))
    named |= set(re.findall(r"\btier\.(\w+)\.remote\(", source)) | set(re.findall(r"\b_tier\.(\w+)\.remote\(", source))
    assert {"reserve_slots", "spread_fetch", "read_hosted_layer", "stats", "spread_hold_again"} <= named
    actor = MemoryTier.__ray_metadata__.modified_class
    assert {name for name in named if not inspect.isfunction(getattr(actor, name, None))} == set()
