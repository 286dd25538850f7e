"""Memory tiers on several nodes, each with its own arena, that share one Redis."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_nodes import NODE

from forecache.cluster.cli.integrity import check_integrity
from forecache.cluster.errors import TierSilentError, UnknownSessionError
from forecache.cluster.http.sessions import SessionDirectory
from forecache.cluster.launch.cluster import NAMESPACE
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.tiers import Tiers
from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import remove_abandoned
from forecache.workers.memory.client import peers
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.tier.actor import TierSettings, start_tier
from forecache.workers.memory.tier.catalog import Catalog

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("by_value")]

LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
SLOTS = 16
KEYS = [bytes([i]) * 16 for i in range(1, 250)]


class Client:
    """The cold-memory calls of a decode worker, in a process on a tier's node. Bytes follow from keys."""

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, tier: Any) -> None:
        self.memory = RemoteMemory(lambda: tier, deadline_s=20)

    def end(self) -> None:
        self.memory.close()

    def pid(self) -> int:
        return os.getpid()

    def write(self, sequence: str, keys: list[bytes], *, keep: bool = False) -> None:
        holder, arena = f"{self.name}/{sequence}", self.memory.arena
        for start in range(0, len(keys), 4):
            fresh = [(r.key, r.ref) for r in self.memory.reserve_slots(holder, keys[start : start + 4]) if not r.stored]
            for key, ref in fresh:
                arena.chunks[ref.slot] = key[0]
                arena.index[ref.slot] = key[1]
                arena.seal(ref, key, arena.digests(ref.slot))
            self.memory.commit(holder, fresh)
            if not keep:
                self.memory.release(holder)

    def read(self, keys: list[bytes], *, keep: bool = False) -> list[int]:
        """The first bytes of the chunks of the longest stored prefix; -1 for wrong bytes."""
        holder, arena = f"{self.name}/read", self.memory.arena
        refs = self.memory.hold_prefix(holder, keys)
        found = []
        for key, ref in zip(keys, refs, strict=False):
            same = bool((arena.chunks[ref.slot] == key[0]).all()) and bool((arena.index[ref.slot] == key[1]).all())
            found.append(key[0] if same and arena.check(ref, key) else -1)
        if not keep:
            self.memory.release(holder)
        return found

    def record_session(self, session_id: str, keys: list[bytes]) -> None:
        self.memory.record_session(session_id, keys)

    def flip_a_bit(self, key: bytes) -> None:
        [ref] = self.memory.hold(f"{self.name}/flip", [key])
        assert ref is not None
        self.memory.arena.chunks[ref.slot][key[0] % LAYOUT.nbytes] ^= 1 << key[0] % 8
        self.memory.release(f"{self.name}/flip")


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=60)


def wait_until(condition: Callable[[], bool], within_s: float = 40) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not come about in {within_s} s"
        time.sleep(0.05)


def heads(keys: list[bytes]) -> list[int]:
    return [key[0] for key in keys]


