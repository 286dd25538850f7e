"""When each worker would have a request's first token, in expected seconds, and who is asked first."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from forecache.workers.core.worker_report import WorkerReport

CLOSE_SHARE, CLOSE_S = 0.1, 0.02
"""First tokens that come this much after the earliest, or within this time, are as good: the shorter queue is taken."""

ALIKE = 2.0
"""A rate that differs less than by this factor from the mean is taken for it: the difference is what a worker had to do
beside, or what else its machine did. Else noise would send all that comes to one worker, streams and all."""

SHORTER = 4.0
"""A prefill rate measured in prompts that were shorter by this factor than another worker's is not taken for its own:
each step has a cost of its own, which is nearly all that short prompts measure."""

CHOICE_S = 1.0
"""Who was chosen is sent the request at once. Later than this it went elsewhere, or was cancelled."""


@dataclass(frozen=True)
class Rates:
    """Of one worker. The defaults stand until any worker has measured: a slow model, a slow network."""

    prefill_tokens_per_s: float = 500.0
    recall_bytes_per_s: float = 1e9
    fetch_bytes_per_s: float = 2e8
    requests_per_s: float = 1.0


@dataclass(frozen=True)
class Stored:
    """Chunks of a prompt's beginning, from a worker's point of view: on its GPU, in its node's memory, on other nodes.
    What follows them is prefilled."""

    hot: int = 0
    local: int = 0
    remote: int = 0

    @property
    def chunks(self) -> int:
        return self.hot + self.local + self.remote


@dataclass(frozen=True)
class FirstToken:
    """Expected seconds until a request's first token at one worker, by what they are spent on."""

    queue_s: float
    prefill_tokens: int
    prefill_s: float
    fetch_s: float
    recall_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.fetch_s + self.recall_s


class Backlog:
    """Prompt tokens that a worker was sent and should not have prefilled yet, at the rate that it does so now."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self.last_s = 0.0
        """When the worker was last sent something."""

    def tokens(self, now_s: float, rates: Rates) -> float:
        return max(self._tokens - (now_s - self.last_s) * rates.prefill_tokens_per_s, 0.0)

    def add(self, tokens: float, now_s: float, rates: Rates) -> None:
        self._tokens = self.tokens(now_s, rates) + tokens
        self.last_s = now_s

    def take_back(self, tokens: float) -> None:
        """So many were not sent after all."""
        self._tokens = max(self._tokens - tokens, 0.0)

    def hear(self, tokens_left: int, now_s: float, rates: Rates) -> None:
        """The worker itself has so many left. It may not have seen the last ones yet, so that fewer say nothing."""
        behind = tokens_left - self.tokens(now_s, rates)
        if behind > 0:
            self.add(behind, now_s, rates)


class Load:
    """Requests at a worker, as one router knows them: its own to the last one, other routers' from what the worker
    tells now and then of all that it has."""

    def __init__(self) -> None:
        self._sent = 0
        self._peaks = 0, 0
        """The most of its own that there were at once, since the last report and between the two before."""
        self._others = 0
        self._chosen_s: deque[float] = deque()
        """When the worker was chosen for requests that are not sent yet."""

    def requests(self, now_s: float) -> int:
        while self._chosen_s and now_s - self._chosen_s[0] > CHOICE_S:
            self._chosen_s.popleft()
        return len(self._chosen_s) + self._sent + self._others

    def chosen(self, now_s: float) -> None:
        """What comes at the same moment must not all choose the same worker."""
        self._chosen_s.append(now_s)

    def take_back(self, chosen_s: float) -> None:
        """What the worker was chosen for then is asked for again; it may have been sent meanwhile, and refused."""
        if chosen_s in self._chosen_s:
            self._chosen_s.remove(chosen_s)

    def sent(self) -> None:
        if self._chosen_s:
            self._chosen_s.popleft()
        self._sent += 1
        self._peaks = max(self._peaks[0], self._sent), self._peaks[1]

    def ended(self) -> None:
        self._sent = max(self._sent - 1, 0)

    def hear(self, requests: int) -> None:
        """The worker had so many of late. As many as there were of this router's own may be these."""
        self._others = max(requests - max(self._peaks), 0)
        self._peaks = self._sent, self._peaks[0]


def measured_rates(reports: Iterable[WorkerReport]) -> list[Rates]:
    """Each worker's rates: the mean of all that have measured, unless its own is far from that."""
    reports = list(reports)
    longest = max((report.prefill_tokens_per_prompt or 0 for report in reports), default=0)

    def prefill(report: WorkerReport) -> float | None:
        tokens = report.prefill_tokens_per_prompt
        return None if tokens is not None and tokens * SHORTER < longest else report.prefill_tokens_per_s

    def column(rate: Callable[[WorkerReport], float | None], default: float) -> list[float]:
        measured = [value for report in reports if (value := rate(report))]
        mean = fmean(measured) if measured else default
        own = [rate(report) or mean for report in reports]
        return [mean if mean / ALIKE <= value <= mean * ALIKE else value for value in own]

    default = Rates()
    columns = (
        column(prefill, default.prefill_tokens_per_s),
        column(lambda report: report.recall_bytes_per_s, default.recall_bytes_per_s),
        column(lambda report: report.fetch_bytes_per_s, default.fetch_bytes_per_s),
        column(lambda report: report.requests_per_s, default.requests_per_s),
    )
    return [Rates(*row) for row in zip(*columns, strict=True)]


def slot_wait_s(load: int, report: WorkerReport, rates: Rates) -> float:
    """Until a worker with ``load`` requests has room in its batch for one more: it lets in ``batch_size``, or as many
    as run while some wait for hot slots."""
    room = max(report.running, 1) if report.waiting else report.batch_size
    return max(load + 1 - room, 0) / rates.requests_per_s


def first_token(
    tokens: int, chunk_tokens: int, stored: Stored, report: WorkerReport, rates: Rates, queue_s: float
) -> FirstToken:
    """Of a prompt of so many ``tokens``, behind a queue of ``queue_s``. The last token is always computed."""
    computed = max(tokens - stored.chunks * chunk_tokens, 1)
    return FirstToken(
        queue_s,
        prefill_tokens=computed,
        prefill_s=computed / rates.prefill_tokens_per_s,
        fetch_s=stored.remote * report.chunk_bytes / rates.fetch_bytes_per_s,
        recall_s=stored.local * report.chunk_bytes / rates.recall_bytes_per_s,
    )


def order(prices: Mapping[str, FirstToken], loads: Mapping[str, int], imbalance: int) -> list[str]:
    """Workers, best first; of equal ones who comes first in ``prices``.

    The earliest first token wins, and of those that are as good as the earliest the shortest queue. Who has
    ``imbalance`` more requests than the least loaded worker comes last, whatever it has stored: a prefix can be
    computed again, while streams that share one worker stay slow.
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
