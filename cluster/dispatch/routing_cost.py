"""Estimates each worker's time to the first token of a request, and sorts the workers by it."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from forecache.workers.core.worker_report import WorkerReport

CLOSE_SHARE, CLOSE_S = 0.1, 0.02
"""Workers whose expected time exceeds the earliest by less than this share, or this time, count as equal: the one with
the fewest requests is chosen."""

ALIKE = 2.0
"""A rate within this factor of the mean counts as the mean: smaller differences come from other work on the machine.
Else this noise would send all requests to one worker."""

SHORTER = 4.0
"""A worker's prefill rate is ignored if its prompts were this many times shorter than another worker's: with short
prompts it measures mostly the fixed cost of a step."""

CHOICE_S = 1.0
"""A request is sent to its chosen worker at once. After this time it went to another worker, or was cancelled."""


@dataclass(frozen=True)
class Rates:
    """The speeds of one worker. The defaults, a slow model and a slow network, hold until some worker has measured."""

    prefill_tokens_per_s: float = 500.0
    recall_bytes_per_s: float = 1e9
    fetch_bytes_per_s: float = 2e8
    requests_per_s: float = 1.0


@dataclass(frozen=True)
class Stored:
    """Stored chunks of a prompt's prefix, as seen by a worker: in its hot pool, in its node's memory, on other nodes.

    The rest of the prompt has to be prefilled.
    """

    hot: int = 0
    local: int = 0
    remote: int = 0

    @property
    def chunks(self) -> int:
        return self.hot + self.local + self.remote


@dataclass(frozen=True)
class FirstToken:
    """The expected time to a request's first token at one worker, by cause."""

    queue_s: float
    prefill_tokens: int
    prefill_s: float
    fetch_s: float
    recall_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.fetch_s + self.recall_s


class Backlog:
    """Estimates the prompt tokens that were sent to a worker and are not prefilled yet, by its current speed."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self.last_s = 0.0
        """When the worker last received a request."""

    def tokens(self, now_s: float, rates: Rates) -> float:
        return max(self._tokens - (now_s - self.last_s) * rates.prefill_tokens_per_s, 0.0)

    def add(self, tokens: float, now_s: float, rates: Rates) -> None:
        self._tokens = self.tokens(now_s, rates) + tokens
        self.last_s = now_s

    def subtract(self, tokens: float) -> None:
        """So many ``tokens`` were counted but not sent."""
        self._tokens = max(self._tokens - tokens, 0.0)

    def update(self, tokens_left: int, now_s: float, rates: Rates) -> None:
        """The worker reports ``tokens_left``. Fewer than expected are ignored: the last requests may not be in it."""
        behind = tokens_left - self.tokens(now_s, rates)
        if behind > 0:
            self.add(behind, now_s, rates)


class Load:
    """The number of requests at a worker, as one router knows it.

    It counts the requests that it sent itself, and estimates those of other routers from the worker's reports.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._peaks = 0, 0
        """The most requests of this router at one time: since the last report, and between the two reports before."""
        self._of_other_routers = 0
        self._chosen_s: deque[float] = deque()
        """Times at which the worker was chosen for requests that are not sent yet."""

    def requests(self, now_s: float) -> int:
        while self._chosen_s and now_s - self._chosen_s[0] > CHOICE_S:
            self._chosen_s.popleft()
        return len(self._chosen_s) + self._sent + self._of_other_routers

    def chosen(self, now_s: float) -> None:
        """Count a request before it is sent, so that requests that arrive together don't all choose this worker."""
        self._chosen_s.append(now_s)

    def undo_choice(self, chosen_s: float) -> None:
        """Uncount the request of ``chosen_s``, for which another worker is chosen now. It may be counted as sent."""
        if chosen_s in self._chosen_s:
            self._chosen_s.remove(chosen_s)

    def sent(self) -> None:
        if self._chosen_s:
            self._chosen_s.popleft()
        self._sent += 1
        self._peaks = max(self._peaks[0], self._sent), self._peaks[1]

    def ended(self) -> None:
        self._sent = max(self._sent - 1, 0)

    def update(self, requests: int) -> None:
        """The worker reports so many ``requests``; those beyond this router's recent peak are other routers'."""
        self._of_other_routers = max(requests - max(self._peaks), 0)
        self._peaks = self._sent, self._peaks[0]


def measured_rates(reports: Iterable[WorkerReport]) -> list[Rates]:
    """The rates of each worker: the mean of all measured ones, unless its own differs from it by ``ALIKE`` or more."""
    reports = list(reports)
    longest = max((report.prefill_tokens_per_prompt or 0 for report in reports), default=0)

    def prefill(report: WorkerReport) -> float | None:
        tokens = report.prefill_tokens_per_prompt
        return None if tokens is not None and tokens * SHORTER < longest else report.prefill_tokens_per_s

    def column(rate: Callable[[WorkerReport], float | None], default: float) -> list[float]:
        measured = [value for report in reports if (value := rate(report))]
        mean = fmean(measured) if measured else default
        values = [rate(report) or mean for report in reports]
        return [mean if mean / ALIKE <= value <= mean * ALIKE else value for value in values]

    default = Rates()
    columns = (
        column(prefill, default.prefill_tokens_per_s),
        column(lambda report: report.recall_bytes_per_s, default.recall_bytes_per_s),
        column(lambda report: report.fetch_bytes_per_s, default.fetch_bytes_per_s),
        column(lambda report: report.requests_per_s, default.requests_per_s),
    )
    return [Rates(*row) for row in zip(*columns, strict=True)]


def slot_wait_s(load: int, report: WorkerReport, rates: Rates) -> float:
    """Expected seconds until a worker with ``load`` requests has room for one more in its batch.

    The batch has room for ``batch_size`` requests; while some wait for hot slots, for as many as run now.
    """
    room = max(report.running, 1) if report.waiting else report.batch_size
    return max(load + 1 - room, 0) / rates.requests_per_s


def first_token(
    tokens: int, chunk_tokens: int, stored: Stored, report: WorkerReport, rates: Rates, queue_s: float
) -> FirstToken:
    """The expected time to the first token of a prompt of ``tokens``, after ``queue_s`` in the queue.

    The last token is always computed, even if it is stored.
    """
    computed = max(tokens - stored.chunks * chunk_tokens, 1)
    return FirstToken(
        queue_s,
        prefill_tokens=computed,
        prefill_s=computed / rates.prefill_tokens_per_s,
        fetch_s=stored.remote * report.chunk_bytes / rates.fetch_bytes_per_s,
        recall_s=stored.local * report.chunk_bytes / rates.recall_bytes_per_s,
    )


def order(prices: Mapping[str, FirstToken], loads: Mapping[str, int], imbalance: int) -> list[str]:
    """Sort the workers, the best first; equal ones stay in the order of ``prices``.

    The earliest first token wins; among those that count as equal to it, the fewest requests. Workers with
    ``imbalance`` more requests than the least loaded one come last, whatever they have stored: a prefix can be computed
    again, but streams that share one worker stay slow.
    """
    least = min(loads.values())
    crowded = {name for name in prices if loads[name] - least >= imbalance}
    earliest_s = min(price.total_s for name, price in prices.items() if name not in crowded)
    close_s = max(earliest_s * (1 + CLOSE_SHARE), earliest_s + CLOSE_S)

    def rank(name: str) -> tuple[bool, bool, int, float]:
        total_s = prices[name].total_s
        close = total_s <= close_s
        return name in crowded, not close, loads[name] if close else 0, total_s

    return sorted(prices, key=rank)
