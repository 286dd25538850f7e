"""What a worker reports to the router every few seconds: its load and its recent speed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from forecache.workers.core.stats import EngineStats
from forecache.workers.memory.arena.stats import TierStats

DECAY = 0.8
"""Weight that earlier reports keep at each new one."""


class MovingRate:
    """Amount per unit of work (a second, a prompt), averaged over the recent reports with any work.

    Reports are weighted by their amount: bulk work takes the most time, and small pieces are slower because each has a
    fixed cost.
    """

    def __init__(self) -> None:
        self._seen = (0.0, 0.0)
        self._amount = self._work = 0.0

    @property
    def value(self) -> float | None:
        """``None`` before any work."""
        return self._amount / self._work if self._amount and self._work else None

    def observe(self, amount: float, work: float) -> None:
        """Take the counters since start. If they are lower than before, the worker has restarted."""
        more, more_work = amount - self._seen[0], work - self._seen[1]
        self._seen = amount, work
        if more > 0 and more_work > 0:
            self._amount = DECAY * self._amount + more * more
            self._work = DECAY * self._work + more * more_work


@dataclass(frozen=True)
class WorkerReport:
    """A worker's load and speed. Rates are ``None`` until measured; bytes are those of chunks in cold memory.

    Attributes:
        layout_fingerprint: names the format of its chunks; part of their keys.
        tier_id: the memory tier of its node.
        batch_size: most sequences in a batch.
        prefill_tokens_left: tokens left to prefill, of admitted prompts.
        prefill_tokens_per_prompt: tokens that a prompt needed to prefill, without its stored prefix.
        requests_per_s: requests finished per second of steps.
    """

    layout_fingerprint: str = ""
    tier_id: str = ""
    chunk_bytes: int = 0
    batch_size: int = 1
    running: int = 0
    waiting: int = 0
    prefill_tokens_left: int = 0
    prefill_tokens_per_s: float | None = None
    prefill_tokens_per_prompt: float | None = None
    recall_bytes_per_s: float | None = None
    fetch_bytes_per_s: float | None = None
    requests_per_s: float | None = None

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Self:
        """From Ray Serve's routing stats, which are empty until the worker's first report arrives."""
        return cls(**{field.name: stats[field.name] for field in fields(cls) if field.name in stats})


class Reporter:
    """Makes the reports of one worker; ``chunk_bytes``: of a chunk in cold memory."""

    def __init__(self, layout_fingerprint: str, tier_id: str, chunk_bytes: int, batch_size: int) -> None:
        self._identity = layout_fingerprint, tier_id, chunk_bytes, batch_size
        self._prefill, self._prompt, self._recall = MovingRate(), MovingRate(), MovingRate()
        self._fetch, self._requests = MovingRate(), MovingRate()
        self._prefilled_prompts = 0

    def report(self, engine: EngineStats, tier: TierStats | None) -> WorkerReport:
        """The report for these numbers; ``tier`` is ``None`` if it does not answer."""
        self._prefill.observe(engine.prefilled_tokens, engine.prefill_s)
        if engine.prefilled_prompts > self._prefilled_prompts:  # a long prompt spans several reports
            self._prompt.observe(engine.prefilled_tokens, engine.prefilled_prompts)
            self._prefilled_prompts = engine.prefilled_prompts
        self._recall.observe(engine.counters.recall_bytes, engine.counters.recall_s)
        self._requests.observe(engine.counters.finished_requests, engine.counters.step_s)
        if tier is not None:
            self._fetch.observe(tier.fetched_bytes, tier.fetch_s)
        return WorkerReport(
            *self._identity,
            running=engine.running,
            waiting=engine.waiting,
            prefill_tokens_left=engine.prefill_tokens_left,
            prefill_tokens_per_s=self._prefill.value,
            prefill_tokens_per_prompt=self._prompt.value,
            recall_bytes_per_s=self._recall.value,
            fetch_bytes_per_s=self._fetch.value,
            requests_per_s=self._requests.value,
        )
