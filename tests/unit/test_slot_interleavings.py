"""Interleavings of two writers, a reader and a tier at an arena's slots, up to a number of context switches.

The product's own functions run: `ArenaStore`, `Arena`, `Headers`, `CpuCopies` and `OpenWrites`, with a step before each
statement that touches what processes share, and copies cut in two. At each step any other of them may go on instead,
the first writer may be killed, its holds may be taken back, the tier may die and adopt its file. Never may a reader get
bytes of another chunk as sound, and in the end no slot may be lost. See docs/integrity.md, "Writers".

The suite tries the orders of the smallest scenario with one switch at any step, and random ones of all scenarios. All
with one switch, with two, or more:

    python tests/unit/test_slot_interleavings.py --switches 1
"""

import argparse
import ast
import inspect
import logging
import random
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from greenlet import GreenletExit, getcurrent, greenlet

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena import arena as arena_module
from forecache.workers.memory.arena.arena import Arena, ArenaDescription
from forecache.workers.memory.arena.headers import OWNER, Headers
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.arena.writers import OpenWrites, Quarantine
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.hot.copies import CopyItem, CpuCopies
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.tier.transfer import read

Bytes = npt.NDArray[np.uint8]

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 16
KEYS = [bytes([number]) * 16 for number in range(1, 4)]
STEPPED = [
    (Headers, ["seal", "renew", "clear", "set_writer"]),
    (Arena, ["_write", "seal", "seal_verified", "check"]),
    (CpuCopies, ["recall"]),
]
SUITE_RANDOM_ORDERS = 60


@dataclass(frozen=True)
class Scenario:
    """A scenario: the keys that each writer stores, one after another, and ``events`` that occur at any step."""

    name: str
    slots: int
    writes: tuple[Sequence[bytes], Sequence[bytes]]
    events: tuple[str, ...]


SMALL = [
    Scenario("one slot, a writer is taken for dead", 1, (KEYS[:1], KEYS[1:2]), ("reclaim",)),
    Scenario("one slot, the tier dies", 1, (KEYS[:1], KEYS[1:2]), ("restart",)),
]
SCENARIOS = [
    *SMALL,
    Scenario("a writer is taken for dead", 2, (KEYS[:1], KEYS[1:3]), ("reclaim",)),
    Scenario("the tier dies", 2, (KEYS[:1], KEYS[1:3]), ("restart",)),
    Scenario("a writer dies, and its holds are taken back", 1, (KEYS[:1], KEYS[1:2]), ("kill", "reclaim")),
    Scenario("a writer is taken for dead, then the tier dies", 2, (KEYS[:1], KEYS[1:2]), ("reclaim", "restart")),
    Scenario("a writer dies, then the tier", 1, (KEYS[:1], KEYS[1:2]), ("kill", "restart")),
    Scenario("two writers of one chunk, and the tier dies twice", 2, (KEYS[:1], KEYS[:1]), ("restart", "restart")),
]


class TierDied(Exception):  # noqa: N818 - what a call meets in the middle
    pass


@dataclass(eq=False)
class Actor:
    """A process or an event. ``wants_tier``: its next step is a call of the tier, which serves one at a time."""

    name: str
    is_event: bool = False
    wants_tier: bool = False
    is_cut_off: bool = False
    body: "greenlet" = field(init=False)

    @property
    def is_done(self) -> bool:
        return bool(self.body.dead)


Choice = tuple[int, int]
"""Which of how many options was taken."""


