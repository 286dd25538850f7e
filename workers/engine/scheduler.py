"""Which sequences run in the next step: admission by hot and cold memory, decode rows, prefill slices."""

import math
import time
from collections import deque
from dataclasses import dataclass

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.prompt_logprobs import MAX_STEP_TOKENS
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import PROBE_TOKENS, WindowCycle

STREAMED_SHARE = 4
"""While other sequences run, at most every fourth step includes a streamed sequence, one at a time, and such steps take
at most a fourth of the time."""

RATE_SMOOTHING = 0.5
"""Weight of the newest step in the moving average of the prefill rate."""

LEAST_TOKENS, LEAST_SHARE = 16, 32
"""While other sequences decode, a prefill step has at least this many tokens, and this fraction of a full step."""

PREFILL_QUANTUM = 1024
"""Larger prefill steps are a multiple of this many tokens: attention kernels are tuned for round numbers of queries,
and cuDNN builds a plan for each number that it has not seen."""


@dataclass
class PrefillRate:
    """How many prompt tokens fit in a given time, learned from the steps so far.

    The work of a token after ``past`` others is proportional to ``linear_equal`` + past: at a past of ``linear_equal``
    tokens attention costs as much as the rest of the model.
    """

    linear_equal: float
    work_per_s: float | None = None

    def observe(self, tokens: int, past: int, duration_s: float) -> None:
        """Learn that a step of ``tokens`` after ``past`` others took ``duration_s``."""
        rate = self._work(tokens, past) / max(duration_s, 1e-6)
        self.work_per_s = (
            rate if self.work_per_s is None else (RATE_SMOOTHING * rate + (1 - RATE_SMOOTHING) * self.work_per_s)
        )

    def tokens_in(self, duration_s: float, past: int) -> int | None:
        """Tokens after ``past`` others that take about ``duration_s``; ``None`` before the first :meth:`observe`."""
        if self.work_per_s is None:
            return None
        # the positive root of _work(tokens, past) = work
        base = self.linear_equal + past
        return int(math.sqrt(base * base + 2 * self.work_per_s * duration_s) - base)

    def _work(self, tokens: int, past: int) -> float:
        return tokens * (self.linear_equal + past + tokens / 2)


