"""How learning rates go: up over the first steps, then along a cosine to zero where the steps, or the time, end."""

import math
import time


class CosineSchedule:
    """Share of the learning rate at each of ``steps`` steps.

    ``time_limit_s``: the cosine also ends when so many seconds of training are over, whichever is first; what is
    learned then depends on the machine's speed. ``spent_s``: seconds that were trained before this object was made.
    """

    def __init__(self, steps: int, *, warmup_steps: int, time_limit_s: float | None = None, spent_s: float = 0) -> None:
        self._steps = max(steps, 1)
        self._warmup_steps = max(warmup_steps, 1)
        self._time_limit_s = time_limit_s
        self._began_s = time.monotonic() - spent_s

    def share(self, step: int) -> float:
        """Of the learning rate, at ``step`` counted from 0."""
        done = min(max(step / self._steps, self._time_share()), 1.0)
        return min((step + 1) / self._warmup_steps, 0.5 * (1 + math.cos(math.pi * done)))

    @property
    def time_is_up(self) -> bool:
        return self._time_share() >= 1

    def _time_share(self) -> float:
        if self._time_limit_s is None:
            return 0.0
        return (time.monotonic() - self._began_s) / self._time_limit_s
