"""Every hold has a living owner or is released, even if calls between tiers come late, twice or never."""

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forecache.cluster.cli.integrity import orphans
from forecache.workers.errors import ChunkLostError, InvalidRequestError, OverloadedError, ReleasedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.records import RecordSlots
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.chunk_batch import ChunkBatch, RecordBatch
from forecache.workers.memory.format.hold_id import MOST_WORKERS, HoldId, Released, reader_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.spread_quota import spread_quota
from forecache.workers.memory.tier.catalog import TierRecord
from forecache.workers.memory.tier.fetch import ChunkFetcher
from forecache.workers.memory.tier.spread import HostedSequences, SpreadSequences
from forecache.workers.memory.tier.transfer import read

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 8
HERE_SLOTS, THERE_SLOTS, RECORDS = 24, 40, 200


def name(serial: int, worker: str = "w") -> str:
    return HoldId(worker, f"req-{serial}", serial).name


def keys_of(serial: int, count: int = 2) -> list[ChunkKey]:
    return [bytes([serial % 256, number]) * 8 for number in range(count)]


def make_store(directory: Path, tier_id: str, slots: int, records: int = 0) -> ArenaStore:
    return ArenaStore(
        Arena.create(
            directory,
            tier_id,
            layout=LAYOUT,
            index_nbytes=INDEX_NBYTES,
            index_fingerprint="index",
            capacity_bytes=(2 << 20) + slots * (LAYOUT.nbytes + INDEX_NBYTES + 64),
            record_bytes=records * (INDEX_NBYTES + 64),
        )
    )


def write(store: ArenaStore, holder: str, keys: Sequence[ChunkKey]) -> None:
    for place in store.reserve_slots(holder, keys):
        if not place.stored:
            store.arena.chunks[place.ref.slot] = place.key[0]
            store.arena.index[place.ref.slot] = place.key[1]
            store.arena.seal(place.ref, place.key, store.arena.digests(place.ref.slot))
            store.commit(holder, [(place.key, place.ref)])