class Scheduler:
    """Owns the queue, admits first come first served, and plans steps.

    Of the admitted prompts, every other prefill step goes to the one with the fewest tokens left.

    Args:
        cold_slots: slots of this node's arena.
        linear_equal: see :class:`PrefillRate`.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: HotPool,
        windows: WindowCycle,
        reservations: Reservations,
        cold_slots: int,
        linear_equal: float,
    ) -> None:
        self._config = config
        self._pool = pool
        self._windows = windows
        self._reservations = reservations
        self._cold_slots = cold_slots
        assert config.prefill_chunk_tokens is not None and config.prefill_slice_s is not None, "call for_device first"
        self._prefill_chunk_tokens = config.prefill_chunk_tokens
        self._prefill_slice_s = config.prefill_slice_s
        self.max_step_tokens = config.prefill_chunk_tokens + config.batch_size
        self._steps = 0
        self._lane_opens_s = 0.0
        self.rate = PrefillRate(linear_equal)
        self.waiting: deque[TokenSequence] = deque()
        self.running = reservations.running
        self.stalled = False
        """The last plan lacks tokens because the pool had no free slot."""
        self.prefilled_tokens = 0
        self.prefilled_prompts = 0
        self.prefill_s = 0.0
        """Duration of steps that prefill, with the decode rows in them."""

    def add(self, seq: TokenSequence, *, first: bool = False) -> None:
        """Queue ``seq``, of which nothing is computed; ``first``: at the head of the queue.

        An answer that another worker, or an earlier try, began over partial resident sets is decoded again if runs have
        to be reproducible. Else it is prefilled, which is faster and exact.
        """
        self._reserve(seq)
        partial = not seq.residency.streamed and self._windows.budgets.first(seq, seq.max_chunks) < seq.max_chunks
        if partial and self._config.late_policy == "wait":
            seq.replay()
        if first:
            self.waiting.appendleft(seq)
        else:
            self.waiting.append(seq)

    def remove(self, seq: TokenSequence) -> None:
        """Take ``seq`` out of the queue or the running sequences."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def admit(self, releasing_slots: int = 0) -> list[TokenSequence]:
        """Move sequences that fit from the head of the queue to the running ones, and return them.

        ``releasing_slots``: arena slots that cold memory still reserves for sequences that have left.
        """
        admitted: list[TokenSequence] = []
        while self.waiting and len(self.running) < self._config.batch_size:
            seq = self.waiting[0]
            cold = releasing_slots + sum(other.slots_here(self._cold_slots) for other in [*self.running, seq])
            if seq.residency.reserved_slots > self._reservations.spare_slots or cold > self._cold_slots:
                break
            self.waiting.popleft()
            self.running.append(seq)
            seq.state = State.LOCATING
            admitted.append(seq)
        return admitted

    def _reserve(self, seq: TokenSequence) -> None:
        """Reserve hot slots for ``seq``: what its budget needs, or, where it is streamed, what a prefill step needs."""
        residency = seq.residency
        need = self._windows.budgets.slots(seq, residency.widening)
        residency.streamed = need > self._pool.num_slots
        prefill = self._prefill_chunk_tokens // seq.chunk_tokens + 1
        streamed = min(seq.max_chunks + 1, prefill, self._pool.num_slots)
        residency.reserved_slots = streamed if residency.streamed else need

    def observe(self, plan: Plan, duration_s: float) -> None:
        """Learn that ``plan`` took ``duration_s``. Call it before the plan's tokens are counted."""
        if len(plan.streams) == 1 and plan.streams[0].tokens > 1:
            part = plan.streams[0]
            self.rate.observe(part.tokens, part.sequence.num_computed, duration_s)
        prefills = [part for part in plan.streams if part.sequence.state is State.PREFILL]
        if prefills:
            self.prefilled_tokens += sum(part.tokens for part in prefills)
            self.prefilled_prompts += sum(part.draws for part in prefills)
            self.prefill_s += duration_s
        if any(part.sequence.state is State.DECODE for part in plan.streams):
            self._lane_opens_s = time.perf_counter() + (STREAMED_SHARE - 1) * duration_s

    def next_plan(self) -> Plan:
        """The next step's work, possibly none. Allocates the slots of every token that it computes."""
        self._steps += 1
        self.stalled = False
        ready = [seq for seq in self.running if self._may_decode(seq)]
        prefilling = [seq for seq in self.running if seq.state is State.PREFILL]
        if self._steps % 2 == 0:
            # a short prompt does not wait for all of a long one, which goes on in every other step
            prefilling.sort(key=lambda seq: seq.prefill_target - seq.num_computed)
        decode = [seq for seq in ready if not seq.residency.streamed and self._open(seq, 1)]
        streams = [StreamPart(seq, 1) for seq in self._lane(ready) if self._open(seq, 1)]
        budget = self._prefill_chunk_tokens
        # prefill may borrow spare slots: a completed chunk needs its slot only until it is written back
        spare = self._reservations.spare_slots
        for seq in prefilling:
            if budget < 1:
                break  # the step is full
            slots = seq.residency.reserved_slots + spare
            tokens = self._open(seq, self._prefill_tokens(seq, budget, slots, shared=bool(decode or streams)))
            if tokens:
                streams.append(StreamPart(seq, tokens, self._probe_tokens(seq, tokens)))
                budget -= tokens
                spare = 0
                if decode or len(streams) > 1:
                    break
        captures = [self._windows.capture(row, seq) for row, seq in enumerate(decode)]
        return Plan(tuple(decode), tuple(streams), tuple(capture for capture in captures if capture is not None))

    @property
    def streams_next(self) -> bool:
        """Whether the next step may include prefill or streamed sequences."""
        if any(seq.state is State.PREFILL for seq in self.running):
            return True
        if not any(seq.residency.streamed for seq in self.running):
            return False  # the usual case, decided before every step
        return bool(self._lane([seq for seq in self.running if self._may_decode(seq)], ahead=1))

    def _lane(self, ready: list[TokenSequence], *, ahead: int = 0) -> list[TokenSequence]:
        """The streamed sequences, of those ``ready`` to decode, that are in the current step, or ``ahead`` steps later.

        All of them if no other sequence runs; else they take turns, because their steps are long and would delay the
        tokens of the others.
        """
        streamed = [seq for seq in ready if seq.residency.streamed]
        others = len(streamed) < len(ready) or any(seq.state is State.PREFILL for seq in self.running)
        if not streamed or not others:
            return streamed
        turn, between = divmod(self._steps + ahead, STREAMED_SHARE)
        if between or time.perf_counter() < self._lane_opens_s:
            return []
        return [streamed[turn % len(streamed)]]

    def _may_decode(self, seq: TokenSequence) -> bool:
        """Whether ``seq`` decodes, does not wait at a boundary, and has tokens to draw after the one in flight.

        A grammar masks the next token only after the host has read the last one. Where steps overlap, such an answer
        therefore takes part in every other step; other sequences are not delayed.
        """
        if seq.state is not State.DECODE or self._windows.blocked(seq):
            return False
        if seq.matcher is not None and seq.awaited_tokens:
            return False
        return len(seq.token_ids) + seq.awaited_tokens < seq.max_len

    def _probe_tokens(self, seq: TokenSequence, tokens: int) -> int:
        """How many of the prompt's next ``tokens`` are among those whose attention chooses the first resident set."""
        if seq.policy != "lookahead" or seq.residency.streamed:
            return 0
        first = max(seq.num_computed, seq.prefill_target - PROBE_TOKENS)
        return max(seq.num_computed + tokens - first, 0)

    def _prefill_tokens(self, seq: TokenSequence, budget: int, slots: int, *, shared: bool) -> int:
        """Prompt tokens of ``seq`` in the next step.

        Alone in a step it gets as many as ``budget``, in tokens, and the hot ``slots`` for its chunks allow; such a
        step can be aborted between layers. A step ``shared`` with other sequences should take ``prefill_slice_s``.
        """
        tokens = min(seq.prefill_target - seq.num_computed, budget)
        if seq.scores_prompt:
            tokens = min(tokens, MAX_STEP_TOKENS)
        if shared:
            fitting = self.rate.tokens_in(self._prefill_slice_s, seq.num_computed)
            # fewer would take as long: every step reads all weights, and the streamed past of a long prompt
            least = max(LEAST_TOKENS, self._prefill_chunk_tokens // LEAST_SHARE)
            tokens = min(tokens, max(fitting or 0, least))
        tokens = min(tokens, slots * seq.chunk_tokens - seq.tail_tokens)
        if tokens < seq.prefill_target - seq.num_computed and tokens > PREFILL_QUANTUM:
            tokens -= tokens % PREFILL_QUANTUM
        return tokens

    def _open(self, seq: TokenSequence, tokens: int) -> int:
        """Allocate slots for the next ``tokens`` of ``seq``; returns how many tokens have slots."""
        first, last = (
            seq.num_computed // seq.chunk_tokens,
            (seq.num_computed + tokens - 1) // seq.chunk_tokens,
        )
        for number in range(first, last + 1):
            if number not in seq.open_slots:
                slot = self._pool.allocate()
                if slot is None:
                    # all slots are referenced or being written back; the copy thread will free some
                    self.stalled = True
                    return max(0, number * seq.chunk_tokens - seq.num_computed)
                seq.open_slots[number] = slot
        return tokens