class Run:
    """One interleaving: ``choices``, then what ``pick(options)`` chooses."""

    def __init__(
        self, scenario: Scenario, directory: Path, switches: int, choices: Sequence[int], pick: Callable[[int], int]
    ) -> None:
        self._scenario = scenario
        self._switches = switches
        self._choices = choices
        self._pick = pick
        self.taken: list[Choice] = []
        self._busy: Actor | None = None
        self._main = getcurrent()
        size = ArenaDescription(LAYOUT.fingerprint, "index", scenario.slots, LAYOUT.nbytes, INDEX_NBYTES).file_bytes
        self._arena = Arena.create(
            directory, "model", layout=LAYOUT, index_nbytes=INDEX_NBYTES, index_fingerprint="index", capacity_bytes=size
        )
        assert self._arena.slots == scenario.slots
        self._store = ArenaStore(self._arena)
        self._actors: list[Actor] = []
        # a worker's mapping is in its own frame alone: it ends with it
        self._writers: dict[str, tuple[Arena, OpenWrites]] = {}
        for name, keys in zip(("w1", "w2"), scenario.writes, strict=True):
            mapped = Arena.attach(self._arena.path)
            self._writers[name] = (mapped, OpenWrites(mapped))
            self._add(Actor(name), lambda actor, keys=keys: self._write(actor, keys))
        self._add(Actor("reader"), self._read)
        events = {"reclaim": self._reclaim, "restart": self._restart, "kill": self._kill}
        for event in scenario.events:
            self._add(Actor(event, is_event=True), events[event])

    def _add(self, actor: Actor, body: Callable[[Actor], None]) -> None:
        actor.body = greenlet(lambda: body(actor))
        self._actors.append(actor)

    def go(self) -> None:
        """Run to the end. Raises AssertionError if a rule is broken."""
        try:
            last: Actor | None = None
            while options := self._options(last):
                place = len(self.taken)
                choice = self._choices[place] if place < len(self._choices) else self._pick(len(options))
                self.taken.append((choice, len(options)))
                actor = options[choice]
                if last is not None and not last.is_done and actor is not last:
                    self._switches -= 1
                actor.body.switch()
                last = actor
            self._check_end()
        finally:
            for actor in self._actors:
                if not actor.is_done:
                    actor.body.throw(GreenletExit)
            self._writers.clear()
            self._arena.unlink()
            self._arena.close()

    def _options(self, last: Actor | None) -> list[Actor]:
        """The actors that can run, the current one first."""
        able = [actor for actor in self._actors if self._is_able(actor)]
        if last in able and self._switches <= 0:
            return [last]
        return sorted(able, key=lambda actor: actor is not last)

    def _is_able(self, actor: Actor) -> bool:
        if actor.is_done:
            return False
        if actor.name == "kill":
            return self._busy is None or self._busy.name != "w1"  # a call goes on without its caller
        # holds are taken back by a call of the tier, too; it dies at any moment
        waits = actor.wants_tier or actor.name == "reclaim"
        return not waits or self._busy in (None, actor)

    def step(self) -> None:
        """Let other actors run. The product's functions call this."""
        actor = next((actor for actor in self._actors if actor.body is getcurrent()), None)
        if actor is not None and not actor.is_event:
            self._main.switch()
            if actor.is_cut_off:
                actor.is_cut_off = False
                raise TierDied

    def _call(self, actor: Actor, method: str, *args: Any, **named: Any) -> Any:
        """Queue a call of the tier; its answer arrives some steps later."""
        actor.wants_tier = True
        self._main.switch()
        actor.wants_tier, self._busy = False, actor
        try:
            answer = getattr(self._store, method)(*args, **named)
        except TierDied:
            raise ChunkLostError("the tier is away") from None
        finally:
            if self._busy is actor:
                self._busy = None
        self._main.switch()
        return answer

    def _write(self, actor: Actor, keys: Sequence[bytes]) -> None:
        """Write as `RemoteMemory` and the copy thread do."""
        mapped, writes = self._writers[actor.name]
        pool = HotPool(LAYOUT, 1, torch.device("cpu"))
        for key in keys:
            holder = f"{actor.name}/{key[0]}"
            pool.memory[:] = key[0]
            record = torch.full((INDEX_NBYTES,), key[0], dtype=torch.uint8)
            copies = CpuCopies(pool, LAYOUT, mapped, lambda _, record=record: record)
            for _ in range(2):
                if self._store_chunk(actor, copies, writes, holder, key):
                    break
            writes.released(holder)
            with suppress(ChunkLostError):
                self._call(actor, "release", holder)

    def _store_chunk(self, actor: Actor, copies: CpuCopies, writes: OpenWrites, holder: str, key: bytes) -> bool:
        number, places = writes.begin(), list[Reservation]()
        try:
            news = writes.news()
            self._call(actor, "apply_report", news)
            places = self._call(actor, "reserve_slots", holder, [key], writer=news.writer, begun=news.begun)
        except (ChunkLostError, OverloadedError):
            return False
        finally:
            writes.answered(number, holder, [place.ref for place in places if not place.stored])
        [place] = places
        if place.stored:
            return True
        lost = copies.store([CopyItem(key, place.ref, 0)], []).lost
        writes.ended([place.ref])
        try:
            if lost:
                self._call(actor, "drop", key, place.ref)
                return False
            self._call(actor, "commit", holder, [(key, place.ref)])
        except ChunkLostError:
            return False
        return True

    def _read(self, actor: Actor) -> None:
        mapped = Arena.attach(self._arena.path)
        pool = HotPool(LAYOUT, 1, torch.device("cpu"))
        copies = CpuCopies(pool, LAYOUT, mapped, None)
        for key in dict.fromkeys([*self._scenario.writes[1], *self._scenario.writes[0]]):
            try:
                [ref] = self._call(actor, "hold", "r/a", [key])
                if ref is None:
                    continue
                pool.memory[:] = 0xFF
                if copies.recall([CopyItem(key, ref, 0)], []).lost:
                    self._call(actor, "drop", key, ref)
                else:
                    assert (pool.memory == key[0]).all(), f"{key[:1].hex()} was read as {pool.memory[0, ::256]}"
                self._call(actor, "release", "r/a")
            except ChunkLostError:
                continue

    def _reclaim(self, _: Actor) -> None:
        self._store.release_prefix("w1/")

    def _restart(self, _: Actor) -> None:
        if self._busy is not None:
            self._busy.is_cut_off = True
            self._busy = None
        path = self._arena.path
        self._arena.close()
        self._arena = Arena.adopt(path)
        self._store = ArenaStore(self._arena)

    def _kill(self, _: Actor) -> None:
        [actor] = [actor for actor in self._actors if actor.name == "w1"]
        if not actor.is_done:
            actor.body.throw(GreenletExit)
        writer = self._writers.pop("w1")[0].writer
        assert writer not in self._arena.writers(), "what the model kills lives on"

    def _check_end(self) -> None:
        """At the end, living workers have reported that they don't write, and dead ones have unmapped the file."""
        for _, writes in self._writers.values():
            self._store.apply_report(writes.news())
        for name in ("w1/", "w2/", "r/"):
            self._store.release_prefix(name)
        self._store.check_integrity()
        batch = read(self._store, KEYS)
        for key, chunk, index in zip(batch.keys, batch.chunks, batch.index, strict=True):
            assert (chunk == key[0]).all() and (index == key[0]).all(), f"{key[:1].hex()} holds {chunk[::256]}"
        stats = self._store.stats()
        assert (stats.held_slots, stats.quarantined_slots, stats.bad_slots) == (0, 0, 0), stats
        assert stats.used_slots == stats.stored_chunks, stats
        new = [bytes([100 + number]) * 16 for number in range(stats.slots)]
        assert len(self._store.reserve_slots("last", new, writer=OWNER)) == stats.slots, "a slot is lost"
        self._store.release("last")
        self._store.check_integrity()


