"""The window cycle of design §5: when a sequence's resident set is predicted, recalled and swapped.

A turn belongs to a boundary. Its prediction is asked some steps ahead; its copies run while decoding goes on over the
old set; at the boundary, between two steps, the new set takes over. What comes late takes over when it is there.
"""

import logging
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forecache.indexer.config import SelectionConfig
from forecache.indexer.protocol import Indexer, Prediction, PredictRequest
from forecache.indexer.selection import budget_chunks, select
from forecache.workers.decode.config import EngineConfig
from forecache.workers.decode.sequence import Sequence, State
from forecache.workers.decode.step import Capture, Captured
from forecache.workers.memory.arena import Arena
from forecache.workers.memory.hot_pool import HotPool
from forecache.workers.memory.prefetcher import Prefetcher, Recalled, RecallItem

logger = logging.getLogger(__name__)

FIRST_BOUNDARY = 2
"""Decode steps before the first swap: the first gives the first answer token's queries, the second hides the copy."""


@dataclass
class Turn:
    """A resident set in the making, for the first ``chunks`` chunks of a sequence.

    ``future`` is the prediction while it is awaited. Then ``selected`` are the chosen chunks, and ``wanted`` those of
    them that the old set lacks, until the pool has slots for all; then they are in ``incoming`` with their slots,
    referenced in the pool, and ``ticket`` names the recall that fills ``copying``.
    """

    boundary: int
    chunks: int
    future: Future[Prediction] | None = None
    selected: frozenset[int] | None = None
    incoming: dict[int, int] = field(default_factory=dict)
    copying: list[RecallItem] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    ticket: int | None = None

    @property
    def ready(self) -> bool:
        return self.selected is not None and not self.wanted and self.ticket is None


