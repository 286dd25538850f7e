"""The event loop of an ingress carries everybody's streams: long work on it is done a piece at a time."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Counts work on the event loop, and lets others have a turn after every ``units`` of it."""

    def __init__(self, units: int) -> None:
        self._units = units
        self._done = 0

    async def did(self, units: int = 1) -> None:
        """So much was done since the last call."""
        self._done += units
        if self._done >= self._units:
            self._done = 0
            await asyncio.sleep(0)


async def in_pieces(values: Sequence[T], turns: Turns, length: int) -> AsyncIterator[Sequence[T]]:
    """``values``, ``length`` at a time, each a unit of work for every value."""
    for start in range(0, len(values), length):
        piece = values[start : start + length]
        yield piece
        await turns.did(len(piece))
