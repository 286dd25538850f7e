"""Signs that the engine's thread gets on, for those in other threads who judge whether it hangs."""

import threading
import time
from collections.abc import Callable


class Pulse:
    """The engine's thread calls :meth:`beat` and :meth:`rest`, others that work for it :meth:`progress`; any thread may
    ask the rest.

    A beat is a step that is over, a layer of a long one, or a copy, a search or a cancellation that was taken in: each
    has to come within ``EngineConfig.step_deadline_s`` of the one before while there is work. That the thread runs in
    circles is no beat. Progress is an answer of another node, or that none came in time: who asks several of them in
    turn waits several times. ``clock`` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.beats = 0
        self._last_s = clock()
        self._resting = False
        self._lock = threading.Lock()

    def beat(self) -> None:
        """Something was done, or work has come."""
        self.progress()
        self._resting = False

    def progress(self) -> None:
        """A part of some work was done for the engine's thread. This ends no rest."""
        with self._lock:
            self._last_s = self.clock()
            self.beats += 1

    def rest(self) -> None:
        """There is nothing to do until the next beat."""
        self._resting = True

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat, 0 at rest."""
        last_s = self._last_s  # read first: a beat that ends a rest sets it before it ends the rest
        return 0.0 if self._resting else max(self.clock() - last_s, 0.0)