class Nodes:
    """Tier `here`, with spread sequences, and tier `there`, which hosts their chunks: both real, with direct calls.

    ``around`` gets the name of each call between them, and a function that makes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lives = {"here": 0, "there": 0}
        self.around: Callable[[str, Callable[[], object]], object] = lambda method, call: call()
        self.reachable = True
        self.start("here")
        self.start("there")

    def start(self, tier_id: str) -> None:
        """Start a new life of the tier: its holds are gone, its stored chunks remain."""
        self.lives[tier_id] += 1
        slots, records = (HERE_SLOTS, RECORDS) if tier_id == "here" else (THERE_SLOTS, 0)
        if self.lives[tier_id] == 1:
            store = make_store(self.directory, tier_id, slots, records)
        else:
            store = ArenaStore((self.store if tier_id == "here" else self.there).arena)
        if tier_id == "there":
            self.there = store
            self.hosting = HostedSequences(store, LAYOUT, lambda holder, keys: 0)
            return
        self.store, self.records = store, RecordSlots(store.arena)
        fetcher = ChunkFetcher(store, self, lambda keys: None, lambda chunks: None)
        config = MemoryConfig(call_deadline_s=1e-6, heartbeat_s=1e-6)
        self.spread = SpreadSequences("here", store, self.records, self, self, fetcher, config, lambda: None)  # type: ignore[arg-type]

    # the catalog, as far as it is asked

    def tiers(self) -> list[TierRecord]:
        return list(self.others().values())

    def others(self) -> dict[str, TierRecord]:
        record = TierRecord("there", f"{self.lives['there']}", "node", self.there.arena.slots, 0)
        return {"there": record} if self.reachable else {}

    def locate(self, keys: Sequence[ChunkKey]) -> list[set[str]]:
        return [{"there"} if is_there else set() for is_there in self.there.stored(keys)]

    # the other tier

    def read(self, tier_id: str, keys: Sequence[ChunkKey]) -> "Nodes":
        self.batch = read(self.there, keys)
        return self

    def result(self, timeout_s: float) -> ChunkBatch:
        return self.batch

    def reserve_hosted_quota(self, tier_id: str, holder: str, chunks: int) -> int:
        return int(self._do("reserve_quota", lambda: self.hosting.reserve_quota(holder, chunks)))

    def hold_hosted(self, tier_id: str, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        batch = self._do("hold", lambda: self.hosting.hold(holder, keys))
        assert isinstance(batch, RecordBatch)
        return batch

    def store_hosted(self, tier_id: str, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        return list(self._do("store_batch", lambda: self.hosting.store_batch(holder, batch)))

    def release_hosted(self, tier_id: str, holders: Sequence[str]) -> None:
        self._do("release", lambda: self.hosting.release_all(holders))

    def hosted_holders(self, tier_id: str, floors: Mapping[str, int]) -> list[str]:
        return list(self._do("hosted", lambda: self.hosting.holders(floors)))

    def store_batch(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        raise NotImplementedError

    def set_copied(self, tier_id: str, keys: Sequence[ChunkKey]) -> None:
        self.there.set_copied(keys, True)

    def _do(self, method: str, call: Callable[[], object]) -> "object | int | list[object]":
        if not self.reachable:
            raise ChunkLostError("there is out of reach")
        return self.around(method, call)

    # a worker of `here`

    def begin(self, holder: str, chunks: int = 60) -> None:
        self.spread.begin(holder, chunks)
        self.spread.reserve_remote_quota(holder)

    def release(self, holder: str, *, was_spread: bool = True) -> None:
        self.spread.end(holder, was_spread=was_spread)
        self.store.release(holder)

    def rounds(self, count: int = 3) -> None:
        for _ in range(count):
            self.spread.tick(self.others())

    def held(self) -> dict[str, object]:
        """Everything that is held or reserved, on both tiers."""
        self.store.check_integrity()
        self.there.check_integrity()
        self.records.check_integrity()
        self.spread.check_integrity()
        found = {
            "here": self.store.holders(),
            "there": self.there.holders(),
            "slots": self.store.stats().held_slots + self.there.stats().held_slots,
            "promised": self.store.stats().quota_slots + self.there.stats().quota_slots,
            "records": self.records.holders(),
            "spread": self.spread.holders(),
        }
        return {where: what for where, what in found.items() if what}


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


class NamesMachine(RuleBasedStateMachine):
    """The released names of one worker, against a plain set of them."""

    def __init__(self) -> None:
        super().__init__()
        self.released = Released()
        self.model: set[str] = set()
        self.living: dict[int, int] = {}  # serial -> number of its reader
        self.next = 0

    @rule()
    def begin(self) -> None:
        self.living[self.next] = 0
        assert name(self.next) not in self.released
        self.next += 1

    @rule(data=st.data(), reader=st.booleans())
    def release(self, data: st.DataObject, reader: bool) -> None:
        if not self.living:
            return
        serial = data.draw(st.sampled_from(sorted(self.living)))
        if reader:
            number = self.living[serial]
            self.living[serial] += data.draw(st.integers(1, 3))
            self.released.add(reader_of(name(serial), number))
            self.model.add(reader_of(name(serial), number))
        else:
            del self.living[serial]
            self.released.add(name(serial))
            self.model.add(name(serial))

    @rule()
    def hear_of_the_floor(self) -> None:
        self.released.raise_floor("w", min(self.living, default=self.next))

    @invariant()
    def knows_all_and_no_more(self) -> None:
        assert all(known in self.released for known in self.model)
        for serial, number in self.living.items():
            assert name(serial) not in self.released and reader_of(name(serial), number) not in self.released
        # a name for each that is younger than the oldest holder, at most
        assert len(self.released) <= 1 + self.next - min(self.living, default=self.next) + len(self.living)


TestNames = NamesMachine.TestCase
TestNames.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_remembered_of_released_names_does_not_grow() -> None:
    released, order = Released(), random.Random(1)
    for start in range(0, 5000, 50):
        serials = list(range(start, start + 50))
        order.shuffle(serials)
        for serial in serials:
            released.add(name(serial))
    assert len(released) == 1 and released.floor("w") == 5000
    for worker in range(2 * MOST_WORKERS):
        released.add(name(0, f"w{worker}"))
    assert len(released) <= MOST_WORKERS


@given(st.text(), st.text(alphabet="@#/0123456789ab-"))
def test_a_client_can_t_make_another_name_of_its_request(request_id: str, traceparent: str) -> None:
    released = Released()
    released.add(HoldId("w", request_id, 7, traceparent).name)
    assert [serial for serial in range(20) if name(serial) in released] == [7]


def test_names_of_another_kind_may_be_used_again() -> None:
    released = Released()
    for other in ("w", "w/a", "transfer/0a1b", "w/a#b", ""):
        released.add(other)
        assert other not in released
    with pytest.raises(ReleasedError, match="too late"):
        released.add(name(0))
        released.check(name(0))


LATE = ("reserve_quota", "hold", "store_batch")


@pytest.mark.parametrize("method", LATE)
@pytest.mark.parametrize("when", ["the answer", "the call", "the call, and twice"])
def test_what_comes_after_a_release_leaves_nothing_held(nodes: Nodes, method: str, when: str) -> None:
    """The worker's call timed out and it released the sequence, while the call to the other tier still runs."""
    holder, keys = name(0), keys_of(0)
    write(nodes.there, "w2/past", keys)
    nodes.there.release("w2/past")

    def around(called: str, call: Callable[[], object]) -> object:
        if called != method:
            return call()
        nodes.around = lambda method, call: call()
        answer = call() if when == "the answer" else None
        nodes.release(holder)
        nodes.rounds(1)
        if when != "the answer":
            for _ in range(1 + when.endswith("twice")):
                with pytest.raises(ReleasedError):
                    call()
            raise ChunkLostError("no answer in time")
        return answer

    nodes.spread.begin(holder, 60)
    nodes.around = around
    if method == "hold":
        with pytest.raises(ChunkLostError):
            nodes.spread.hold_in_place(holder, keys)
    elif method == "reserve_quota":
        with pytest.raises(ReleasedError):
            nodes.spread.reserve_remote_quota(holder)
    else:
        nodes.spread.reserve_remote_quota(holder)
        write(nodes.store, holder, keys_of(1))
        assert nodes.spread.move_out(holder, keys_of(1)) == [None, None]
    nodes.rounds()
    assert not nodes.held() and holder not in nodes.spread


