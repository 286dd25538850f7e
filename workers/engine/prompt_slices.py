"""Which prompts advance in the next step, and by how many tokens: a pure function of what the scheduler knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from forecache.workers.engine.step_cost import StepCost, StepWork

LEAST_TOKENS, LEAST_SHARE = 16, 32
"""A step with prompts has at least this many prompt tokens, and this fraction of a full step, if as many are left."""

WORTH = 1.5
"""Prompt tokens may cost this many times what a step costs without them, whatever the target. Fewer would take nearly
as long: with 1.5, prefill keeps at least 60 % of the speed that it would have if steps had no fixed cost."""

LONG_SHARE = 4
"""Short prompts leave this fraction of a step to the long ones that advance, so that a long prompt never starves."""

QUANTUM = 1024
"""A part of a prompt ends where the step's tokens are a multiple of this many, unless it is smaller: CUDA graphs have
round numbers of tokens, and padding costs as much as tokens do."""


@dataclass(frozen=True)
class Prompt:
    """An admitted prompt with tokens left to compute.

    Attributes:
        left: tokens left; at least 1.
        past: tokens before them, computed or found stored.
        priority: lower ones go first.
        arrival: order among equal priorities.
        slots: hot slots reserved for it.
        tail: computed tokens in its open chunk, which has one of these slots.
        most_tokens: of it in one step.
    """

    left: int
    past: int
    priority: int
    arrival: int
    slots: int
    tail: int
    most_tokens: int


@dataclass(frozen=True)
class StepLimits:
    """The settings of :class:`forecache.workers.core.config.EngineConfig` that size steps.

    ``max_tokens``: ``max_step_tokens``; ``target_s``: ``inter_token_target_s``; ``long_tokens``:
    ``long_prefill_token_threshold``; ``max_long``: ``max_long_partial_prefills``.
    """

    max_tokens: int
    target_s: float
    long_tokens: int
    max_long: int
    chunk_tokens: int

    @property
    def least_tokens(self) -> int:
        """Prompt tokens of a step at least, where as many are left."""
        return min(max(LEAST_TOKENS, self.max_tokens // LEAST_SHARE), self.max_tokens)


@dataclass(frozen=True)
class Slice:
    """The next ``tokens`` of the prompt at index ``prompt``."""

    prompt: int
    tokens: int


def slices_of_step(
    prompts: Sequence[Prompt],
    limits: StepLimits,
    cost: StepCost,
    *,
    rows: int = 0,
    spare_slots: int = 0,
    long_yields: bool = False,
) -> list[Slice]:
    """The prompt tokens of a step that has ``rows`` decode rows.

    Prompts go by priority and arrival. At most ``max_long`` prompts with more than ``long_tokens`` left advance. Within
    a priority shorter ones pass them, but leave them a share of the step. Without decode rows, prompts fill the step up
    to ``max_tokens``. With decode rows the step should take ``target_s``, and so it should if a prompt ends in it and a
    part of a long one would delay its first token. A slice that is worth its step (:data:`WORTH`) may take longer.

    Args:
        spare_slots: hot slots reserved for no sequence: prompts may borrow them.
        long_yields: long prompts leave the whole step to shorter ones, if any of these ends in it. Set it in every
            other step at most.
    """
    order = sorted(range(len(prompts)), key=lambda at: (prompts[at].priority, prompts[at].arrival))
    long = [at for at in order if prompts[at].left > limits.long_tokens]
    long, waiting = long[: limits.max_long], long[limits.max_long :]
    order = [at for at in order if at not in waiting]
    order.sort(key=lambda at: (prompts[at].priority, at in long))
    step = _Step(limits, cost, rows, spare_slots)
    for at in order:
        prompt = prompts[at]
        if at not in long:
            shares = not long_yields and any(prompts[other].priority == prompt.priority for other in long)
            step.add(at, prompt, shares=shares)
        elif step.has_long or not (long_yields and step.ends_prompt):
            step.add(at, prompt, long=True)
    return step.slices


class _Step:
    """A step that is filled prompt by prompt."""

    def __init__(self, limits: StepLimits, cost: StepCost, rows: int, spare_slots: int) -> None:
        self.slices: list[Slice] = []
        self.ends_prompt = False
        self.has_long = False
        self._limits = limits
        self._cost = cost
        self._rows = rows
        self._spare_slots = spare_slots
        # decode rows alone never fill a step
        self._left = max(limits.max_tokens - rows, limits.least_tokens)
        self._work = StepWork(rows)

    def add(self, at: int, prompt: Prompt, *, long: bool = False, shares: bool = False) -> None:
        """Add what fits of ``prompt``, at index ``at``; ``shares``: a share of the step is left for a long one."""
        left = self._left - (self._limits.max_tokens // LONG_SHARE if shares else 0)
        tokens = min(prompt.left, prompt.most_tokens, left)
        if self._rows or (long and self.ends_prompt):
            tokens = min(tokens, self._timely(prompt, long=long, shares=shares))
        chunk_tokens = self._limits.chunk_tokens
        tokens = min(tokens, (prompt.slots + self._spare_slots) * chunk_tokens - prompt.tail)
        beyond = (self._rows + self._work.tokens + tokens) % QUANTUM
        if tokens < prompt.left and tokens - beyond >= QUANTUM // 2:
            tokens -= beyond
        if tokens < 1:
            return
        borrowed = -(-(prompt.tail + tokens) // chunk_tokens) - prompt.slots
        self._spare_slots -= max(borrowed, 0)
        self._left -= tokens
        self._work = self._work.with_slice(tokens, prompt.past)
        self.has_long |= long
        self.ends_prompt |= tokens == prompt.left
        self.slices.append(Slice(at, tokens))

    def _timely(self, prompt: Prompt, *, long: bool, shares: bool) -> int:
        """Tokens of ``prompt`` after which the step takes its target, or is worth its duration."""
        least = self._limits.least_tokens if not self.slices or (long and not self.has_long) else 0
        if not self._cost.known:
            return least
        empty_s = self._cost.duration_s(StepWork(self._rows).with_slice(0, prompt.past))
        most_s = max(self._limits.target_s - empty_s, WORTH * empty_s)
        so_far_s = self._cost.duration_s(self._work.with_slice(0, prompt.past)) - empty_s
        share_s = most_s / LONG_SHARE
        left_s = max(most_s - so_far_s, share_s) if long else most_s - so_far_s - (share_s if shares else 0.0)
        tokens = self._cost.tokens_within(left_s, prompt.past)
        if not self.slices and not self._cost.tells_constant and tokens < prompt.left:
            # steps of another size show what a token costs
            tokens = tokens // 2 if tokens >= 2 * least else 2 * tokens
        return max(tokens, least)
