"""Keeps a sequence's list of chunks, the hot pool and cold memory consistent."""

import itertools
import time
from collections.abc import Iterator

import numpy as np

from forecache.workers.core.requests import FinishReason
from forecache.workers.core.sequence import Chunk, State, TokenSequence
from forecache.workers.core.stats import EngineCounters
from forecache.workers.engine.snapshots import Snapshots
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.completions import PrefixHeld, WrittenBack
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.residency.window import WindowCycle


class ChunkLifecycle:
    """Finds the stored prefix of a sequence, stores the chunks that it completes, and releases all of them.

    Belongs to the engine's thread.
    """

    def __init__(
        self,
        pool: HotPool,
        arena: Arena,
        prefetcher: Prefetcher,
        windows: WindowCycle,
        counters: EngineCounters,
        snapshots: Snapshots,
    ) -> None:
        self._pool = pool
        self._arena = arena
        self._prefetcher = prefetcher
        self._windows = windows
        self._counters = counters
        self._snapshots = snapshots
        self._holders: dict[str, TokenSequence] = {}
        self._held_back: dict[TokenSequence, None] = {}
        self._releasing: dict[str, int] = {}
        self._asked: dict[str, tuple[ChunkKey, ...]] = {}

    def locate(self, seq: TokenSequence) -> None:
        """Search cold memory for the prefix of ``seq``, which was just admitted, and hold what is found."""
        self._holders[seq.holder] = seq
        seq.counters.locating_s = time.perf_counter()
        # exact answers reuse only chunks that were decoded over all chunks
        partial = self._windows.budgets.first(seq, seq.max_chunks) < seq.max_chunks
        if partial and seq.policy == "lookahead":
            # the last prompt tokens choose the first sets, so they are always computed: an answer must not depend on
            # what is stored
            seq.fresh_tokens = self._windows.fresh_tokens
        self._asked[seq.holder] = keys = () if seq.scores_prompt else tuple(seq.reusable_keys())
        has_session = partial and seq.cache.session_id is not None and not seq.scores_prompt
        session_keys = seq.session_keys if has_session else None
        # a restarted sequence regains its quota once its old hold is released
        self._prefetcher.find_prefix(seq.holder, keys, session_keys, seq.cold_slots, after_stores=seq.restarts > 0)

    @property
    def releasing_slots(self) -> int:
        """Arena slots that cold memory still reserves for sequences that have left."""
        return sum(self._releasing.values())

    def released(self, holder: str) -> None:
        """Cold memory has released the hold and the reservations of ``holder``."""
        self._releasing.pop(holder, None)

    def settle(self, done: PrefixHeld | WrittenBack) -> TokenSequence | None:
        """Apply what cold memory has done. Returns the sequence that ``done.failure`` ends, if any."""
        return self.located(done) if isinstance(done, PrefixHeld) else self.written_back(done)

    def located(self, held: PrefixHeld) -> TokenSequence | None:
        """Let a sequence prefill after its stored prefix. Returns it if cold memory has no room for it."""
        seq, keys = self._holders.get(held.holder), self._asked.pop(held.holder)
        if seq is None:
            self.released(held.holder)
            return None  # it has left, and its hold is released already
        if held.failure:
            return seq
        seq.quota = held.quota
        exact = len(held.refs) - len(held.session_keys)
        refs: Iterator[SlotRef | None] = itertools.chain(held.refs[:exact], itertools.repeat(None))
        only_held = bool(held.session_keys) or self._snapshots.layout is not None
        for key, ref in zip(keys[:exact] if only_held else keys, refs, strict=False):
            slot = self._pool.lookup(key)
            if ref is None and slot is None:
                break
            chunk = seq.complete_chunk(key)
            if ref is not None:
                seq.stored_at(chunk, ref)
            elif slot is not None:
                # hot, and still being written back: it must stay hot until cold memory holds it for this sequence too
                self._pool.mark_dirty(slot)
                self._prefetcher.write_back(seq.holder, key, slot)
        for key, ref in zip(held.session_keys, held.refs[exact:], strict=True):
            seq.stored_at(seq.complete_chunk(key, exact=False), ref)
        self._snapshots.resume(seq, held.state)
        seq.num_computed = len(seq.chunks) * seq.chunk_tokens
        seq.state = State.PREFILL
        if seq.counters.admitted_s is None:
            seq.counters.admitted_s = time.perf_counter()
            seq.counters.locate_s = seq.counters.admitted_s - seq.counters.locating_s
            seq.counters.cached_tokens = seq.num_computed
            self._counters.prefix_queried_tokens += seq.prompt_len
            self._counters.prefix_hit_tokens += seq.num_computed
        return None

    def computed(self, seq: TokenSequence, tokens: int, *, checked: bool = True) -> None:
        """Count ``tokens`` more of ``seq`` as computed, and write back the chunks that they complete.

        ``checked``: the host has read that the tokens are finite. Else their chunks are held back until :meth:`show`.
        """
        seq.num_computed += tokens
        while seq.tail_tokens >= seq.chunk_tokens:
            number = len(seq.chunks)
            chunk = seq.complete_chunk()
            slot = seq.open_slots.pop(number)
            if checked:
                self._pool.complete(slot, chunk.key, dirty=True)
                self._store(seq, chunk, slot)
            else:
                self._pool.hold_back(slot)
                seq.held_back[number] = slot
                self._held_back[seq] = None
            if seq.state is State.DECODE and not seq.residency.streamed:
                seq.residency.slots[number] = slot
                seq.residency.version += 1
            else:
                self._pool.release(slot)

    def show(self) -> None:
        """The chunks that are held back are finite: let others find them, and write them back."""
        for seq in self._held_back:
            for number, slot in seq.held_back.items():
                self._pool.show(slot, seq.chunks[number].key)
                self._store(seq, seq.chunks[number], slot)
            seq.held_back.clear()
        self._held_back.clear()

    def withhold(self, seq: TokenSequence, *, wipe: bool = False) -> None:
        """Drop what is held back of ``seq``, which leaves or starts over, so that no sequence finds it.

        ``wipe``: it may not be finite, like what is in the open chunks; zero both.
        """
        if wipe:
            self._pool.wipe([*seq.held_back.values(), *seq.open_slots.values()])
        for slot in seq.held_back.values():
            self._pool.mark_clean(slot)
        seq.held_back.clear()
        self._held_back.pop(seq, None)

    def _store(self, seq: TokenSequence, chunk: Chunk, slot: int) -> None:
        self._prefetcher.write_back(seq.holder, chunk.key, slot)
        self._snapshots.completed(seq, chunk)

    def written_back(self, done: WrittenBack) -> TokenSequence | None:
        """A write-back has ended. Returns its sequence if the chunk could not be stored: it can't go on without."""
        self._pool.mark_clean(done.slot)
        seq = self._holders.get(done.holder)
        if done.ref is None:
            # the slot stays in the pool: other sequences with this prefix may read it, and store it themselves
            return None if seq is None or seq.state is State.FINISHED else seq
        self._counters.written_back_chunks += 1
        self._counters.written_back_bytes += done.written_bytes
        self._counters.write_back_s += done.duration_s
        if seq is not None and done.key in seq.chunk_of:
            seq.stored_at(seq.chunk_of[done.key], done.ref)
        return None

    def lost(self, seq: TokenSequence, damaged: list[int]) -> int:
        """How many chunks of ``seq`` can't be read any more.

        These are the ``damaged`` ones, which cold memory drops, and those that are no longer where they were held: a
        tier that restarts knows no holds.
        """
        for number in damaged:
            chunk = seq.chunks[number]
            if chunk.ref is not None:
                self._prefetcher.drop(chunk.key, chunk.ref)
        slots, generations = seq.refs()
        stored = slots >= 0
        now = self._arena.generation(slots[stored])
        return len(damaged) + int((now != generations[stored].astype(np.uint64)).sum())

    def damaged_records(self, seq: TokenSequence, numbers: tuple[int, ...]) -> int:
        """How many of the chunks ``numbers`` of ``seq`` have a damaged index record; cold memory drops these chunks.

        Only chunks whose record the indexer could not score are passed here.
        """
        stored = [(number, ref) for number in numbers if (ref := seq.chunks[number].ref) is not None]
        slots = np.array([ref.slot for _, ref in stored], np.int64)
        generations = np.array([ref.generation for _, ref in stored], np.int64)
        # a slot that another chunk has got since is not damage: the recall of this chunk finds that it is gone
        held = self._arena.generation(slots) == generations.astype(np.uint64)
        damaged = np.flatnonzero(held & ~self._arena.sound_records(slots, generations)).tolist()
        for row in damaged:
            number, ref = stored[row]
            self._prefetcher.drop(seq.chunks[number].key, ref)
        return len(damaged)

    def record_session(self, seq: TokenSequence, reason: FinishReason) -> None:
        """Record the chunks of ``seq`` for its session, so that the next request continues them, if it was answered."""
        if seq.cache.session_id is not None and reason in ("stop", "length"):
            state = self._snapshots.ended(seq)
            self._prefetcher.record_session(seq.cache.session_id, [chunk.key for chunk in seq.chunks], state)

    def release(self, seq: TokenSequence) -> None:
        """Release every slot and hold of ``seq``. Not while a copy into its slots runs."""
        self._windows.forget(seq)
        self.withhold(seq)
        for slot in itertools.chain(seq.residency.slots.values(), seq.open_slots.values()):
            self._pool.release(slot)
        seq.residency.slots.clear()
        seq.open_slots.clear()
        seq.residency.version += 1
        for chunk in seq.chunks:
            if not chunk.exact and seq.cache.session_id is None:
                self._pool.discard(chunk.key)
        if self._holders.pop(seq.holder, None) is not None:
            self._releasing[seq.holder] = seq.slots_here(self._arena.slots)
        self._prefetcher.release_holder(seq.holder)