class WindowCycle:
    """Turns of all sequences of one engine. Runs in the engine's thread.

    ``spare`` tells how many slots of the pool no sequence was promised: a turn may borrow them.
    """

    def __init__(
        self,
        config: EngineConfig,
        selection: SelectionConfig,
        pool: HotPool,
        arena: Arena,
        prefetcher: Prefetcher,
        indexer: Indexer,
        spare: Callable[[], int],
    ) -> None:
        self._config = config
        self._selection = selection
        self._pool = pool
        self._arena_path = str(arena.path)
        self._prefetcher = prefetcher
        self._indexer = indexer
        self._spare = spare
        self._turns: dict[Sequence, Turn] = {}
        self._boundaries: dict[Sequence, int] = {}
        # boundaries whose queries a step under way will bring, and when sequences began to wait
        self._asked: dict[Sequence, int] = {}
        self._waits_since: dict[Sequence, float] = {}

    def budget(self, seq: Sequence, chunks: int) -> int:
        """Chunks of ``seq`` that may be resident when it has ``chunks``."""
        if seq.policy == "full":
            return chunks
        return budget_chunks(chunks, seq.keep_ratio, self._selection)

    def widest_table(self, max_tokens: int) -> int:
        """Most slots that a decode step of a sequence of ``max_tokens`` reads, at the configured keep ratio: the set,
        and what was completed since it was chosen, which was up to two windows ago."""
        config = self._config
        budget = budget_chunks(-(-max_tokens // config.chunk_tokens), config.keep_ratio, self._selection)
        return min(budget + 2 * (config.window_steps // config.chunk_tokens) + 4, self._pool.num_slots)

    def begin(self, seq: Sequence, mass: npt.NDArray[np.float32] | None) -> None:
        """Prefill is over: choose the first set from the last prompt tokens' attention ``mass`` [chunks].

        ``None`` will do where scores do not matter: for other policies, and when everything is kept.
        """
        self._boundaries[seq] = FIRST_BOUNDARY
        turn = Turn(boundary=0, chunks=len(seq.chunks))
        self._turns[seq] = turn
        self._choose(seq, turn, None if mass is None else mass[: len(seq.chunks)])

    def capture(self, row: int, seq: Sequence) -> Capture | None:
        """What a prediction for ``seq`` needs of the coming step, in which it is row ``row``; ``None``: nothing."""
        if seq.policy != "lookahead" or not self._due(seq):
            return None
        ref_slots, generations = (array.copy() for array in seq.refs())
        local = []
        for number in np.flatnonzero(ref_slots < 0).tolist():
            hot = self._pool.lookup(seq.chunks[number].key)
            assert hot is not None, f"chunk {number} of {seq.request_id} is neither hot nor in the arena"
            local.append(hot)
        self._asked[seq] = self._boundaries[seq]
        return Capture(
            row,
            seq,
            restarts=seq.restarts,
            boundary=self._boundaries[seq],
            tail_slot=seq.open_slots[len(seq.chunks)],
            tail_tokens=seq.tail_tokens + 1,
            local_slots=tuple(local),
            ref_slots=ref_slots,
            generations=generations,
        )

    def stepped(self, seq: Sequence) -> None:
        """A decode step of ``seq`` was launched: policies that need no prediction choose, when it is time."""
        seq.decode_steps += 1
        if seq.policy != "lookahead" and self._due(seq, done=True):
            self._turns[seq] = Turn(self._boundaries[seq], len(seq.chunks))
            self._choose(seq, self._turns[seq], None)

    def captured(self, captured: Captured) -> None:
        """Ask for the next turn's prediction, with what was captured for it."""
        request, seq = captured.request, captured.request.sequence
        if seq.state is not State.DECODE or seq.restarts != request.restarts:
            return
        if seq in self._turns or self._boundaries[seq] != request.boundary:
            return  # an earlier step's capture was the one
        self._asked.pop(seq, None)
        turn = Turn(request.boundary, request.chunks)
        turn.future = self._indexer.predict(
            PredictRequest(
                sequence_id=seq.request_id,
                arena_path=self._arena_path,
                index_slots=request.ref_slots,
                generations=request.generations,
                queries=captured.queries,
                local_lse=captured.tail_lse,
                local_records=captured.records,
            )
        )
        turn.future.add_done_callback(lambda _: self._prefetcher.wake())
        self._turns[seq] = turn

    def poll(self, seq: Sequence) -> None:
        """At a step's edge: take an answered prediction further, swap a set whose boundary is here."""
        turn = self._turns.get(seq)
        if turn is None:
            return
        if turn.future is not None and turn.future.done():
            scores = self._scores(seq, turn, turn.future)
            turn.future = None
            self._choose(seq, turn, scores)
        if turn.wanted:
            self._bring_in(seq, turn)
        if turn.ready and seq.decode_steps >= turn.boundary:
            self._swap(seq, turn)

    def blocked(self, seq: Sequence) -> bool:
        """Whether ``seq`` must not step now: its first set is not there, or it waits for a late one.

        By default it waits a little in its first window, where most answers begin, and later not at all.
        """
        turn = self._turns.get(seq)
        boundary = self._asked.get(seq) if turn is None else turn.boundary
        if boundary is None or seq.decode_steps < boundary:
            return False
        if boundary == 0 or self._config.late_policy == "wait":
            return True
        if boundary > self._config.window_steps:
            return False
        now = time.perf_counter()
        return now - self._waits_since.setdefault(seq, now) < self._config.early_wait_s

    def recalled(self, done: Recalled) -> Sequence | None:
        """A recall is over. Returns the sequence it was for when chunks of it were lost."""
        for seq, turn in self._turns.items():
            if turn.ticket == done.ticket:
                turn.ticket = None
                for item in turn.copying:
                    if item not in done.lost:
                        self._pool.complete(item.slot, item.key, dirty=False)
                return seq if done.lost else None
        return None

    def forget(self, seq: Sequence) -> None:
        """``seq`` is leaving: give back the slots of a turn in the making. Not while it is :meth:`busy`."""
        turn = self._turns.pop(seq, None)
        self._boundaries.pop(seq, None)
        self._asked.pop(seq, None)
        self._waits_since.pop(seq, None)
        if turn is not None:
            if turn.future is not None:
                turn.future.cancel()
            for slot in turn.incoming.values():
                self._pool.release(slot)

    def busy(self, seq: Sequence) -> bool:
        """Whether a copy into slots of ``seq`` is running."""
        turn = self._turns.get(seq)
        return turn is not None and turn.ticket is not None

    def incoming(self, seq: Sequence) -> list[int]:
        """Slots referenced for a set in the making."""
        turn = self._turns.get(seq)
        return [] if turn is None else list(turn.incoming.values())

    def _due(self, seq: Sequence, *, done: bool = False) -> bool:
        """Whether the step that is coming (or, with ``done``, was just made) is the one to ask after."""
        if seq.streamed or seq in self._turns or self.budget(seq, seq.max_chunks) >= seq.max_chunks:
            return False
        boundary = self._boundaries[seq]
        previous = boundary // 2 if boundary <= self._config.window_steps else boundary - self._config.window_steps
        ask = max(previous, boundary - self._config.lead_steps)
        return seq.decode_steps + (0 if done else 1) >= ask

    def _scores(self, seq: Sequence, turn: Turn, future: Future[Prediction]) -> npt.NDArray[np.float32]:
        """What was predicted. A prediction is a hint: without it the old set serves on, within the budget."""
        error = future.exception()
        if error is None:
            scores = future.result().scores
            if np.isfinite(scores).all():
                return scores
            error = ValueError("a score is not finite")
        logger.warning("no prediction for %s, its resident set stays: %s", seq.request_id, error)
        seq.counters.failed_predictions += 1
        return np.array([number in seq.resident for number in range(turn.chunks)], dtype=np.float32)

    def _choose(self, seq: Sequence, turn: Turn, scores: npt.NDArray[np.float32] | None) -> None:
        """Choose the set of ``turn`` by ``scores`` [chunks], as far as the sequence's reserved slots go."""
        rng = np.random.default_rng([self._config.seed % 2**32, seq.sampling.seed % 2**32, seq.decode_steps])
        chosen = select(
            scores,
            policy=seq.policy,
            chunks=turn.chunks,
            budget=self.budget(seq, turn.chunks),
            config=self._selection,
            rng=rng,
        ).tolist()
        wanted = [number for number in chosen if number not in seq.resident]
        if scores is not None and len(scores):
            wanted.sort(key=lambda number: -scores[number])
        # the tokens up to the boundary need slots too, before the swap gives any back
        tail = seq.tail_tokens + max(turn.boundary - seq.decode_steps, 0) + 1
        filling = max(len(seq.open_slots), -(-tail // seq.chunk_tokens))
        room = max(seq.reserved_slots + self._spare() - len(seq.resident) - filling, 0)
        turn.selected = frozenset(chosen) - frozenset(wanted[room:])
        turn.wanted = wanted[:room]
        self._bring_in(seq, turn)

    def _bring_in(self, seq: Sequence, turn: Turn) -> None:
        """Take the wanted chunks that are hot, and start the recall of the others, most wanted first.

        Does nothing while the pool lacks slots: the reservation says that they will be there once others' completed
        chunks are in cold memory.
        """
        cold = [number for number in turn.wanted if self._pool.lookup(seq.chunks[number].key) is None]
        if len(cold) > self._pool.available - (len(turn.wanted) - len(cold)):
            return
        for number in turn.wanted:
            slot = self._pool.lookup(seq.chunks[number].key)
            if slot is not None:
                turn.incoming[number] = self._pool.acquire(slot)
        for number in cold:
            chunk, slot = seq.chunks[number], self._pool.allocate()
            assert slot is not None and chunk.ref is not None
            turn.incoming[number] = slot
            turn.copying.append(RecallItem(chunk.key, chunk.ref, slot))
        turn.wanted = []
        seq.counters.recalled_chunks += len(turn.copying)
        if turn.copying:
            turn.ticket = self._prefetcher.recall(turn.copying)

    def _swap(self, seq: Sequence, turn: Turn) -> None:
        """The new set takes over; chunks completed since it was chosen stay."""
        assert turn.selected is not None
        for number in [n for n in seq.resident if n < turn.chunks and n not in turn.selected]:
            self._pool.release(seq.resident.pop(number))
        seq.resident.update(turn.incoming)
        seq.table_version += 1
        turn.incoming = {}
        if turn.boundary:
            seq.counters.windows += 1
            seq.counters.late_windows += seq.decode_steps > turn.boundary
        self._finish(seq, turn)
        if seq.state is State.RECALLING:
            seq.state = State.DECODE

    def _finish(self, seq: Sequence, turn: Turn) -> None:
        """Drop the turn and set the next boundary: doubling up to a window, then window by window, staggered."""
        del self._turns[seq]
        self._waits_since.pop(seq, None)
        if turn.boundary == 0:
            return
        window = self._config.window_steps
        following = turn.boundary * 2 if turn.boundary * 2 <= window else turn.boundary + window
        if turn.boundary * 2 > window >= turn.boundary:
            # once, at the end of the early boundaries, so that sequences that started together part
            prompt = np.asarray(seq.token_ids[: seq.prompt_len], dtype="<i4")  # all of it: beginnings are often equal
            following -= zlib.crc32(prompt.tobytes()) % max(window // 2, 1)
        self._boundaries[seq] = max(following, seq.decode_steps + 1)