class Explorer:
    """Runs a scenario in one interleaving after another."""

    def __init__(self) -> None:
        self.orders = 0
        self.steps = 0
        self._run: Run | None = None

    def step(self) -> None:
        if self._run is not None:
            self._run.step()

    def run(
        self, scenario: Scenario, directory: Path, switches: int, choices: Sequence[int], pick: Callable[[int], int]
    ) -> list[Choice]:
        self._run = run = Run(scenario, directory, switches, choices, pick)
        try:
            run.go()
        except AssertionError as error:
            raise AssertionError(
                f"{scenario.name}, switches {switches}, choices {[choice for choice, _ in run.taken]}: {error}"
            ) from error
        finally:
            self._run = None
            self.orders += 1
            self.steps += len(run.taken)
        return run.taken

    def all_orders(self, scenario: Scenario, directory: Path, switches: int) -> None:
        """All interleavings with at most so many switches away from an actor that could continue."""
        choices: list[int] = []
        while True:
            taken = self.run(scenario, directory, switches, choices, lambda _: 0)
            while taken and taken[-1][0] + 1 >= taken[-1][1]:
                taken.pop()
            if not taken:
                return
            choices = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]

    def some_orders(self, scenario: Scenario, directory: Path, count: int, seed: int) -> None:
        """``count`` random interleavings, with few or many switches."""
        generator = random.Random(seed)
        for _ in range(count):
            share = generator.choice([0.03, 0.1, 0.3, 1.0])

            def pick(options: int, share: float = share) -> int:
                return generator.randrange(options) if generator.random() < share else 0

            self.run(scenario, directory, 1 << 30, (), pick)


