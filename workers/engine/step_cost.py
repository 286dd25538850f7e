"""How long a step with prompt tokens takes, learned from the steps so far.

The duration is modelled as a sum of terms with coefficients of at least 0: a constant, decode rows, prompt tokens,
attention (tokens times the tokens before them) and past tokens that the step reads. Decode-only steps are not part of
it: on a GPU they replay a graph, and their constant is another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORGETTING = 0.95
"""Weight that earlier steps keep at each new one: about the last 20 steps count."""

LARGEST_SURPRISE = 2.0
"""A step counts as at most this many times as long as expected, unless the one before took too long as well. A single
slow step, such as a first compilation, thus changes little."""

FORGETTING_SURPRISED = 0.5
"""Replaces :data:`FORGETTING` while steps keep taking too long: the machine is not as it was."""

FIRST_CONSTANT = 0.25
"""Share of the first step's duration that is taken for the constant."""

SAME_SIZE = 0.98
"""From this squared cosine between the constants and the tokens of the newest steps on, they count as equally large."""

SWEEPS = 6
"""Passes of coordinate descent after each step, from the last solution on. What the newest steps do not tell apart, for
instance because all had the same size, therefore stays as it was."""


@dataclass(frozen=True)
class StepWork:
    """What a step computes.

    Attributes:
        rows: decode rows.
        tokens: prompt tokens.
        attention: sum over the prompts of tokens · (past + tokens / 2).
        past: tokens before the slices, which the step reads: their sum over the prompts.
    """

    rows: int = 0
    tokens: int = 0
    attention: float = 0.0
    past: int = 0

    def with_slice(self, tokens: int, past: int) -> "StepWork":
        """The same and ``tokens`` of one more prompt, of which ``past`` are computed."""
        return StepWork(
            self.rows, self.tokens + tokens, self.attention + tokens * (past + tokens / 2), self.past + past
        )

    @property
    def terms(self) -> tuple[float, ...]:
        """The factors of the coefficients."""
        return 1.0, self.rows, self.tokens, self.attention, self.past


class StepCost:
    """The learned durations of one engine's steps with prompt tokens.

    Least squares of relative errors, with exponential forgetting and coefficients of at least 0. An error is relative
    to the expected or to the measured duration, to the shorter one: if the first step was much too slow, the second
    one corrects that.

    Args:
        linear_equal: tokens of past at which attention to them costs as much as the rest of the model: the ratio of two
            coefficients until steps have shown it.
    """

    def __init__(self, linear_equal: float) -> None:
        self._coefficients = [0.0, 0.0, 1.0, 1.0 / max(linear_equal, 1.0), 0.0]
        count = len(self._coefficients)
        self._products = [[0.0] * count for _ in range(count)]
        self._sums = [0.0] * count
        self._surprised = False
        self.known = False
        """Whether any step was observed; until then no duration means anything."""

    def observe(self, work: StepWork, duration_s: float) -> None:
        """Learn that a step with ``work``, some prompt tokens in it, took ``duration_s``."""
        duration_s = max(duration_s, 1e-6)
        if not self.known:
            scale = (1 - FIRST_CONSTANT) * duration_s / self.duration_s(work)
            self._coefficients = [FIRST_CONSTANT * duration_s, *(scale * value for value in self._coefficients[1:])]
            self.known = True
        expected_s = self.duration_s(work)
        surprising, kept = duration_s > LARGEST_SURPRISE * expected_s, FORGETTING
        if surprising and self._surprised:
            kept = FORGETTING_SURPRISED
        elif surprising:
            duration_s = LARGEST_SURPRISE * expected_s
        self._surprised = surprising
        unit_s = min(duration_s, expected_s)
        row, measured = [term / unit_s for term in work.terms], duration_s / unit_s
        for at, (sums, mine) in enumerate(zip(self._products, row, strict=True)):
            self._products[at] = [kept * old + mine * other for old, other in zip(sums, row, strict=True)]
            self._sums[at] = kept * self._sums[at] + mine * measured
        self._descend()

    @property
    def tells_constant(self) -> bool:
        """Whether the newest steps differ enough in their tokens to tell the constant from the cost of a token."""
        constants, both, tokens = self._products[0][0], self._products[0][2], self._products[2][2]
        return both * both < SAME_SIZE * constants * tokens

    def duration_s(self, work: StepWork) -> float:
        """Expected duration of a step with ``work``."""
        return _dot(self._coefficients, work.terms)

    def tokens_within(self, duration_s: float, past: int) -> int:
        """Prompt tokens after ``past`` others that add at most ``duration_s`` to a step that reads the past already."""
        if duration_s <= 0:
            return 0
        _, _, linear, attention, _ = self._coefficients
        slope = linear + attention * past
        if attention * duration_s > 1e-9 * slope * slope:
            # the positive root of slope · tokens + attention · tokens² / 2 = duration_s
            return int((math.sqrt(slope * slope + 2 * attention * duration_s) - slope) / attention)
        return int(duration_s / slope) if slope > 0 else UNLIMITED_TOKENS

    def _descend(self) -> None:
        """Reduce the sum of squared relative errors: by one factor for all coefficients, since a busier machine is
        slower at everything, then by one coefficient after the other."""
        values = self._coefficients
        curvature = sum(value * _dot(products, values) for value, products in zip(values, self._products, strict=True))
        factor = _dot(values, self._sums) / curvature
        values[:] = [factor * value for value in values]
        for _ in range(SWEEPS):
            for at, (products, total) in enumerate(zip(self._products, self._sums, strict=True)):
                if products[at] > 0:
                    rest = _dot(products, values) - products[at] * values[at]
                    values[at] = max(0.0, (total - rest) / products[at])


UNLIMITED_TOKENS = 1 << 30
"""More than any step holds: tokens that seem to cost nothing."""


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
