"""The window cycle (docs/architecture.md): when a sequence's resident set is predicted, recalled and swapped.

Each boundary, a decode step, has a pending set. Its prediction is requested some steps ahead; its copies run while
decoding goes on over the current set; at the boundary, between two steps, it takes over. A late set takes over when it
is ready.
"""

import logging
import time
import zlib
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from forecache.indexer.records.scores import EVENT_SHARE
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.indexer.serving.selection import select
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import ChunkView
from forecache.workers.core.residency import PendingSet
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Capture, Captured
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.hot.completions import Recalled, RecallItem
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.residency.budgets import Budgets, Reservations, mask_of
from forecache.workers.residency.chunk_view import chunk_view

logger = logging.getLogger(__name__)

PROBE_TOKENS = 32
"""Last prompt tokens whose attention chooses the first resident set: the question and a chat template's end."""
STREAMED_SLOTS = 2
"""Hot slots of a decoding sequence that is streamed: the open chunk, and one that is written back."""


class WindowCycle:
    """Chooses, copies and swaps the resident sets of one engine's sequences. Belongs to the engine's thread.

    Args:
        reservations: hot slots of the running sequences; a pending set may borrow slots that are spare.
        history_steps: decode steps, the newest included, whose queries a prediction uses.
    """

    def __init__(
        self,
        config: EngineConfig,
        selection: SelectionConfig,
        pool: HotPool,
        arena: Arena,
        prefetcher: Prefetcher,
        indexer: Indexer,
        reservations: Reservations,
        history_steps: int = 1,
    ) -> None:
        self.budgets = Budgets(config, selection, reservations)
        self._config = config
        self._selection = selection
        self._pool = pool
        self._arena_path = str(arena.path)
        self._prefetcher = prefetcher
        self._indexer = indexer
        self._history_steps = history_steps
        self.fresh_tokens = max(PROBE_TOKENS, history_steps)
        """Tokens at a prompt's end that are computed even where they are stored: they choose the first sets."""
        self._recalling: dict[int, TokenSequence] = {}  # by the recall's ticket

    def begin(self, seq: TokenSequence, mass: npt.NDArray[np.float32] | None, *, retrieval_heads: bool) -> None:
        """Choose the first set of ``seq``, whose prefill has ended.

        Args:
            mass: float32 [chunks], attention of the last prompt tokens; ``None`` where scores do not matter: for
                policies that predict nothing, and where all chunks are kept.
            retrieval_heads: ``mass`` is that of the model's retrieval heads.
        """
        pending = seq.residency.pending = PendingSet(boundary=0, chunks=len(seq.chunks))
        scores = None if mass is None else mass[: pending.chunks]
        events = None
        if scores is not None and retrieval_heads:
            events = np.where(scores >= EVENT_SHARE, scores, np.float32(0))  # the largest of one head, not a sum
        self._choose(seq, pending, scores, events)

    def capture(self, row: int, seq: TokenSequence) -> Capture | None:
        """What the coming step, with ``seq`` as decode row ``row``, captures for a prediction; ``None``: nothing."""
        if seq.policy != "lookahead" or not self._due(seq):
            return None
        return make_capture(row, seq, seq.residency.boundary, self._pool, self._history_steps)

    def stepped(self, seq: TokenSequence) -> None:
        """Count a launched decode step of ``seq``. If a set is due, a policy without predictions chooses it now."""
        residency = seq.residency
        residency.decode_steps += 1
        if not self._due(seq, done=True):
            over = residency.decode_steps >= residency.boundary
            if over and residency.pending is None and self._outgrows_budget(seq) and self._keeps_all(seq):
                residency.boundary = self._following(seq, residency.boundary)
            return
        if seq.policy == "lookahead":
            residency.awaited_boundary = residency.boundary
        else:
            residency.pending = PendingSet(residency.boundary, len(seq.chunks))
            self._choose(seq, residency.pending, None)

    def captured(self, captured: Captured) -> None:
        """Request the prediction for which a step has captured queries."""
        request, seq = captured.request, captured.request.sequence
        residency = seq.residency
        if seq.state is not State.DECODE or residency.streamed or seq.restarts != request.restarts:
            return
        if residency.pending is not None or residency.boundary != request.boundary:
            return  # an earlier step captured for the same boundary
        residency.awaited_boundary = None
        pending = PendingSet(request.boundary, request.chunks, request.resident)
        pending.future = self._indexer.predict(
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
        pending.future.add_done_callback(lambda _: self._prefetcher.wake())
        residency.pending = pending

    def poll(self, seq: TokenSequence) -> tuple[int, ...]:
        """Between two steps: use a prediction that has arrived, and swap sets at a boundary.

        Returns the chunks whose index records the indexer could not read, or read damaged.
        """
        residency = seq.residency
        if (pending := residency.pending) is None:
            return ()
        missing: tuple[int, ...] = ()
        if pending.future is not None and pending.future.done():
            missing = self._predicted(seq, pending, pending.future)
            if residency.streamed:
                return missing
        if pending.wanted:
            self._bring_in(seq, pending)
        if pending.ready and (pending.urgent or residency.decode_steps >= pending.boundary):
            self._swap(seq, pending)
        return missing

    def blocked(self, seq: TokenSequence) -> bool:
        """Whether ``seq`` must not step now: it has no first set yet, or it waits for a late set.

        By default a sequence waits briefly in its first window, where most answers begin, and not at all later.
        """
        residency = seq.residency
        pending = residency.pending
        boundary = residency.awaited_boundary if pending is None else pending.boundary
        if boundary is None:
            return False
        early, waits = boundary <= self.budgets.window_steps(seq), self._config.late_policy == "wait"
        due = residency.decode_steps >= boundary or (pending is not None and pending.urgent)
        if waits and early and self._config.fallback and (pending is None or pending.future is not None):
            due = True  # the awaited set may be urgent; at which step this is known must not depend on timing
        if not due:
            return False
        if boundary == 0 or waits:
            return True
        if not early:
            return False
        now = time.perf_counter()
        if residency.waiting_since_s is None:
            residency.waiting_since_s = now
        return now - residency.waiting_since_s < self._config.early_wait_s

    def recalled(self, done: Recalled) -> TokenSequence | None:
        """A recall has ended. Returns its sequence if chunks were lost."""
        seq = self._recalling.pop(done.ticket, None)
        if seq is None:
            return None
        pending = seq.residency.pending
        assert pending is not None, "a pending set stays until its recall has ended"
        pending.ticket = None
        for item in pending.copying:
            if item not in done.lost:
                self._pool.complete(item.slot, item.key, dirty=False)
        return seq if done.lost else None

    def forget(self, seq: TokenSequence) -> None:
        """Release the pending set of ``seq``, which leaves the cycle. Not while a recall into its slots runs."""
        pending = seq.residency.drop_pending()
        if pending is not None:
            if pending.future is not None:
                pending.future.cancel()
            for slot in pending.incoming.values():
                self._pool.release(slot)

    def view(self, seq: TokenSequence) -> ChunkView | None:
        """Where the chunks of ``seq`` are; ``None`` if nothing changed, or no client watches."""
        return chunk_view(seq, self._pool)

    def _due(self, seq: TokenSequence, *, done: bool = False) -> bool:
        """Whether the coming step (with ``done``: the last one) is the one whose queries predict the next set."""
        residency = seq.residency
        if residency.streamed or residency.pending is not None:
            return False
        if not self._outgrows_budget(seq) or self._keeps_all(seq):
            return False
        boundary = residency.boundary
        window = self.budgets.window_steps(seq)
        previous = boundary // 2 if boundary <= window else boundary - window
        lead = max(self._config.lead_steps, self._config.remote_lead_steps if seq.remote_chunks else 0)
        return residency.decode_steps + (0 if done else 1) >= max(previous, boundary - lead)

    def _outgrows_budget(self, seq: TokenSequence) -> bool:
        """Whether ``seq`` may come to have more chunks than its first budget keeps."""
        return self.budgets.first(seq, seq.max_chunks) < seq.max_chunks

    def _keeps_all(self, seq: TokenSequence) -> bool:
        """Whether all chunks are resident now, and the set of the next boundary would keep them all.

        Then no set is predicted: ``seq`` may outgrow its budget only much later, or end before.
        """
        if seq.residency.streamed or seq.partial:
            return False
        chunks = (seq.prefill_target + seq.residency.boundary) // seq.chunk_tokens
        return self.budgets.first(seq, chunks) >= chunks

    def _predicted(self, seq: TokenSequence, pending: PendingSet, future: Future[Prediction]) -> tuple[int, ...]:
        """Choose the set by the prediction, and return the chunks that it has no records of.

        A prediction is a hint: if it failed, the current set stays, within the budget.
        """
        pending.future = None
        error = future.exception()
        if error is None and not np.isfinite(future.result().scores).all():
            error = ValueError("a score is not finite")
        if error is not None:
            logger.warning("no prediction for %s, its resident set stays: %s", seq.request_id, error)
            seq.counters.failed_predictions += 1
            kept = np.array([number in seq.residency.slots for number in range(pending.chunks)], dtype=np.float32)
            self._choose(seq, pending, kept)
            return ()
        prediction = future.result()
        if prediction.event_mass is not None:
            self._adjust_budget(seq, pending, prediction.event_mass)
        if not seq.residency.streamed:
            window = self.budgets.window_steps(seq)
            scores = seq.residency.keep_early_scores(prediction.scores, pending.boundary, window)
            self._choose(seq, pending, scores, prediction.event_mass)
        return prediction.missing

    def _adjust_budget(self, seq: TokenSequence, pending: PendingSet, event_mass: npt.NDArray[np.float32]) -> None:
        """Adjust the budget of ``seq`` to its coverage at the step whose queries ``pending`` uses."""
        assert pending.resident is not None, "predictions are requested with what the step read"
        if not self.budgets.too_low(self.budgets.observe(seq, event_mass, pending.resident)):
            self.budgets.narrow(seq, event_mass)
            return
        pending.urgent = pending.boundary <= self.budgets.window_steps(seq)
        if self.budgets.streams(seq):
            self._stream(seq)
        else:
            self.budgets.widen(seq)

    def _stream(self, seq: TokenSequence) -> None:
        """Let ``seq`` attend to all its chunks where they are stored, because they do not fit the pool."""
        residency = seq.residency
        seq.counters.fallbacks += 1
        residency.streamed = True
        residency.reserved_slots = min(residency.reserved_slots, STREAMED_SLOTS)
        self.forget(seq)
        for slot in residency.slots.values():
            self._pool.release(slot)
        residency.slots.clear()
        residency.version += 1

    def _choose(
        self,
        seq: TokenSequence,
        pending: PendingSet,
        scores: npt.NDArray[np.float32] | None,
        event_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Choose the chunks of ``pending`` by ``scores``, float32 [chunks], within the slots there are.

        The budget doubles while it covers too little of ``event_mass``, float32 [chunks].
        """
        residency = seq.residency
        chosen = self._select(seq, pending, scores, residency.widening)
        while event_mass is not None and self.budgets.misses(seq, event_mass, chosen):
            if self.budgets.streams(seq) or not self.budgets.widen(seq):
                break
            chosen = self._select(seq, pending, scores, residency.widening)
        if residency.widening > 1:
            half = self._select(seq, pending, scores, residency.widening // 2)
            residency.half_set = mask_of(half, pending.chunks)
        wanted = [number for number in chosen if number not in residency.slots]
        if scores is not None and len(scores):
            wanted.sort(key=lambda number: -scores[number])
        # tokens up to the boundary fill slots before the swap frees any
        tail = seq.tail_tokens + max(pending.boundary - residency.decode_steps, 0) + 1
        filling = max(len(seq.open_slots), -(-tail // seq.chunk_tokens))
        room = max(residency.reserved_slots + self.budgets.spare_slots - len(residency.slots) - filling, 0)
        pending.selected = frozenset(chosen) - frozenset(wanted[room:])
        pending.wanted = wanted[:room]
        self._bring_in(seq, pending)

    def _select(
        self, seq: TokenSequence, pending: PendingSet, scores: npt.NDArray[np.float32] | None, widening: int
    ) -> list[int]:
        """The chunks that the policy of ``seq`` chooses with the first budget times ``widening``."""
        chosen: list[int] = select(
            scores,
            policy=seq.policy,
            chunks=pending.chunks,
            budget=min(self.budgets.first(seq, pending.chunks) * widening, pending.chunks),
            config=self._selection,
            rng=np.random.default_rng(
                [self._config.seed % 2**32, seq.sampling.seed % 2**32, seq.residency.decode_steps]
            ),
        ).tolist()
        return chosen

    def _bring_in(self, seq: TokenSequence, pending: PendingSet) -> None:
        """Reference the wanted chunks that are hot, and start the recall of the others, highest score first.

        Does nothing while the pool lacks slots. They are reserved, so they become free once completed chunks of other
        sequences are written back.
        """
        cold = [number for number in pending.wanted if seq.hot_slot(number, self._pool) is None]
        if len(cold) > self._pool.available - (len(pending.wanted) - len(cold)):
            return
        for number in pending.wanted:
            if (slot := seq.hot_slot(number, self._pool)) is not None:
                pending.incoming[number] = self._pool.acquire(slot)
        for number in cold:
            chunk, slot = seq.chunks[number], self._pool.allocate()
            assert slot is not None and chunk.ref is not None
            pending.incoming[number] = slot
            pending.copying.append(RecallItem(chunk.key, chunk.ref, slot))
        pending.wanted = []
        seq.counters.recalled_chunks += len(pending.copying)
        if pending.copying:
            pending.ticket = self._prefetcher.recall(pending.copying, seq.holder)
            self._recalling[pending.ticket] = seq

    def _swap(self, seq: TokenSequence, pending: PendingSet) -> None:
        """Let ``pending`` take over; chunks completed since it was chosen stay resident."""
        assert pending.selected is not None
        residency = seq.residency
        for number in [n for n in residency.slots if n < pending.chunks and n not in pending.selected]:
            self._pool.release(residency.slots.pop(number))
        residency.slots.update(pending.incoming)
        residency.version += 1
        pending.incoming = {}
        self.budgets.swapped(seq)
        if pending.boundary:
            seq.counters.windows += 1
            seq.counters.late_windows += residency.decode_steps > pending.boundary
        residency.pending = residency.waiting_since_s = None
        if pending.boundary:
            residency.boundary = self._following(seq, pending.boundary)
        if seq.state is State.RECALLING:
            seq.state = State.DECODE

    def _following(self, seq: TokenSequence, boundary: int) -> int:
        """The boundary after ``boundary``: twice as far within the first window, then a window later, staggered."""
        window = self.budgets.window_steps(seq)
        following = boundary * 2 if boundary * 2 <= window else boundary + window
        if boundary * 2 > window >= boundary:
            # once, at the end of the first window: sequences that started together swap at different steps
            prompt = np.asarray(seq.token_ids[: seq.prompt_len], dtype="<i4")  # whole: many prompts begin alike
            following -= zlib.crc32(prompt.tobytes()) % max(window // 2, 1)
        return max(following, seq.residency.decode_steps + 1)


def make_capture(row: int, seq: TokenSequence, boundary: int, pool: HotPool, history_steps: int) -> Capture:
    """What the coming step captures for the prediction at ``boundary`` of ``seq``, its decode row ``row``.

    ``history_steps``: decode steps, the newest included, whose queries the prediction uses.
    """
    ref_slots, generations = (array.copy() for array in seq.refs())
    resident = mask_of(list(seq.residency.slots), len(seq.chunks))
    local = []
    for number in np.flatnonzero(ref_slots < 0).tolist():
        hot = seq.held_back.get(number)
        if hot is None:
            hot = pool.lookup(seq.chunks[number].key)
        assert hot is not None, f"chunk {number} of {seq.request_id} is neither hot nor in the arena"
        local.append(hot)
    recent = _recent_slots(seq, pool, history_steps)
    if seq.tail_tokens + 1 == seq.chunk_tokens:
        # this step completes a chunk, which it reads
        local.append(recent[-1])
        ref_slots, generations = np.append(ref_slots, -1), np.append(generations, 0)
        resident = np.append(resident, True)
    return Capture(
        row,
        seq,
        restarts=seq.restarts,
        boundary=boundary,
        position=seq.num_computed,
        recent_slots=recent,
        first_recent=len(seq.chunks) + 1 - len(recent),
        local_slots=tuple(local),
        ref_slots=ref_slots,
        generations=generations,
        resident=resident,
    )


def _recent_slots(seq: TokenSequence, pool: HotPool, history_steps: int) -> tuple[int, ...]:
    """Slots of the chunks that the steps of the history wrote to, the open chunk last, as far back as they are hot."""
    oldest = max(seq.num_computed - history_steps + 2, 0) // seq.chunk_tokens
    slots = [seq.open_slots[len(seq.chunks)]]
    for chunk in reversed(seq.chunks[oldest:]):
        if (slot := seq.hot_slot(chunk.number, pool)) is None:
            break
        slots.insert(0, slot)
    return tuple(slots)