def test_a_tier_that_did_not_answer_in_time_is_told_of_the_release(nodes: Nodes) -> None:
    """The other tier executed the call, but its answer was lost."""
    holder = name(0)

    def around(called: str, call: Callable[[], object]) -> object:
        answer = call()
        if called == "reserve_quota":
            raise ChunkLostError("no answer in time")
        return answer

    nodes.spread.begin(holder, 60)
    nodes.around = around
    with pytest.raises(OverloadedError):
        nodes.spread.reserve_remote_quota(holder)
    assert nodes.there.holders() == [holder]
    nodes.release(holder)
    nodes.rounds(1)
    assert not nodes.held()


def test_a_layer_is_read_without_being_held_and_a_chunk_that_is_gone_is_left_out(nodes: Nodes) -> None:
    holder, keys = name(0), keys_of(0, 3)
    write(nodes.there, holder, keys)
    assert nodes.hosting.read_layer(holder, keys, 0).keys == tuple(keys)
    nodes.there.release(holder)
    assert nodes.hosting.read_layer(holder, keys, 0).keys == tuple(keys)
    assert nodes.there.holders() == [] and nodes.there.stats().held_slots == 0
    [ref] = nodes.there.find(keys[1:2])
    assert ref is not None
    nodes.there.drop(keys[1], ref)
    batch = nodes.hosting.read_layer(holder, keys, 0)
    assert batch.keys == (keys[0], keys[2]) and batch.is_sound
    assert batch.rows.shape == (2, LAYOUT.layer_nbytes)


def test_calls_of_this_node_that_come_after_a_release_are_refused(nodes: Nodes) -> None:
    holder, keys, store, records = name(0), keys_of(0), nodes.store, nodes.records
    write(store, holder, keys)
    reader = reader_of(holder, 0)
    assert store.hold(reader, keys) != [None, None]
    store.release(reader)
    for late in (
        lambda: store.hold(reader, keys),
        lambda: store.reserve_slots(reader, keys_of(1)),
    ):
        with pytest.raises(ReleasedError):
            late()
    assert store.hold(reader_of(holder, 1), keys) != [None, None]
    nodes.release(holder)
    records_of = RecordBatch.of(read(store, keys))
    before = store.stats()
    for late in (
        lambda: store.hold_prefix(holder, keys),
        lambda: store.hold(holder, keys),
        lambda: store.hold(reader_of(holder, 2), keys),
        lambda: store.reserve_slots(holder, keys_of(1)),
        lambda: store.reserve_quota(holder, 1),
        lambda: store.reserve_quota_up_to(holder, 1),
        lambda: records.reserve_quota(holder, 1),
        lambda: records.hold(holder, keys),
        lambda: records.put(holder, records_of),
        lambda: nodes.spread.begin(holder, 60),
        lambda: nodes.spread.hold_again(holder, 60, keys, {}),
    ):
        with pytest.raises(ReleasedError):
            late()
    assert store.stats() == before
    store.release(reader_of(holder, 1))
    assert not nodes.held()


