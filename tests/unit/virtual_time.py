"""Event loops whose clock jumps to the next timer, so that tests of deadlines take no time."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumps(selectors.DefaultSelector):
    """A selector that never waits: if nothing is ready, the clock jumps to the next timer."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.now_s += timeout
        return ready


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time that starts at 0 s."""

    def make_loop() -> asyncio.AbstractEventLoop:
        jumps = _Jumps()
        loop = asyncio.SelectorEventLoop(jumps)
        loop.time = lambda: jumps.now_s  # type: ignore[method-assign]
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()
