import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from processes import kill_for_good, process_of

from forecache.workers.errors import ArenaError, ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.tier.actor import MemoryTier, TierSettings
from forecache.workers.memory.tier.catalog import Catalog, StoredRun

TIER: Any = MemoryTier  # mypy does not see what Ray's decorator makes of the class

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("by_value", "one_node")]

LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
SLOTS = 8
KEYS = [bytes([i]) * 16 for i in range(1, 20)]


def settings(config: MemoryConfig, redis_url: str | None = None) -> TierSettings:
    return TierSettings(config, LAYOUT, index_nbytes=16, index_fingerprint="index", redis_url=redis_url)


class Worker:
    """The cold-memory calls of a decode worker, in a separate process. A chunk's bytes follow from its key."""

    def __init__(self, name: str, tier: Any) -> None:
        self.name = name
        self.memory = RemoteMemory(lambda: tier, deadline_s=20)

    def pid(self) -> int:
        return os.getpid()

    def write(self, sequence: str, keys: list[bytes], *, commit: bool = True) -> list[bool]:
        """Reserve and write ``keys``, and keep them held. Returns for each whether it was stored before."""
        holder = f"{self.name}/{sequence}"
        reservations = self.memory.reserve_slots(holder, keys)
        arena = self.memory.arena
        fresh = [(r.key, r.ref) for r in reservations if not r.stored]
        for key, ref in fresh:
            arena.chunks[ref.slot] = key[0]
            arena.index[ref.slot] = key[0]
            arena.seal(ref, key, arena.digests(ref.slot))
        if commit:
            self.memory.commit(holder, fresh)
        return [r.stored for r in reservations]

    def read(self, sequence: str, keys: list[bytes]) -> list[int]:
        """The first byte of each chunk of the stored prefix, which stays held; -1 if a checksum is wrong."""
        arena = self.memory.arena
        refs = self.memory.hold_prefix(f"{self.name}/{sequence}", keys)
        values = [int(arena.chunks[ref.slot][0]) for ref in refs]
        good = [arena.check(ref, key) for ref, key in zip(refs, keys, strict=False)]
        return [value if is_good else -1 for value, is_good in zip(values, good, strict=True)]

    def read_cut(self) -> int:
        """Read the last byte of the mapped file, which may have been truncated."""
        return int(self.memory.arena.chunks[-1, -1])

    def release(self, sequence: str) -> None:
        self.memory.release(f"{self.name}/{sequence}")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about in 30 s"
        time.sleep(0.05)


@pytest.fixture
def arena_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


StartTier = Callable[..., Any]


@pytest.fixture
def start_tier(arena_dir: Path, redis_server: Any) -> Iterator[StartTier]:
    """Starts tiers. When the test ends, each is shut down and must have removed its file."""
    started = []

    def start(tier_id: str = "tier", cold_bytes: int = (2 << 20) + SLOTS * LAYOUT.nbytes, **options: Any) -> Any:
        config = MemoryConfig(cold_bytes=cold_bytes, arena_dir=arena_dir, heartbeat_s=0.1)
        tier = TIER.options(**options).remote(settings(config, redis_url=redis_server.url), tier_id)
        ray.get(tier.arena_path.remote(), timeout=60)
        started.append(tier)
        return tier

    yield start
    for tier in started:
        try:
            ray.get(tier.shutdown.remote(), timeout=30)
        except ray.exceptions.RayActorError:
            continue  # the test has killed it
        ray.kill(tier)
    assert list(arena_dir.iterdir()) == []


@pytest.fixture
def catalog(redis_server: Any) -> Iterator[Catalog]:
    catalog = Catalog(redis_server.url)
    yield catalog
    catalog.close()


def start_worker(name: str, tier: Any) -> Any:
    return ray.remote(Worker).options(num_cpus=0).remote(name, tier)


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=60)