def test_one_that_does_not_fit_its_node_begins_again_with_nothing_held(nodes: Nodes) -> None:
    holder, keys = name(0), keys_of(0)
    write(nodes.store, "w/past", keys)
    nodes.store.release("w/past")
    nodes.store.hold_prefix(holder, keys)
    nodes.begin(holder)
    assert nodes.store.stats().held_slots == 0
    assert len(nodes.spread.hold_in_place(holder, keys)) == 2
    nodes.release(holder)
    nodes.rounds(1)
    assert not nodes.held()


def test_a_release_that_was_lost_is_made_up_for(nodes: Nodes) -> None:
    """This tier dies after the worker's release and before it told the other tiers, which then hold for no owner."""
    gone, living = name(0), name(1)
    for holder in (gone, living):
        nodes.begin(holder, 20)
        write(nodes.store, holder, keys_of(int(holder == living)))
        nodes.spread.move_out(holder, keys_of(int(holder == living)))
    nodes.release(gone)
    nodes.start("here")
    nodes.rounds()
    assert set(nodes.there.holders()) == {gone, living}  # it does not know yet who lives
    nodes.spread.hold_again(living, 20, [], dict.fromkeys(keys_of(1), "there"))
    nodes.rounds()
    assert set(nodes.there.holders()) == {gone, living}
    nodes.spread.vouch("w", 1)
    nodes.rounds()
    assert nodes.there.holders() == [living]
    with pytest.raises(ReleasedError):
        nodes.hosting.reserve_quota(gone, 1)
    nodes.release(living)
    nodes.rounds()
    assert not nodes.held()


def test_a_tier_that_was_away_is_swept_when_it_is_back(nodes: Nodes) -> None:
    nodes.spread.vouch("w", 0)
    nodes.begin(name(0))
    nodes.reachable = False
    nodes.release(name(0))
    nodes.rounds()
    assert nodes.there.holders() == [name(0)]
    nodes.reachable = True
    nodes.rounds()
    assert not nodes.held()


def test_tiers_that_hold_nothing_are_not_asked_all_the_time(nodes: Nodes) -> None:
    asked: list[str] = []

    def around(called: str, call: Callable[[], object]) -> object:
        asked.append(called)
        return call()

    nodes.around = around
    nodes.spread.vouch("w", 0)
    nodes.rounds(5)
    assert asked == ["hosted"]
    nodes.begin(name(0))
    nodes.rounds(5)
    assert asked.count("hosted") == 6
    nodes.release(name(0))
    nodes.rounds(5)
    assert asked.count("hosted") == 7 and asked.count("release") == 1


