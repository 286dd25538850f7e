"""Who runs in the next step: admission within the hot pool and cold memory, decode rows, prefill slices."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.prompt_logprobs import MAX_STEP_TOKENS
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.residency.window import PROBE_TOKENS, WindowCycle

STREAMED_SHARE = 4
"""Sequences whose full attention is streamed have a lane of their own: beside others, one of them steps in every fourth
step at most, and such steps take a fourth of the time at most."""

RATE_SMOOTHING = 0.5

LEAST_TOKENS, LEAST_SHARE = 16, 32
"""A prefill step beside running streams has at least this many tokens, and this part of a whole one."""

PREFILL_QUANTUM = 1024
"""Prefill steps larger than this are a multiple of it: attention kernels are made for round numbers of queries, and
cuDNN prepares itself anew for every number."""


@dataclass
class PrefillRate:
    """How many prompt tokens fit in a given time, learned from the steps made.

    A token after ``past`` others costs as much work as (``linear_equal`` + past) · a constant: ``linear_equal`` is the
    past at which attention costs as much as all the rest of the model.
    """

    linear_equal: float
    work_per_s: float | None = None

    def observe(self, tokens: int, past: int, duration_s: float) -> None:
        rate = self._work(tokens, past) / max(duration_s, 1e-6)
        self.work_per_s = (
            rate if self.work_per_s is None else (RATE_SMOOTHING * rate + (1 - RATE_SMOOTHING) * self.work_per_s)
        )

    def tokens_in(self, duration_s: float, past: int) -> int | None:
        """Tokens after ``past`` that take about ``duration_s``; ``None`` before anything was seen."""
        if self.work_per_s is None:
            return None
        # the positive root of _work(tokens, past) = work
        base = self.linear_equal + past
        return int(math.sqrt(base * base + 2 * self.work_per_s * duration_s) - base)

    def _work(self, tokens: int, past: int) -> float:
        return tokens * (self.linear_equal + past + tokens / 2)


class Scheduler:
    """First come, first served; of admitted prompts, every other step is the shortest one's. Owns the queue and the
    list of running sequences."""

    def __init__(
        self,
        config: EngineConfig,
        pool: HotPool,
        windows: WindowCycle,
        cold_slots: int,
        linear_equal: float,
    ) -> None:
        self._config = config
        self._pool = pool
        self._windows = windows
        self._cold_slots = cold_slots
        assert config.prefill_chunk_tokens is not None and config.prefill_slice_s is not None, "resolve the defaults"
        self._prefill_chunk_tokens = config.prefill_chunk_tokens
        self._prefill_slice_s = config.prefill_slice_s
        self._steps = 0
        self._lane_opens_s = 0.0
        self.rate = PrefillRate(linear_equal)
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []
        self.stalled = False
        self.prefilled_tokens = 0
        self.prefilled_prompts = 0
        self.prefill_s = 0.0
        """Of steps that prefill, decode rows beside them included."""

    def add(self, seq: TokenSequence, *, first: bool = False) -> None:
        """Queue ``seq``, of which nothing is computed. What another worker, or another try, has decoded of it over
        partial sets is decoded again where runs shall be reproducible; else it is prefilled: quicker, and exact."""
        self._reserve(seq)
        partial = not seq.streamed and self._windows.budgets.first(seq, seq.max_chunks) < seq.max_chunks
        if partial and self._config.late_policy == "wait":
            seq.replay()
        if first:
            self.waiting.appendleft(seq)
        else:
            self.waiting.append(seq)

    def remove(self, seq: TokenSequence) -> None:
        """``seq`` leaves, wherever it is."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def admit(self, located: Callable[[TokenSequence], None], releasing_slots: int = 0) -> None:
        """Let in from the queue's head what fits beside what runs; ``located`` is called for each.
        ``releasing_slots`` of the arena are still promised to sequences that have left."""
        while self.waiting and len(self.running) < self._config.max_batch_size:
            seq = self.waiting[0]
            together = [*self.running, seq]
            slots = sum(other.reserved_slots for other in together)
            cold = releasing_slots + sum(other.slots_here(self._cold_slots) for other in together)
            if slots > self._pool.num_slots or cold > self._cold_slots:
                return
            self.waiting.popleft()
            self.running.append(seq)
            seq.state = State.LOCATING
            located(seq)

    def _reserve(self, seq: TokenSequence) -> None:
        """Hot slots promised to ``seq``: what its budget needs, or a prefill step where its past is streamed."""
        need = self._windows.budgets.slots(seq, seq.widening)
        seq.streamed = need > self._pool.num_slots
        prefill = self._prefill_chunk_tokens // seq.chunk_tokens + 1
        seq.reserved_slots = min(seq.max_chunks + 1, prefill, self._pool.num_slots) if seq.streamed else need

    def observe(self, plan: Plan, duration_s: float) -> None:
        """``plan`` was computed in ``duration_s``, its tokens not counted yet."""
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
        """The next step's work, with slots allocated for every token it computes. May be empty."""
        self._steps += 1
        self.stalled = False
        ready = [seq for seq in self.running if self._may_decode(seq)]
        prefilling = [seq for seq in self.running if seq.state is State.PREFILL]
        if self._steps % 2 == 0:
            # a short prompt need not wait for all of a long one, which goes on in every other step
            prefilling.sort(key=lambda seq: seq.prefill_target - seq.num_computed)
        decode = [seq for seq in ready if not seq.streamed and self._open(seq, 1)]
        streams = [StreamPart(seq, 1) for seq in self._lane(ready) if self._open(seq, 1)]
        budget = self._prefill_chunk_tokens
        # a chunk that prefill completes needs its slot only until it was written back
        spare = self.spare_slots
        for seq in prefilling:
            if budget < 1:
                break  # the step is as large as it may be
            tokens = self._prefill_tokens(seq, budget, seq.reserved_slots + spare, beside=bool(decode or streams))
            tokens = self._open(seq, tokens)
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
        """Whether the next step may compute more than decode rows."""
        if any(seq.state is State.PREFILL for seq in self.running):
            return True
        if not any(seq.streamed for seq in self.running):
            return False  # nearly always, and before every step
        return bool(self._lane([seq for seq in self.running if self._may_decode(seq)], ahead=1))

    def _lane(self, ready: list[TokenSequence], *, ahead: int = 0) -> list[TokenSequence]:
        """Those of the ``ready`` sequences that are streamed in the step at hand, or ``ahead`` steps later.

        All of them while there is nobody else; else they take turns, so that nobody's tokens come much later.
        """
        streamed = [seq for seq in ready if seq.streamed]
        others = len(streamed) < len(ready) or any(seq.state is State.PREFILL for seq in self.running)
        if not streamed or not others:
            return streamed
        turn, between = divmod(self._steps + ahead, STREAMED_SHARE)
        if between or time.perf_counter() < self._lane_opens_s:
            return []
        return [streamed[turn % len(streamed)]]

    def _may_decode(self, seq: TokenSequence) -> bool:
        """Whether ``seq`` decodes, is not held up at a boundary, and has tokens to make besides the one on its way.

        A grammar says what may follow a token once the host has read it: such an answer takes every other step where
        steps overlap, and the others go on as they are.
        """
        if seq.state is not State.DECODE or self._windows.blocked(seq):
            return False
        if seq.matcher is not None and seq.awaited_tokens:
            return False
        return len(seq.token_ids) + seq.awaited_tokens < seq.max_len

    @property
    def spare_slots(self) -> int:
        """Slots of the pool that no running sequence was promised."""
        return self._pool.num_slots - sum(seq.reserved_slots for seq in self.running)

    def _probe_tokens(self, seq: TokenSequence, tokens: int) -> int:
        """How many of the next ``tokens`` of a prompt are among those that the first resident set is chosen by."""
        if seq.policy != "lookahead" or seq.streamed:
            return 0
        first = max(seq.num_computed, seq.prefill_target - PROBE_TOKENS)
        return max(seq.num_computed + tokens - first, 0)

    def _prefill_tokens(self, seq: TokenSequence, budget: int, slots: int, *, beside: bool) -> int:
        """Alone, a step is as large as the batch and the ``slots`` for its chunks allow (it can be aborted between
        layers); beside running streams it is sized to take ``prefill_slice_s``."""
        tokens = min(seq.prefill_target - seq.num_computed, budget)
        if seq.scores_prompt:
            tokens = min(tokens, MAX_STEP_TOKENS)
        if beside:
            fitting = self.rate.tokens_in(self._prefill_slice_s, seq.num_computed)
            # fewer cost as much: a step reads all weights, and the past of a prompt larger than the pool, however short
            least = max(LEAST_TOKENS, self._prefill_chunk_tokens // LEAST_SHARE)
            tokens = min(tokens, max(fitting or 0, least))
        tokens = min(tokens, slots * seq.chunk_tokens - seq.tail_tokens)
        if tokens < seq.prefill_target - seq.num_computed and tokens > PREFILL_QUANTUM:
            tokens -= tokens % PREFILL_QUANTUM
        return tokens

    def _open(self, seq: TokenSequence, tokens: int) -> int:
        """Make sure the next ``tokens`` of ``seq`` have slots; returns for how many that worked."""
        first, last = (
            seq.num_computed // seq.chunk_tokens,
            (seq.num_computed + tokens - 1) // seq.chunk_tokens,
        )
        for number in range(first, last + 1):
            if number not in seq.open_slots:
                slot = self._pool.allocate()
                if slot is None:
                    # every other slot is referenced or on its way to cold memory: the copy thread will free some
                    self.stalled = True
                    return max(0, number * seq.chunk_tokens - seq.num_computed)
                seq.open_slots[number] = slot
        return tokens