def test_workers_share_chunks_and_a_killed_one_gives_back(start_tier: StartTier, catalog: Catalog) -> None:
    tier = start_tier()
    a, b = start_worker("a", tier), start_worker("b", tier)
    assert get(a.write.remote("0", KEYS[:3])) == [False] * 3
    assert get(b.read.remote("0", KEYS[:5])) == [1, 2, 3]
    assert get(b.write.remote("0", KEYS[:4])) == [True, True, True, False]
    assert get(b.write.remote("1", KEYS[10:12], commit=False)) == [False, False]
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(4, {"tier": 4}))
    [record] = catalog.tiers()
    assert (record.node_id, record.slots) == (ray.get_runtime_context().get_node_id(), SLOTS)

    get(a.release.remote("0"))
    assert get(tier.stats.remote()).held_slots == 6
    os.kill(get(b.pid.remote()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        get(b.pid.remote())
    assert get(tier.release_worker.remote("b")) == 2
    stats = get(tier.stats.remote())
    assert (stats.held_slots, stats.used_slots, stats.stored_chunks) == (0, 4, 4)
    assert get(tier.integrity.remote()) == ""
    assert get(a.read.remote("1", KEYS[:5])) == [1, 2, 3, 4]

    # All room is had again; what was held by the dead one is evicted in favour of the living.
    assert get(a.write.remote("1", KEYS[4:8])) == [False] * 4
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    with pytest.raises(OverloadedError, match="0 can be evicted"):
        memory.reserve_slots("driver/0", KEYS[8:9])
    memory.close()


def test_wrong_chunk_is_forgotten_everywhere(start_tier: StartTier, catalog: Catalog) -> None:
    tier = start_tier()
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:3]))
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"tier": 3}))
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    refs = memory.hold_prefix("driver/0", KEYS[:3])
    memory.arena.chunks[refs[1].slot][5] ^= 1
    assert get(a.read.remote("1", KEYS[:3])) == [1, -1, 3]
    memory.drop(KEYS[1], refs[1])
    assert memory.hold("driver/0", KEYS[:3]) == [refs[0], None, refs[2]]
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(1, {"tier": 1}))
    assert memory.stats().dropped_chunks == 1
    assert get(tier.integrity.remote()) == ""
    memory.close()


def test_redis_that_comes_back_empty_is_filled_again(
    start_tier: StartTier, catalog: Catalog, redis_server: Any
) -> None:
    tier = start_tier()
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:2]))
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(2, {"tier": 2}))
    redis_server.kill()
    assert get(a.write.remote("0", KEYS[2:4])) == [False, False]
    assert get(a.read.remote("1", KEYS)) == [1, 2, 3, 4]
    redis_server.start()
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(4, {"tier": 4}))


def test_restarted_tier_adopts_its_arena(start_tier: StartTier, catalog: Catalog) -> None:
    tier = start_tier(max_restarts=1)
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:3]))
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"tier": 3}))
    [before] = catalog.tiers()
    pid = process_of(tier)
    ray.kill(tier, no_restart=False)

    def is_restarted() -> bool:
        try:
            return process_of(tier) != pid
        except ray.exceptions.RayActorError:
            return False

    wait_until(is_restarted)
    assert memory.stats().stored_chunks == 3
    refs = memory.hold_prefix("driver/0", KEYS)
    assert [memory.arena.check(ref, key) for ref, key in zip(refs, KEYS, strict=False)] == [True] * 3
    assert memory.stats().held_slots == 3
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"tier": 3}))
    assert catalog.tiers()[0].incarnation != before.incarnation
    assert get(a.write.remote("1", KEYS[3:5])) == [False, False]
    memory.close()


def test_what_is_held_is_held_by_the_restarted_tier_too(start_tier: StartTier) -> None:
    tier = start_tier(max_restarts=-1)
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:3]))
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    refs = memory.hold_prefix("driver/0", KEYS[:2])
    memory.hold("driver/1", KEYS[2:3])
    memory.release("driver/1")
    [place] = memory.reserve_slots("driver/0", KEYS[3:4])
    for _ in range(2):
        pid = process_of(tier)
        os.kill(pid, signal.SIGKILL)
        # asked while it is away: it is waited for
        assert memory.hold("driver/0", KEYS[:2]) == refs
        assert process_of(tier) != pid
        # and the other worker's third, once its sweep has noticed the restart
        assert memory.stats().held_slots in (2, 3)
    # a place that the former life gave away is no place any more, and the chunk is asked a new one for
    with pytest.raises(ChunkLostError, match="reserve again"):
        memory.commit("driver/0", [(KEYS[3], place.ref)])
    assert get(a.write.remote("0", KEYS[4:6])) == [False, False]
    assert memory.stats().held_slots == 5  # two of the other worker's three are the same
    assert get(tier.integrity.remote()) == ""
    memory.close()


