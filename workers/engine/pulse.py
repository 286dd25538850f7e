"""Shows other threads that the engine's thread advances, so that they can tell whether it hangs."""

import threading
import time
from collections.abc import Callable


class Pulse:
    """A watchdog of the engine's thread.

    The engine's thread calls :meth:`beat` and :meth:`rest`; threads that work for it call :meth:`progress`; any thread
    may read it. While there is work, beats must come within ``EngineConfig.step_deadline_s`` of each other. A beat is a
    finished step, a layer of a long step, or a completed copy, search or cancellation; a loop without results makes no
    beat. Progress is a reply of another node, or its timeout: a search that asks several nodes in turn may wait several
    times. ``clock`` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.beats = 0
        self._last_s = clock()
        self._resting = False
        self._lock = threading.Lock()

    def beat(self) -> None:
        """Work was done, or a request arrived."""
        self.progress()
        self._resting = False

    def progress(self) -> None:
        """A part of the engine's work was done. Does not end a rest."""
        with self._lock:
            self._last_s = self.clock()
            self.beats += 1

    def rest(self) -> None:
        """The engine is idle until the next beat."""
        self._resting = True

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat, 0 at rest."""
        last_s = self._last_s  # read it first: a beat sets it before it ends a rest
        return 0.0 if self._resting else max(self.clock() - last_s, 0.0)
