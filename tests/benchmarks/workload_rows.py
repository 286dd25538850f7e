"""The rows of `bench_workloads.py` without any engine: sizes, arrivals and prompts, and what their figures mean."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from forecache.cluster.cli.load_workloads import mixed_sizes, poisson_arrivals_s

PERCENTILES = (50, 90, 99, 100)
BURST = re.compile(r"(\d+)x(\d+)\+(\d+)")
BESIDE = re.compile(r"(\d+)@(\d+)")
FIRST_TOKEN_ID = 10
"""Smaller ids are left to special tokens."""


@dataclass(frozen=True)
class Turn:
    """One request of a session: tokens that follow its history, and tokens of the answer."""

    new_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Session:
    """Turns that grow one history; each is sent when the previous answer is complete.

    Attributes:
        start_s: when the first one is sent, in seconds from the start of the row.
        after_tokens: instead, it is sent when every other session has so many tokens of its answer.
    """

    turns: tuple[Turn, ...]
    start_s: float = 0.0
    kind: str = "request"
    after_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the history at the end."""
        return sum(turn.new_tokens + turn.answer_tokens for turn in self.turns)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the rows `sessions` and `mixed`, and of the streams of `STREAMS@PROMPT`, in tokens."""

    sessions: int
    history_tokens: int
    turns: int
    turn_tokens: int
    answer_tokens: int
    mixed_requests: int
    chat_tokens: int
    document_tokens: int
    stream_prompt_tokens: int
    stream_answer_tokens: int
    document_share: float = 0.25


SIZES = {
    "full": Sizes(12, 65536, 6, 256, 256, 128, 2048, 32768, 512, 2048),
    "small": Sizes(3, 384, 3, 32, 8, 12, 32, 512, 48, 256),
}
ROWS = {
    "full": ("64x2048+256", "8x32768+256", "4x131072+256", "sessions", "mixed"),
    "small": ("8x64+8", "2x512+8", "sessions", "mixed"),
}


class RowError(ValueError):
    """The row does not exist; the message says which do."""


def burst(row: str) -> list[Session] | None:
    """`REQUESTSxPROMPT+ANSWER`: so many unique prompts, all sent at once; ``None`` if ``row`` is not of this form."""
    found = BURST.fullmatch(row)
    if found is None:
        return None
    requests, prompt, answer = (int(number) for number in found.groups())
    if not requests or not prompt or not answer:
        raise RowError(f"{row} is empty: REQUESTSxPROMPT+ANSWER are numbers above 0")
    return [Session((Turn(prompt, answer),))] * requests


def beside(row: str, sizes: Sizes) -> list[Session] | None:
    """`STREAMS@PROMPT`: a prompt that is sent when so many streams decode; ``None`` if ``row`` is not of this form."""
    found = BESIDE.fullmatch(row)
    if found is None:
        return None
    streams, prompt = (int(number) for number in found.groups())
    if not streams or not prompt:
        raise RowError(f"{row} is empty: STREAMS@PROMPT are numbers above 0")
    stream = Session((Turn(sizes.stream_prompt_tokens, sizes.stream_answer_tokens),), kind="stream")
    settled = sizes.stream_answer_tokens // 8
    return [*[stream] * streams, Session((Turn(prompt, 1),), kind="document", after_tokens=settled)]


def sessions_of(row: str, sizes: Sizes, seed: int, rate_per_s: float | None) -> list[Session]:
    """The sessions of a row, a function of its arguments.

    Args:
        rate_per_s: of the row `mixed`: arrivals per second, as a Poisson process; ``None``: all at once.

    Raises:
        RowError: no such row.
    """
    if (sent_at_once := burst(row)) is not None:
        return sent_at_once
    if (streams := beside(row, sizes)) is not None:
        return streams
    if row == "sessions":
        later = [Turn(sizes.turn_tokens, sizes.answer_tokens)] * (sizes.turns - 1)
        first = Turn(sizes.history_tokens + sizes.turn_tokens, sizes.answer_tokens)
        return [Session((first, *later), kind="session")] * sizes.sessions
    if row == "mixed":
        count = sizes.mixed_requests
        lengths = mixed_sizes(
            count, sizes.chat_tokens, sizes.document_tokens, sizes.document_share, random.Random(seed)
        )
        starts_s = [0.0] * count if rate_per_s is None else list(islice(poisson_arrivals_s(rate_per_s, seed), count))
        return [
            Session((Turn(tokens, sizes.answer_tokens),), start_s, kind)
            for (kind, tokens), start_s in zip(lengths, starts_s, strict=True)
        ]
    raise RowError(f"there is no row {row}: give sessions, mixed, REQUESTSxPROMPT+ANSWER or STREAMS@PROMPT")


def most_tokens(sessions: Sequence[Session]) -> int:
    """Tokens of the longest history."""
    return max(session.tokens for session in sessions)


class Prompts:
    """Random token ids, different for each ``run``: no prompt finds a part of another one stored."""

    def __init__(self, vocab_size: int, seed: int, run: str) -> None:
        self._generator = random.Random(f"{seed} {run}")
        self._vocab_size = vocab_size

    def draw(self, tokens: int) -> list[int]:
        return self._generator.choices(range(FIRST_TOKEN_ID, self._vocab_size), k=tokens)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, as p100; empty without values."""
    if not values:
        return {}
    return {
        f"p{p}": round(float(value), 6)
        for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def keeps_up(due_s: Sequence[float], first_token_s: Sequence[float], slack_s: float) -> bool:
    """Whether an engine sustained the arrivals of a run: its queue did not grow.

    Args:
        due_s: when each request was sent, in order.
        first_token_s: how long each waited for its first token.
        slack_s: growth that is not counted, as one long prompt makes some wait.

    The median wait of the last third of the requests is at most 2.5 times that of the first third, plus ``slack_s``: a
    queue that grows steadily makes it 5 times as long, a steady one leaves it as it is.
    """
    assert len(due_s) == len(first_token_s) and list(due_s) == sorted(due_s)
    third = len(due_s) // 3
    if not third:
        return True
    first, last = (float(np.median(part)) for part in (first_token_s[:third], first_token_s[-third:]))
    return last <= 2.5 * first + slack_s


def highest_rate(low: float, high: float, sustained: Callable[[float], bool], runs: int) -> float:
    """The highest rate found to be sustained, by bisection with ``runs`` calls of ``sustained``.

    Args:
        low: a rate that is sustained; returned if no higher one is.
        high: a rate that is not.
    """
    for _ in range(runs):
        middle = (low + high) / 2
        if sustained(middle):
            low = middle
        else:
            high = middle
    return low