def test_an_arena_that_is_cut_kills_who_reads_it_and_is_made_anew(start_tier: StartTier) -> None:
    tier = start_tier(max_restarts=-1)
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:3]))
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    pid = process_of(tier)
    os.truncate(memory.arena.path, 4096)
    with pytest.raises(ArenaError, match="was replaced or truncated"):
        memory.hold("driver/0", KEYS[:1])
    with pytest.raises(ray.exceptions.RayActorError):  # SIGBUS
        get(a.read_cut.remote())
    b = start_worker("b", tier)  # waits for the new one
    assert get(b.read.remote("0", KEYS[:3])) == []
    assert get(b.write.remote("0", KEYS[:3])) == [False] * 3
    assert process_of(tier) != pid
    memory.close()


def test_a_tier_that_is_gone_for_good_is_an_error_in_the_end(start_tier: StartTier) -> None:
    tier = start_tier("for-good")
    memory = RemoteMemory(lambda: tier, deadline_s=20, restart_deadline_s=0.5)
    kill_for_good(tier)
    with pytest.raises(ArenaError, match="does not come back"):
        memory.hold("driver/0", KEYS[:1])
    memory.close()
    start_tier("next")  # removes the file


def test_tier_that_does_not_answer_is_a_lost_chunk(start_tier: StartTier) -> None:
    tier = start_tier()
    a = start_worker("a", tier)
    get(a.write.remote("0", KEYS[:1]))
    get(a.release.remote("0"))
    pid = process_of(tier)
    memory = RemoteMemory(lambda: tier, deadline_s=20)
    impatient = RemoteMemory(lambda: tier, deadline_s=0.2)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ChunkLostError, match=r"asked to hold, did not answer within 0.2 s"):
            impatient.hold("driver/0", KEYS[:1])
    finally:
        os.kill(pid, signal.SIGCONT)
    # It is done late, and given back by the holder's name.
    wait_until(lambda: memory.stats().held_slots == 1)
    memory.release("driver/0")
    assert memory.stats().held_slots == 0
    for client in (memory, impatient):
        client.close()


def test_file_of_a_killed_tier_is_removed_by_the_next(start_tier: StartTier, arena_dir: Path) -> None:
    living = start_tier("living")
    killed = TIER.remote(settings(MemoryConfig(cold_bytes=4 << 20, arena_dir=arena_dir)), "killed")
    memory = RemoteMemory(lambda: killed, deadline_s=20)
    path = memory.arena.path
    kill_for_good(killed)
    with pytest.raises(ChunkLostError, match="asked for stats, can't be reached"):
        memory.stats()
    assert path.exists()
    start_tier("next")
    assert sorted(file.name for file in arena_dir.iterdir()) == ["forecache-living", "forecache-next"]
    assert get(living.stats.remote()).slots == SLOTS
    memory.close()


def test_tier_frees_its_file_when_its_handle_is_dropped(arena_dir: Path) -> None:
    tier = TIER.remote(settings(MemoryConfig(cold_bytes=4 << 20, arena_dir=arena_dir)), "dropped")
    arena = Arena.attach(get(tier.arena_path.remote()))
    arena.close()
    del tier
    wait_until(lambda: list(arena_dir.iterdir()) == [])


def test_too_large_an_arena_is_a_sentence(arena_dir: Path) -> None:
    tier = TIER.remote(settings(MemoryConfig(cold_bytes=1 << 50, arena_dir=arena_dir)), "large")
    with pytest.raises(
        ArenaError,
        match=r"^no memory tier: can't reserve .* \d+ bytes needed, \d+ bytes free .* another --arena-dir\.$",
    ):
        RemoteMemory(lambda: tier, deadline_s=20)
    assert list(arena_dir.iterdir()) == []