class Clients:
    """A client process on each node, shared by tests; each test connects them to its tiers."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def on(self, node_id: str, worker_id: str, tier: Any) -> Any:
        client = self._clients.get(node_id)
        if client is None:
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            name = f"REPLICA {node_id}#{worker_id}"  # by its end a worker is known to live
            client = ray.remote(Client).options(num_cpus=0, scheduling_strategy=here, name=name).remote(worker_id)
            self._clients[node_id] = client
        return client, client.begin.remote(tier)

    def end(self) -> None:
        """Remove clients of nodes that were removed."""
        ended = {node_id: client.end.remote() for node_id, client in self._clients.items()}
        for node_id, done in ended.items():
            try:
                get(done)
            except ray.exceptions.RayActorError:
                del self._clients[node_id]


@pytest.fixture(scope="module")
def clients() -> Clients:
    return Clients()


class Nodes:
    """Tiers on the cluster's nodes, the head's first, each with a client."""

    def __init__(self, cluster: Any, directory: Path, redis_url: str, clients: Clients) -> None:
        self.cluster = cluster
        self.shared_clients = clients
        self.directory = directory
        self.redis_url = redis_url
        self.tiers: list[Any] = []
        self.clients: list[Any] = []
        self.ids: list[str] = []

    def settings(self, name: str, slots: int = SLOTS, **options: Any) -> TierSettings:
        arena_dir = self.directory / name
        arena_dir.mkdir(exist_ok=True)
        cold_bytes = (2 << 20) + slots * LAYOUT.nbytes
        options = {"heartbeat_s": 0.2, "call_deadline_s": 5} | options
        config = MemoryConfig(cold_bytes=cold_bytes, arena_dir=arena_dir, **options)
        return TierSettings(config, LAYOUT, 16, "index", NAMESPACE, self.redis_url)

    def start(self, slots: int = SLOTS, **options: Any) -> None:
        for number, node in enumerate(self.cluster.list_all_nodes()):
            tier_id = f"{self.directory.name}-tier-{number}"
            self.ids.append(tier_id)
            self.tiers.append(start_tier(self.settings(str(number), slots, **options), tier_id, node.node_id))
        begun = [
            self.shared_clients.on(node.node_id, f"w{number}", tier)
            for number, (node, tier) in enumerate(zip(self.cluster.list_all_nodes(), self.tiers, strict=True))
        ]
        self.clients = [client for client, _ in begun]
        get([has_tier for _, has_tier in begun])
        with Catalog(self.redis_url) as catalog:
            wait_until(lambda: len(catalog.tiers()) == len(self.tiers))

    def stats(self, number: int) -> Any:
        return get(self.tiers[number].stats.remote())

    def wait_until_found(self, keys: list[bytes], copies: int = 1) -> None:
        with Catalog(self.redis_url) as catalog:
            wait_until(lambda: all(len(tiers) >= copies for tiers in catalog.locate(keys)))

    @property
    def all(self) -> Tiers:
        return Tiers(NAMESPACE, self.directory.name, self.redis_url, deadline_s=20)

    def check(self) -> None:
        assert check_integrity(self.all, settle_s=30) == []

    def stop(self) -> None:
        self.shared_clients.end()
        for tier in self.tiers:
            try:
                get(tier.shutdown.remote())
            except ray.exceptions.RayError:
                continue  # its node is gone
            ray.kill(tier)
        # the file of a tier whose node was killed is left to the next one of its machine
        living = [path for path in self.directory.glob("*/forecache-*") if not own_file(path)]
        assert living == []


def own_file(path: Path) -> bool:
    """Whether the arena at ``path`` has no owner; then it is removed."""
    remove_abandoned(path.parent)
    return not path.exists()


@pytest.fixture
def nodes(cluster: Any, tmp_path: Path, redis_server: Any, clients: Clients) -> Iterator[Nodes]:
    nodes = Nodes(cluster, tmp_path, redis_server.url, clients)
    yield nodes
    nodes.stop()


def test_chunks_of_another_node_are_brought_here_once(nodes: Nodes) -> None:
    nodes.start()
    a, b, _ = nodes.clients
    get(a.write.remote("0", KEYS[:6]))
    nodes.wait_until_found(KEYS[:6])
    assert get(b.read.remote(KEYS[:8])) == heads(KEYS[:6])
    assert nodes.stats(1).fetched_chunks == 6
    assert get(b.read.remote(KEYS[:6])) == heads(KEYS[:6])
    assert nodes.stats(1).fetched_chunks == 6  # what was brought stays
    assert nodes.stats(0).fetched_chunks == 0
    wait_until(lambda: nodes.stats(0).copied_slots == 6)  # who uses them answers for them
    assert nodes.stats(1).copied_slots == 0
    nodes.check()


def test_what_is_here_and_there_makes_one_prefix(nodes: Nodes) -> None:
    nodes.start()
    a, b, c = nodes.clients
    for client, keys in ((a, KEYS[0:3]), (b, KEYS[3:5]), (c, KEYS[5:8]), (a, KEYS[9:10])):
        get(client.write.remote("0", keys))
    nodes.wait_until_found([*KEYS[:8], KEYS[9]])
    assert get(b.read.remote(KEYS[:12], keep=True)) == heads(KEYS[:8])
    assert nodes.stats(1).fetched_chunks == 6
    assert nodes.stats(1).held_slots == 8
    nodes.check()


def test_three_nodes_hold_three_times_what_one_holds(nodes: Nodes) -> None:
    nodes.start()
    writer, *others = nodes.clients
    keys = KEYS[: 3 * SLOTS - 9]
    for key in keys:
        get(writer.write.remote("0", [key]))
        wait_until(lambda: nodes.stats(0).slots - nodes.stats(0).used_slots + nodes.stats(0).copied_slots > 0)
    nodes.wait_until_found(keys)
    assert nodes.stats(0).moved_chunks >= 2 * SLOTS - 8
    for client in others:  # there is room for six more, so that what is fetched changes places with what is there
        for start in range(0, len(keys), 3):
            part = keys[start : start + 3]
            assert get(client.read.remote(part)) == heads(part)
    assert sum(nodes.stats(number).evicted_chunks for number in range(3)) > len(keys)
    nodes.check()


def test_what_no_node_has_room_for_goes_to_disk_and_comes_back(nodes: Nodes) -> None:
    disk = nodes.directory / "disk"
    disk.mkdir()
    nodes.start(disk_dir=disk, disk_bytes=(2 << 20) + 4 * SLOTS * LAYOUT.nbytes)
    a, b, _ = nodes.clients
    keys = KEYS[: 5 * SLOTS]
    for key in keys:
        get(a.write.remote("0", [key]))
        wait_until(lambda: nodes.stats(0).slots - nodes.stats(0).used_slots + nodes.stats(0).copied_slots > 0)
    nodes.wait_until_found(keys)
    assert nodes.stats(0).spilled_chunks >= 2 * SLOTS
    for client in (a, b):
        for start in range(0, len(keys), 8):
            part = keys[start : start + 8]
            assert get(client.read.remote(part)) == heads(part)
    assert nodes.stats(0).disk_recalled_chunks > 0
    # a tier that is restarted has its disk again
    pid = get(nodes.tiers[0].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    for start in range(0, len(keys), 8):
        part = keys[start : start + 8]
        assert get(a.read.remote(part)) == heads(part)
    nodes.check()


def test_replicas_outlive_a_node(nodes: Nodes, cluster: Any) -> None:
    nodes.start(replicas=2)
    _, b, c = nodes.clients
    get(c.write.remote("0", KEYS[:6]))
    nodes.wait_until_found(KEYS[:6], copies=2)
    assert nodes.stats(2).replicated_chunks == 6
    assert nodes.stats(0).stored_chunks + nodes.stats(1).stored_chunks == 6
    cluster.remove_node(cluster.list_all_nodes()[2])
    try:
        assert get(b.read.remote(KEYS[:6])) == heads(KEYS[:6])
        # two nodes are left: both have all again
        nodes.wait_until_found(KEYS[:6], copies=2)
        wait_until(lambda: nodes.stats(0).stored_chunks == nodes.stats(1).stored_chunks == 6)
        nodes.check()
    finally:
        cluster.add_node(**NODE)


def test_chunks_without_a_replica_end_the_prefix_when_their_node_is_gone(nodes: Nodes, cluster: Any) -> None:
    nodes.start()
    _, b, c = nodes.clients
    get(b.write.remote("0", KEYS[:2]))
    get(c.write.remote("0", KEYS[2:4]))
    nodes.wait_until_found(KEYS[:4])
    cluster.remove_node(cluster.list_all_nodes()[2])
    try:
        assert get(b.read.remote(KEYS[:4])) == heads(KEYS[:2])
    finally:
        cluster.add_node(**NODE)


def test_a_damaged_chunk_is_not_sent_and_a_replica_takes_its_place(nodes: Nodes) -> None:
    nodes.start(replicas=2)
    a, b, c = nodes.clients
    get(a.write.remote("0", KEYS[:6]))
    nodes.wait_until_found(KEYS[:6], copies=2)
    get(a.flip_a_bit.remote(KEYS[2]))
    for client in (b, c):
        assert get(client.read.remote(KEYS[:6])) == heads(KEYS[:6])
    assert nodes.stats(1).fetched_chunks + nodes.stats(2).fetched_chunks == 6
    nodes.check()


def test_pins_outlive_redis_and_tiers(nodes: Nodes, redis_server: Any) -> None:
    nodes.start()
    a, b, _ = nodes.clients
    get(a.write.remote("0", KEYS[:4]))
    get(a.record_session.remote("s", KEYS[:4]))
    nodes.wait_until_found(KEYS[:4])
    directory = SessionDirectory(nodes.all, chunk_tokens=16)
    told = directory.pin("s", ttl_s=600)
    assert told["stored_chunks"] == told["tiers"][nodes.ids[0]] == 4 and told["pinned_until"] > time.time()
    assert nodes.stats(0).pinned_slots == 4
    # what is pinned stays, whatever comes
    get(a.write.remote("1", KEYS[10 : 10 + 2 * SLOTS]))
    assert get(a.read.remote(KEYS[:4])) == heads(KEYS[:4])

    redis_server.kill()
    redis_server.start()
    with Catalog(nodes.redis_url) as catalog:
        wait_until(lambda: (known := catalog.session("s")) is not None and known.is_pinned)
    pid = get(nodes.tiers[0].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    assert get(a.read.remote(KEYS[:4])) == heads(KEYS[:4])  # waits for the restarted one
    wait_until(lambda: nodes.stats(0).pinned_slots == 4)
    # used elsewhere, it is pinned there, and may go here
    assert get(b.read.remote(KEYS[:4])) == heads(KEYS[:4])
    wait_until(lambda: nodes.stats(0).pinned_slots == 0)
    assert nodes.stats(1).pinned_slots == 4
    nodes.check()

    assert directory.delete("s")["deleted"]
    assert nodes.stats(1).pinned_slots == 0
    with pytest.raises(UnknownSessionError):
        directory.describe("s")


def test_a_pin_that_promises_leave_no_room_for_is_refused(nodes: Nodes) -> None:
    nodes.start()
    a, tier = nodes.clients[0], nodes.tiers[0]
    get(a.write.remote("0", KEYS[:4]))
    get(a.record_session.remote("s", KEYS[:4]))
    nodes.wait_until_found(KEYS[:4])
    get(tier.reserve_quota.remote("w0/answer", nodes.stats(0).slots - 2))
    directory = SessionDirectory(nodes.all, chunk_tokens=16)
    with pytest.raises(OverloadedError, match="2 of the session's chunks can't be pinned now"):
        directory.pin("s", ttl_s=600)
    assert directory.describe("s")["pinned_until"] is None
    assert nodes.stats(0).pinned_slots == 0
    get(tier.release.remote("w0/answer"))
    assert directory.pin("s", ttl_s=600)["pinned_until"] > time.time()
    assert nodes.stats(0).pinned_slots == 4
    nodes.check()


def doctor(cluster: Any) -> tuple[int, str]:
    """The exit status and output of `forecache doctor --cluster`."""
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "doctor", "--cluster", "--address", cluster.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, " ".join(ended.stdout.split())


def test_what_does_not_agree_is_told(nodes: Nodes, cluster: Any) -> None:
    nodes.start()
    get(nodes.clients[0].write.remote("0", KEYS[:3]))
    nodes.wait_until_found(KEYS[:3])
    nodes.check()
    status, said = doctor(cluster)
    assert status == 0 and "catalog, memory tiers and workers agree" in said and nodes.ids[2] in said
    with Catalog(nodes.redis_url) as catalog:
        [record, *_] = catalog.tiers()
        catalog.publish(record.tier_id, record.incarnation, KEYS[100:101])
        catalog.withdraw(record.tier_id, KEYS[:1])
    memory = RemoteMemory(lambda: nodes.tiers[0], deadline_s=20)
    memory.hold("gone/0", KEYS[1:2])
    wrong = check_integrity(nodes.all, settle_s=1)
    assert f"{record.tier_id}: the catalog lists chunk {KEYS[100].hex()}, which is not stored" in wrong
    assert f"{record.tier_id}: chunk {KEYS[0].hex()} is stored, but not in the catalog" in wrong
    assert f"{nodes.ids[0]}: worker gone is gone, but still holds slots" in wrong
    assert len(wrong) == 3
    status, said = doctor(cluster)
    assert status == 1 and "worker gone is gone, but still holds slots" in said
    memory.release("gone/0")
    memory.close()


def test_without_redis_each_node_goes_on_alone(nodes: Nodes, redis_server: Any) -> None:
    nodes.start()
    a, b, _ = nodes.clients
    get(a.write.remote("0", KEYS[:4]))
    redis_server.kill()
    get(a.write.remote("0", KEYS[4:6]))
    assert get(a.read.remote(KEYS[:6])) == heads(KEYS[:6])
    assert get(b.read.remote(KEYS[:6])) == []
    redis_server.start()
    nodes.wait_until_found(KEYS[:6])
    assert get(b.read.remote(KEYS[:6])) == heads(KEYS[:6])


def note_waits(tier: Any) -> None:
    """Record which tiers a tier waits for, and for how long at most.

    The pause after a tier that did not answer is long, so that a busy machine does not change the result.
    """
    tier.waits = waits = []
    ask = peers.get_answer

    def get_answer(ref: Any, whom: str, deadline_s: float) -> object:
        waits.append((whom, deadline_s))
        return ask(ref, whom, deadline_s)

    peers.get_answer = get_answer
    peers.FIRST_BACKOFF_S = 60.0


def test_a_tier_that_does_not_answer_costs_its_chunks_and_no_more_than_a_deadline(nodes: Nodes) -> None:
    nodes.start(heartbeat_s=30, call_deadline_s=2)  # so the stopped tier counts as living
    a, b, c = nodes.clients
    get(a.write.remote("0", KEYS[2:4]))
    get(c.write.remote("0", KEYS[:2]))
    nodes.wait_until_found(KEYS[:4])
    get(nodes.tiers[1].__ray_call__.remote(note_waits))
    pid = get(nodes.tiers[0].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert get(b.read.remote(KEYS[:4])) == heads(KEYS[:2])
        waits = get(nodes.tiers[1].__ray_call__.remote(lambda self: self.waits))
        assert [wait for wait in waits if wait[0] == nodes.ids[0]] == [(nodes.ids[0], 2)], "one deadline, once"
        assert {whom for whom, _ in waits} == {nodes.ids[0], nodes.ids[2]}
        assert nodes.stats(1).fetched_chunks == 2
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(tier: Any) -> Iterator[None]:
    """Stop the tier's process with SIGSTOP."""
    pid = get(tier.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_calls_that_wait_for_a_slow_tier_keep_no_others_from_being_done(nodes: Nodes) -> None:
    # so the stopped tier counts as living, and is waited for until it goes on
    nodes.start(heartbeat_s=60, call_deadline_s=120, fetch_deadline_s=120)
    a, b, c = nodes.clients
    get(a.write.remote("0", KEYS[:2]))
    nodes.wait_until_found(KEYS[:2])
    with stopped(nodes.tiers[0]):
        # three of each of three workers: more than the actor has threads of its own
        lookups = [nodes.tiers[1].hold_prefix.remote(f"w1/look-{number}", KEYS[:2]) for number in range(9)]
        [place] = ray.get(nodes.tiers[1].reserve_slots.remote("w1/reserve", KEYS[8:9]), timeout=30)
        assert not place.stored
        ray.get(b.write.remote("1", KEYS[10:13]), timeout=30)
        nodes.wait_until_found(KEYS[10:13])
        assert ray.get(c.read.remote(KEYS[10:13]), timeout=30) == heads(KEYS[10:13])
        assert ray.get(b.read.remote(KEYS[10:13]), timeout=30) == heads(KEYS[10:13])
        assert nodes.stats(1).held_slots == 1
        assert ray.wait(lookups, timeout=0)[0] == []
    assert [len(refs) for refs in ray.get(lookups, timeout=60)] == [2] * 9
    for holder in ("w1/reserve", *(f"w1/look-{number}" for number in range(9))):
        get(nodes.tiers[1].release.remote(holder))
    assert nodes.stats(1).held_slots == 0
    nodes.check()


def test_a_worker_whose_tier_is_slow_has_its_answers_in_time_and_keeps_nothing(nodes: Nodes) -> None:
    nodes.start(heartbeat_s=60, call_deadline_s=120)
    a, b, _ = nodes.clients
    get(a.write.remote("0", KEYS[:2]))
    nodes.wait_until_found(KEYS[:2])
    memory = RemoteMemory(lambda: nodes.tiers[0], deadline_s=0.5, fetch_deadline_s=0.5)
    [place] = memory.reserve_slots("w0/slow", KEYS[4:5])
    memory.arena.seal(place.ref, place.key, memory.arena.digests(place.ref.slot))
    with stopped(nodes.tiers[0]):
        for call in (
            lambda: memory.hold_prefix("w0/slow", KEYS[:2]),
            lambda: memory.hold("w0/slow", KEYS[:2]),
            lambda: memory.reserve_slots("w0/slow", KEYS[5:7]),
            lambda: memory.commit("w0/slow", [(place.key, place.ref)]),
            lambda: memory.reserve_quota("w0/slow", 3),
            lambda: memory.drop(KEYS[0], SlotRef(0, 0)),
            lambda: memory.record_session("s", KEYS[:2]),
        ):
            with pytest.raises(ChunkLostError, match=r"did not answer within \d+(\.5)? s"):
                call()
        # other nodes go on
        get(b.write.remote("1", KEYS[10:13]))
        assert get(b.read.remote(KEYS[10:13])) == heads(KEYS[10:13])
    # what was asked for is done late; what is let go of then stays let go of
    wait_until(lambda: nodes.stats(0).stored_chunks == 3 and nodes.stats(0).quota_slots == 3)
    get(nodes.tiers[0].hold_prefix.remote("w0/last", KEYS[:1]))
    for holder in ("w0/slow", "w0/last"):
        get(nodes.tiers[0].release.remote(holder))
    wait_until(lambda: nodes.stats(0).held_slots == nodes.stats(0).quota_slots == 0)
    memory.close()
    nodes.check()


def test_a_pin_that_a_slow_tier_misses_is_refused_and_taken_back(nodes: Nodes) -> None:
    nodes.start(heartbeat_s=60)
    a, tier = nodes.clients[0], nodes.tiers[0]
    get(a.write.remote("0", KEYS[:4]))
    get(a.record_session.remote("s", KEYS[:4]))
    nodes.wait_until_found(KEYS[:4])
    directory = SessionDirectory(replace(nodes.all, deadline_s=1), chunk_tokens=16)
    with stopped(tier):
        with pytest.raises(TierSilentError, match="not pinned: 1 of the memory tiers did not answer"):
            directory.pin("s", ttl_s=600)
        assert directory.describe("s")["pinned_until"] is None
    # it does both late: what was taken back stays so
    get(tier.forget_session.remote("another"))
    wait_until(lambda: nodes.stats(0).pinned_slots == 0)
    directory = SessionDirectory(nodes.all, chunk_tokens=16)
    assert directory.pin("s", ttl_s=600)["pinned_until"] > time.time()
    assert nodes.stats(0).pinned_slots == 4
    silent = SessionDirectory(replace(nodes.all, deadline_s=1), chunk_tokens=16)
    with stopped(tier), pytest.raises(TierSilentError, match="not deleted: 1 of the memory tiers did not answer"):
        silent.delete("s")
    assert directory.delete("s")["deleted"]
    assert nodes.stats(0).pinned_slots == 0
    nodes.check()


def test_the_supervisor_follows_nodes_and_reclaims_what_the_dead_held(nodes: Nodes, cluster: Any) -> None:
    settings = nodes.settings("all")

    ours = nodes.all
    name = ours.name

    def tiers() -> list[str]:
        return sorted(ours.actors())

    node_ids = [node.node_id for node in cluster.list_all_nodes()]
    with Supervisor(settings.config, ours, period_s=0.2):
        first = start_tier(settings, name(node_ids[0]), node_ids[0])
        nodes.tiers.append(first)
        wait_until(lambda: tiers() == sorted(map(name, node_ids)))
        added = cluster.add_node(**NODE)
        wait_until(lambda: name(added.node_id) in tiers())
        nodes.tiers += [ray.get_actor(name(node), namespace=NAMESPACE) for node in [*node_ids[1:], added.node_id]]
        get([tier.arena_path.remote() for tier in nodes.tiers])

        here = NodeAffinitySchedulingStrategy(node_ids[0], soft=False)
        worker = ray.remote(Client).options(num_cpus=0, scheduling_strategy=here, name="REPLICA#dead-soon")
        client = worker.remote("dead-soon")
        get(client.begin.remote(first))
        get(client.write.remote("0", KEYS[:3], keep=True))
        time.sleep(1)
        assert get(first.stats.remote()).held_slots == 3
        os.kill(get(client.pid.remote()), signal.SIGKILL)
        wait_until(lambda: get(first.stats.remote()).held_slots == 0)

        # a tier that is killed is restarted by Ray; one that is killed for good, here
        ray.kill(nodes.tiers[1])
        wait_until(lambda: name(node_ids[1]) not in tiers())
        wait_until(lambda: name(node_ids[1]) in tiers())
        nodes.tiers[1] = ray.get_actor(name(node_ids[1]), namespace=NAMESPACE)
        cluster.remove_node(added)
        wait_until(lambda: name(added.node_id) not in tiers())