@contextmanager
def stepping() -> Iterator[tuple[Explorer, Path]]:
    """Add steps to the product's functions, and make its files small."""
    explorer = Explorer()

    def copy_in_two(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        half = len(target) // 2
        target[:half] = source[:half]
        explorer.step()
        target[half:] = source[half:]

    def snapshot_in_two(headers: Headers, slot: int) -> bytes:
        first = headers._bytes[slot, :24].tobytes()
        explorer.step()
        return first + headers._bytes[slot, 24:].tobytes()

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slots-")))
        stack.enter_context(patch.object(arena_module, "CHUNKS_ALIGNMENT_BYTES", arena_module.PAGE_BYTES))
        for owner, names in STEPPED:
            for name in names:
                stack.enter_context(patch.object(owner, name, with_steps(getattr(owner, name), explorer.step)))
        stack.enter_context(patch.object(Arena, "_copy", staticmethod(copy_in_two)))
        stack.enter_context(patch.object(Headers, "_snapshot", snapshot_in_two))
        yield explorer, directory


def with_steps(function: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    """A copy of ``function`` that calls ``step`` before each of its statements."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    class AddSteps(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and not isinstance(node, ast.Module):
                    setattr(node, name, [part for each in block for part in (*ast.parse("_step()").body, each)])
            return node

    names = {**function.__globals__, "_step": step}
    exec(compile(ast.fix_missing_locations(AddSteps().visit(tree)), inspect.getfile(function), "exec"), names)
    made: Callable[..., Any] = names[function.__name__]
    return made


def name_of(scenario: Scenario) -> str:
    return scenario.name.replace(" ", "-").replace(",", "")


def test_no_order_with_one_switch_serves_wrong_bytes_or_loses_a_slot() -> None:
    with stepping() as (explorer, directory):
        explorer.all_orders(SCENARIOS[0], directory, 1)
    assert explorer.orders > 1000, "the functions make no steps"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=name_of)
def test_no_random_order_serves_wrong_bytes_or_loses_a_slot(scenario: Scenario) -> None:
    with stepping() as (explorer, directory):
        explorer.some_orders(scenario, directory, SUITE_RANDOM_ORDERS, seed=1)
    assert explorer.steps > 30 * SUITE_RANDOM_ORDERS, "the functions make no steps"


def test_a_tier_that_hands_slots_out_at_once_and_seals_what_is_there_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier version: it sealed the checksum of the slot's bytes, and a writer that lost the slot could still
    write."""
    monkeypatch.setattr(Quarantine, "add", lambda *_: False)
    monkeypatch.setattr(Arena, "_write", seal_what_is_there)
    found = r"was read as|holds|its header does not say so"
    with pytest.raises(AssertionError, match=found), stepping() as (explorer, directory):
        explorer.some_orders(SCENARIOS[0], directory, 2000, seed=1)


def seal_what_is_there(arena: Arena, ref: SlotRef, key: bytes, chunk: Bytes, index: Bytes, *_: object) -> None:
    arena._check_is_ours(ref)
    arena._copy(arena._chunks[ref.slot], chunk)
    arena._copy(arena._index[ref.slot], index)
    arena.seal(ref, key, arena.digests(ref.slot))


def test_slots_that_wait_for_good_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quarantine, "apply_report", lambda *_: [])
    monkeypatch.setattr(Quarantine, "written", lambda *_: False)
    monkeypatch.setattr(Quarantine, "released", lambda *_: [])
    with pytest.raises(AssertionError, match="quarantined_slots=1"), stepping() as (explorer, directory):
        explorer.all_orders(SCENARIOS[0], directory, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try all orders of two writers, a reader and a tier.")
    parser.add_argument("--switches", type=int, default=1, help="most switches away from who could go on (default 1)")
    parser.add_argument("--random", type=int, default=0, help="so many random orders of each scenario after that")
    parser.add_argument("--scenario", type=int, choices=range(len(SCENARIOS)), help="only this one")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a writer that lost its slot says so
    chosen = SCENARIOS if options.scenario is None else [SCENARIOS[options.scenario]]
    total = 0
    for scenario in chosen:
        start_s = time.monotonic()
        with stepping() as (explorer, directory):
            explorer.all_orders(scenario, directory, options.switches)
            explorer.some_orders(scenario, directory, options.random, seed=0)
        total += explorer.orders
        took_s = time.monotonic() - start_s
        print(f"{explorer.orders:9,} orders, {explorer.steps:11,} steps, {took_s:6.1f} s: {scenario.name}", flush=True)
    print(f"{total:9,} orders: no wrong bytes, no lost slot")


if __name__ == "__main__":
    main()