class TwoTiers(RuleBasedStateMachine):
    """Sequences of one worker over two tiers that may die; calls arrive, arrive late or are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[tuple[int, Callable[[], object]]] = []  # life of the tier that was called, and the call
        self.living: dict[str, int] = {}  # holder -> serial
        self.next = 0
        self.fate = "ok"

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.nodes = Nodes(Path(self.directory.name))
        self.nodes.around = self.deliver

    def teardown(self) -> None:
        if not hasattr(self, "nodes"):
            return
        for holder in list(self.living):
            self.release(holder)
        self.fate = "ok"
        self.nodes.reachable = True
        self.vouch()
        while self.late:
            self.come_late(0)
        self.nodes.rounds(4)
        assert not self.nodes.held()
        self.nodes.store.arena.close()
        self.nodes.there.arena.close()
        self.directory.cleanup()

    def deliver(self, method: str, call: Callable[[], object]) -> object:
        if self.fate == "ok":
            return call()
        if self.fate == "slow":  # it is done, and the answer does not come in time
            call()
        elif self.fate == "late":
            self.late.append((self.nodes.lives["there"], call))
        raise ChunkLostError("no answer in time")

    @rule(fate=st.sampled_from(["ok", "ok", "slow", "late", "lost"]))
    def set_fate(self, fate: str) -> None:
        self.fate = fate

    @rule(chunks=st.integers(10, 30))
    def begin(self, chunks: int) -> None:
        holder = name(self.next)
        self.living[holder] = self.next
        self.next += 1
        try:
            self.nodes.begin(holder, chunks)
        except (OverloadedError, ChunkLostError, InvalidRequestError):
            self.release(holder)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def move_out(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.living)))
        keys = keys_of(self.living[holder])
        try:
            write(self.nodes.store, holder, keys)
            self.nodes.spread.move_out(holder, keys)
        except (OverloadedError, ChunkLostError):
            return

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def hold_prefix(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.living)))
        try:
            self.nodes.spread.hold_in_place(holder, keys_of(self.living[holder]))
        except ChunkLostError:
            return

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.living))))

    def release(self, holder: str) -> None:
        del self.living[holder]
        self.nodes.release(holder)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def some_call_comes_late(self, data: st.DataObject) -> None:
        self.come_late(data.draw(st.integers(0, len(self.late) - 1)))

    def come_late(self, number: int) -> None:
        life, call = self.late.pop(number)
        if life != self.nodes.lives["there"]:
            return  # calls of a process that has died die with it
        try:
            call()
        except ChunkLostError:
            return

    @rule(reachable=st.booleans())
    def reach(self, reachable: bool) -> None:
        self.nodes.reachable = reachable

    @rule()
    def round(self) -> None:
        self.nodes.rounds(1)

    @rule()
    def vouch(self) -> None:
        self.nodes.spread.vouch("w", min(self.living.values(), default=self.next))

    @rule()
    def restart_here(self) -> None:
        """The worker repeats the holds of its living sequences."""
        places = {
            holder: {key: "there" for key in keys_of(serial) if self.nodes.spread.places(holder, [key]) == ["there"]}
            for holder, serial in self.living.items()
        }
        self.nodes.start("here")
        for holder in list(self.living):
            self.nodes.spread.hold_again(holder, 20, [], places[holder])

    @rule()
    def restart_there(self) -> None:
        self.nodes.start("there")

    @invariant()
    def who_lives_keeps_what_it_has(self) -> None:
        if not hasattr(self, "nodes"):
            return
        self.nodes.held()
        for holder, serial in self.living.items():
            spread = self.nodes.spread
            if self.nodes.spread._incarnations.get("there") != f"{self.nodes.lives['there']}":
                return  # the next round repeats its holds
            for key in keys_of(serial):
                if spread.places(holder, [key]) == ["there"] and self.nodes.there.stored([key]) == [True]:
                    assert holder in self.nodes.there.holders(), "a sequence that lives lost its holds"


TestTwoTiers = TwoTiers.TestCase
TestTwoTiers.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_orphan_is_what_its_living_worker_does_not_know() -> None:
    held = {
        "tier-a": [name(0), name(1), reader_of(name(1), 3), name(2, "dead"), "transfer/0a"],
        "tier-b": [name(0), name(1)],
    }
    living = {"w": [name(1), reader_of(name(1), 3)]}
    assert orphans(held, living) == [
        f"tier-a: {name(0)} has ended, but still holds slots",
        f"tier-b: {name(0)} has ended, but still holds slots",
    ]
    assert orphans(held, {}) == []


def test_what_all_tiers_together_can_t_hold_is_not_told_to_try_again(nodes: Nodes) -> None:
    here, there = nodes.store.arena.slots, nodes.there.arena.slots
    most = here - 2 * spread_quota(here).max_in_flight + there
    nodes.begin(name(0), most)
    nodes.release(name(0))
    nodes.rounds()
    nodes.spread.begin(name(1), most + 1)
    with pytest.raises(InvalidRequestError, match=f"need {most + 1} chunks, but the memory of all nodes holds {most}"):
        nodes.spread.reserve_remote_quota(name(1))
    nodes.release(name(1))
    nodes.rounds()
    # another node that is away may come back
    nodes.reachable = False
    nodes.spread.begin(name(2), most)
    with pytest.raises(OverloadedError, match="Try again later"):
        nodes.spread.reserve_remote_quota(name(2))
    nodes.release(name(2))
    nodes.reachable = True
    nodes.rounds()
    assert not nodes.held()
