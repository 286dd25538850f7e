"""The window cycle (docs/architecture.md): when a sequence's resident set is predicted, recalled and swapped.

A turn belongs to a boundary. Its prediction is asked some steps ahead; its copies run while decoding goes on over the
old set; at the boundary, between two steps, the new set takes over. What comes late takes over when it is there.
"""

import logging
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from forecache.indexer.records.scores import EVENT_SHARE
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.indexer.serving.selection import select
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import ChunkView
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Capture, Captured
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.hot.completions import Recalled, RecallItem
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.residency.budgets import Budgets, mask_of
from forecache.workers.residency.captures import make_capture
from forecache.workers.residency.chunk_view import chunk_view
from forecache.workers.residency.early_scores import EarlyScores
from forecache.workers.residency.pending_set import Turn

logger = logging.getLogger(__name__)

PROBE_TOKENS = 32
"""Last prompt tokens whose attention chooses the first resident set: the question and a chat template's end."""
FIRST_BOUNDARY = 2
"""Decode steps before the first swap: the first gives the first answer token's queries, the second hides the copy."""
STREAMED_SLOTS = 2
"""Hot slots of a decoding sequence whose past is streamed: the chunk that fills, and one that is written back."""


class WindowCycle:
    """Turns of all sequences of one engine. Runs in the engine's thread.

    ``spare`` tells how many slots of the pool no sequence was promised: a turn may borrow them. ``history_steps``: of
    how many steps, the newest included, a prediction wants queries. The first sets ask ``fresh_tokens`` of a prompt.
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
        history_steps: int = 1,
    ) -> None:
        self.budgets = Budgets(config, selection, pool.num_slots, spare)
        self._config = config
        self._selection = selection
        self._pool = pool
        self._arena_path = str(arena.path)
        self._prefetcher = prefetcher
        self._indexer = indexer
        self._spare = spare
        self._history_steps = history_steps
        self.fresh_tokens = max(PROBE_TOKENS, history_steps)
        self._turns: dict[TokenSequence, Turn] = {}
        self._early_scores = EarlyScores()
        self._boundaries: dict[TokenSequence, int] = {}
        # boundaries whose queries a step under way will bring, and when sequences began to wait
        self._asked: dict[TokenSequence, int] = {}
        self._waits_since: dict[TokenSequence, float] = {}

    def begin(self, seq: TokenSequence, mass: npt.NDArray[np.float32] | None, *, retrieval_heads: bool) -> None:
        """Prefill is over: choose the first set from the last prompt tokens' attention ``mass`` [chunks].

        ``None`` will do where scores do not matter: for other policies, and when everything is kept.
        ``retrieval_heads``: it is that of the model's retrieval heads.
        """
        self._boundaries[seq] = FIRST_BOUNDARY
        turn = self._turns[seq] = Turn(boundary=0, chunks=len(seq.chunks))
        scores = None if mass is None else mass[: turn.chunks]
        events = None
        if scores is not None and retrieval_heads:
            events = np.where(scores >= EVENT_SHARE, scores, np.float32(0))  # of one head, not of all together
        self._choose(seq, turn, scores, events)

    def capture(self, row: int, seq: TokenSequence) -> Capture | None:
        """What a prediction for ``seq`` needs of the coming step, in which it is row ``row``; ``None``: nothing."""
        if seq.policy != "lookahead" or not self._due(seq):
            return None
        return make_capture(row, seq, self._boundaries[seq], self._pool, self._history_steps)

    def stepped(self, seq: TokenSequence) -> None:
        """A decode step of ``seq`` was launched: queries will come, or policies without predictions choose, if due."""
        seq.decode_steps += 1
        if not self._due(seq, done=True):
            return
        if seq.policy == "lookahead":
            self._asked[seq] = self._boundaries[seq]
        else:
            self._turns[seq] = Turn(self._boundaries[seq], len(seq.chunks))
            self._choose(seq, self._turns[seq], None)

    def captured(self, captured: Captured) -> None:
        """Ask for the next turn's prediction, with what was captured for it."""
        request, seq = captured.request, captured.request.sequence
        if seq.state is not State.DECODE or seq.streamed or seq.restarts != request.restarts:
            return
        if seq in self._turns or self._boundaries[seq] != request.boundary:
            return  # an earlier step's capture was the one
        self._asked.pop(seq, None)
        turn = Turn(request.boundary, request.chunks, request.resident)
        turn.future = self._indexer.predict(
            PredictRequest(
                sequence_id=seq.request_id,
                arena_path=self._arena_path,
                index_slots=request.ref_slots,
                generations=request.generations,
                queries=captured.queries,
                local_lse=captured.tail_lse,
                local_records=captured.records,
                state=captured.state,
                weights=captured.weights,
            )
        )
        turn.future.add_done_callback(lambda _: self._prefetcher.wake())
        self._turns[seq] = turn

    def poll(self, seq: TokenSequence) -> tuple[int, ...]:
        """At a step's edge: take an answered prediction further, swap a set whose boundary is here. Returns the numbers
        of chunks whose index records the prediction could not read, or not as they were stored."""
        if (turn := self._turns.get(seq)) is None:
            return ()
        missing: tuple[int, ...] = ()
        if turn.future is not None and turn.future.done():
            missing = self._answered(seq, turn, turn.future)
            if seq.streamed:
                return missing
        if turn.wanted:
            self._bring_in(seq, turn)
        if turn.ready and (turn.urgent or seq.decode_steps >= turn.boundary):
            self._swap(seq, turn)
        return missing

    def blocked(self, seq: TokenSequence) -> bool:
        """Whether ``seq`` must not step now: its first set is not there, or it waits for a late one.

        By default it waits a little in its first window, where most answers begin, and later not at all.
        """
        turn = self._turns.get(seq)
        boundary = self._asked.get(seq) if turn is None else turn.boundary
        if boundary is None:
            return False
        early, waits = boundary <= self.budgets.window_steps(seq), self._config.late_policy == "wait"
        due = seq.decode_steps >= boundary or (turn is not None and turn.urgent)
        if waits and early and self._config.fallback and (turn is None or turn.future is not None):
            due = True  # what is awaited may be urgent: the step at which that is known must not depend on time
        if not due:
            return False
        if boundary == 0 or waits:
            return True
        if not early:
            return False
        now = time.perf_counter()
        return now - self._waits_since.setdefault(seq, now) < self._config.early_wait_s

    def recalled(self, done: Recalled) -> TokenSequence | None:
        """A recall is over. Returns the sequence it was for when chunks of it were lost."""
        for seq, turn in self._turns.items():
            if turn.ticket == done.ticket:
                turn.ticket = None
                for item in turn.copying:
                    if item not in done.lost:
                        self._pool.complete(item.slot, item.key, dirty=False)
                return seq if done.lost else None
        return None

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` is leaving: give back the slots of a turn in the making. Not while it is :meth:`busy`."""
        turn = self._turns.pop(seq, None)
        self._early_scores.forget(seq)
        self._boundaries.pop(seq, None)
        self._asked.pop(seq, None)
        self._waits_since.pop(seq, None)
        if turn is not None:
            if turn.future is not None:
                turn.future.cancel()
            for slot in turn.incoming.values():
                self._pool.release(slot)

    def view(self, seq: TokenSequence) -> ChunkView | None:
        """Where its chunks are, for those who watch."""
        return chunk_view(seq, self._pool, self._turns.get(seq))

    def busy(self, seq: TokenSequence) -> bool:
        """Whether a copy into slots of ``seq`` is running."""
        turn = self._turns.get(seq)
        return turn is not None and turn.ticket is not None

    def incoming(self, seq: TokenSequence) -> list[int]:
        """Slots referenced for a set in the making."""
        turn = self._turns.get(seq)
        return [] if turn is None else list(turn.incoming.values())

    def _due(self, seq: TokenSequence, *, done: bool = False) -> bool:
        """Whether the step that is coming (or, with ``done``, was just made) is the one to ask after."""
        if seq.streamed or seq in self._turns or self.budgets.first(seq, seq.max_chunks) >= seq.max_chunks:
            return False  # no other set is to be chosen, or one is being
        boundary = self._boundaries[seq]
        window = self.budgets.window_steps(seq)
        previous = boundary // 2 if boundary <= window else boundary - window
        lead = max(self._config.lead_steps, self._config.remote_lead_steps if seq.remote_chunks else 0)
        return seq.decode_steps + (0 if done else 1) >= max(previous, boundary - lead)

    def _answered(self, seq: TokenSequence, turn: Turn, future: Future[Prediction]) -> tuple[int, ...]:
        """Take in what was predicted, and return what it had no records of. A prediction is a hint: without it the old
        set serves on, within the budget."""
        turn.future = None
        error = future.exception()
        if error is None and not np.isfinite(future.result().scores).all():
            error = ValueError("a score is not finite")
        if error is not None:
            logger.warning("no prediction for %s, its resident set stays: %s", seq.request_id, error)
            seq.counters.failed_predictions += 1
            kept = np.array([number in seq.resident for number in range(turn.chunks)], dtype=np.float32)
            self._choose(seq, turn, kept)
            return ()
        prediction = future.result()
        if prediction.event_mass is not None:
            self._follow(seq, turn, prediction.event_mass)
        if not seq.streamed:
            scores = self._early_scores.largest(seq, prediction.scores, turn.boundary, self.budgets.window_steps(seq))
            self._choose(seq, turn, scores, prediction.event_mass)
        return prediction.missing

    def _follow(self, seq: TokenSequence, turn: Turn, event_mass: npt.NDArray[np.float32]) -> None:
        """Let the budget of ``seq`` follow its coverage at the step that ``turn`` was asked after."""
        assert turn.resident is not None, "only what was asked for is answered"
        if not self.budgets.too_low(self.budgets.observe(seq, event_mass, turn.resident)):
            self.budgets.narrow(seq, event_mass)
            return
        turn.urgent = turn.boundary <= self.budgets.window_steps(seq)
        if self.budgets.streams(seq):
            self._stream(seq)
        else:
            self.budgets.widen(seq)

    def _stream(self, seq: TokenSequence) -> None:
        """From now on ``seq`` attends to its whole past where that lies: everything does not fit the pool."""
        seq.counters.fallbacks += 1
        seq.streamed = True
        seq.reserved_slots = min(seq.reserved_slots, STREAMED_SLOTS)
        self.forget(seq)
        for slot in seq.resident.values():
            self._pool.release(slot)
        seq.resident.clear()
        seq.table_version += 1

    def _choose(
        self,
        seq: TokenSequence,
        turn: Turn,
        scores: npt.NDArray[np.float32] | None,
        event_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Choose the set of ``turn`` by ``scores`` [chunks], as far as the sequence's reserved slots go.

        While that is too small for the ``event_mass`` [chunks] that it is chosen by, the budget doubles.
        """
        chosen = self._select(seq, turn, scores, seq.widening)
        while event_mass is not None and self.budgets.misses(seq, event_mass, chosen):
            if self.budgets.streams(seq) or not self.budgets.widen(seq):
                break
            chosen = self._select(seq, turn, scores, seq.widening)
        if seq.widening > 1:
            seq.half_set = mask_of(self._select(seq, turn, scores, seq.widening // 2), turn.chunks)
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

    def _select(
        self, seq: TokenSequence, turn: Turn, scores: npt.NDArray[np.float32] | None, widening: int
    ) -> list[int]:
        """The chunks of ``turn`` with the first budget of ``seq`` times ``widening``."""
        chosen: list[int] = select(
            scores,
            policy=seq.policy,
            chunks=turn.chunks,
            budget=min(self.budgets.first(seq, turn.chunks) * widening, turn.chunks),
            config=self._selection,
            rng=np.random.default_rng([self._config.seed % 2**32, seq.sampling.seed % 2**32, seq.decode_steps]),
        ).tolist()
        return chosen

    def _bring_in(self, seq: TokenSequence, turn: Turn) -> None:
        """Take the wanted chunks that are hot, and start the recall of the others, most wanted first.

        Does nothing while the pool lacks slots: the reservation says that they will be there once others' completed
        chunks are in cold memory.
        """
        cold = [number for number in turn.wanted if self._hot_slot(seq, number) is None]
        if len(cold) > self._pool.available - (len(turn.wanted) - len(cold)):
            return
        for number in turn.wanted:
            if (slot := self._hot_slot(seq, number)) is not None:
                turn.incoming[number] = self._pool.acquire(slot)
        for number in cold:
            chunk, slot = seq.chunks[number], self._pool.allocate()
            assert slot is not None and chunk.ref is not None
            turn.incoming[number] = slot
            turn.copying.append(RecallItem(chunk.key, chunk.ref, slot))
        turn.wanted = []
        seq.counters.recalled_chunks += len(turn.copying)
        if turn.copying:
            turn.ticket = self._prefetcher.recall(turn.copying, seq.holder)

    def _hot_slot(self, seq: TokenSequence, number: int) -> int | None:
        """Where chunk ``number`` of ``seq`` is hot."""
        slot = seq.held_back.get(number)
        return self._pool.lookup(seq.chunks[number].key) if slot is None else slot

    def _swap(self, seq: TokenSequence, turn: Turn) -> None:
        """The new set takes over; chunks completed since it was chosen stay."""
        assert turn.selected is not None
        for number in [n for n in seq.resident if n < turn.chunks and n not in turn.selected]:
            self._pool.release(seq.resident.pop(number))
        seq.resident.update(turn.incoming)
        seq.table_version += 1
        turn.incoming = {}
        self.budgets.swapped(seq)
        if turn.boundary:
            seq.counters.windows += 1
            seq.counters.late_windows += seq.decode_steps > turn.boundary
        self._finish(seq, turn)
        if seq.state is State.RECALLING:
            seq.state = State.DECODE

    def _finish(self, seq: TokenSequence, turn: Turn) -> None:
        """Drop the turn and set the next boundary: doubling up to a window, then window by window, staggered."""
        del self._turns[seq]
        self._waits_since.pop(seq, None)
        if turn.boundary == 0:
            return
        window = self.budgets.window_steps(seq)
        following = turn.boundary * 2 if turn.boundary * 2 <= window else turn.boundary + window
        if turn.boundary * 2 > window >= turn.boundary:
            # once, at the end of the early boundaries, so that sequences that started together part
            prompt = np.asarray(seq.token_ids[: seq.prompt_len], dtype="<i4")  # all of it: beginnings are often equal
            following -= zlib.crc32(prompt.tobytes()) % max(window // 2, 1)
        self._boundaries[seq] = max(following, seq.decode_steps + 1)
