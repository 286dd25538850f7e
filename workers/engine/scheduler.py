"""Which sequences run in the next step: admission by hot and cold memory, decode rows, slices of prompts."""

import time
from bisect import insort

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.prompt_logprobs import MAX_STEP_TOKENS
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.engine.prompt_slices import Prompt, StepLimits, slices_of_step
from forecache.workers.engine.step_cost import StepCost, StepWork
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import PROBE_TOKENS, WindowCycle

STREAMED_SHARE = 4
"""While other sequences run, at most every fourth step includes a streamed sequence, one at a time, and such steps take
at most a fourth of the time."""


class Scheduler:
    """Owns the queue, admits by priority and arrival, and plans steps.

    A running sequence keeps its place until it ends, whatever the priority of those that wait.

    Args:
        cold_slots: slots of this node's arena.
        linear_equal: see :class:`.step_cost.StepCost`.
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
        assert config.max_step_tokens is not None and config.inter_token_target_s is not None, "call for_device first"
        assert config.long_prefill_token_threshold is not None, "call for_device first"
        self._limits = StepLimits(
            max_tokens=config.max_step_tokens,
            target_s=config.inter_token_target_s,
            long_tokens=config.long_prefill_token_threshold,
            max_long=config.max_long_partial_prefills,
            chunk_tokens=config.chunk_tokens,
        )
        self._config = config
        self._pool = pool
        self._windows = windows
        self._reservations = reservations
        self._cold_slots = cold_slots
        self.max_step_tokens = max(self._limits.max_tokens, config.batch_size + self._limits.least_tokens)
        """Most tokens of a step, decode rows included."""
        self._steps = 0
        self._lane_opens_s = 0.0
        self._long_yielded = False
        self._arrivals = self._returns = 0
        self.cost = StepCost(linear_equal)
        self.waiting: list[TokenSequence] = []
        self.running = reservations.running
        self.stalled = False
        """The last plan lacks tokens because the pool had no free slot."""
        self.prefilled_tokens = 0
        self.prefilled_prompts = 0
        self.prefill_s = 0.0
        """Duration of steps that prefill, with the decode rows in them."""

    def add(self, seq: TokenSequence, *, first: bool = False) -> None:
        """Queue ``seq``, of which nothing is computed; ``first``: before all others of its priority.

        An answer that another worker, or an earlier try, began over partial resident sets is decoded again if runs have
        to be reproducible. Else it is prefilled, which is faster and exact.
        """
        self._reserve(seq)
        partial = not seq.residency.streamed and self._windows.budgets.first(seq, seq.max_chunks) < seq.max_chunks
        if partial and self._config.late_policy == "wait":
            seq.replay()
        if first:
            self._returns += 1
        else:
            self._arrivals += 1
        seq.place = seq.request.priority, -self._returns if first else self._arrivals
        insort(self.waiting, seq, key=lambda other: other.place)

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
            del self.waiting[0]
            self.running.append(seq)
            seq.state = State.LOCATING
            admitted.append(seq)
        return admitted

    def _reserve(self, seq: TokenSequence) -> None:
        """Reserve hot slots for ``seq``: what its budget needs, or, where it is streamed, what a prefill step needs."""
        residency = seq.residency
        need = self._windows.budgets.slots(seq, residency.widening)
        residency.streamed = need > self._pool.num_slots
        prefill = self._limits.max_tokens // seq.chunk_tokens + 1
        streamed = min(seq.max_chunks + 1, prefill, self._pool.num_slots)
        residency.reserved_slots = streamed if residency.streamed else need

    def observe(self, plan: Plan, duration_s: float) -> None:
        """Learn that ``plan`` took ``duration_s``. Call it before the plan's tokens are counted."""
        prefills = [part for part in plan.streams if part.sequence.state is State.PREFILL]
        if prefills:
            self._learn(plan, prefills, duration_s)
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
        decode = [seq for seq in ready if not seq.residency.streamed and self._open(seq, 1)]
        streams = [StreamPart(seq, 1) for seq in self._lane(ready) if self._open(seq, 1)]
        streams += self._prefill(rows=len(decode) + len(streams))
        captures = [self._windows.capture(row, seq) for row, seq in enumerate(decode)]
        return Plan(tuple(decode), tuple(streams), tuple(capture for capture in captures if capture is not None))

    def _prefill(self, rows: int) -> list[StreamPart]:
        """The prompts' part of a step in which ``rows`` sequences decode."""
        prompts = [seq for seq in self.running if seq.state is State.PREFILL]
        if not prompts:
            return []
        slices = slices_of_step(
            [_prompt(seq) for seq in prompts],
            self._limits,
            self.cost,
            rows=rows,
            # a completed chunk needs its slot only until it is written back, so spare ones can be borrowed
            spare_slots=self._reservations.spare_slots,
            long_yields=not self._long_yielded,
        )
        parts = []
        for part in slices:
            seq = prompts[part.prompt]
            if tokens := self._open(seq, part.tokens):
                parts.append(StreamPart(seq, tokens, self._probe_tokens(seq, tokens)))
        long = [seq for seq in prompts if seq.prefill_target - seq.num_computed > self._limits.long_tokens]
        self._long_yielded = bool(long) and not any(part.sequence in long for part in parts)
        return parts

    def _learn(self, plan: Plan, prefills: list[StreamPart], duration_s: float) -> None:
        """Learn what a step costs, except from a streamed sequence, whose steps are of another kind."""
        if len(prefills) < len(plan.streams):
            return
        work = StepWork(len(plan.decode))
        for part in prefills:
            work = work.with_slice(part.tokens, part.sequence.num_computed)
        self.cost.observe(work, duration_s)

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


def _prompt(seq: TokenSequence) -> Prompt:
    priority, arrival = seq.place
    return Prompt(
        left=seq.prefill_target - seq.num_computed,
        past=seq.num_computed,
        priority=priority,
        arrival=arrival,
        slots=seq.residency.reserved_slots,
        tail=seq.tail_tokens,
        most_tokens=MAX_STEP_TOKENS if seq.scores_prompt else seq.prefill_target,
    )
