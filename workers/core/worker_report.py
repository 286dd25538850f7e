"""How fast a worker was of late, and what else the router is told of it every few seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from forecache.workers.core.stats import EngineStats
from forecache.workers.memory.arena.stats import TierStats

MEMORY = 0.8
"""What was done before the last report counts this much of what it did there."""


class MovingRate:
    """Amount per unit of work (a second, a prompt), over the last few reports in which any was done.

    Each counts by its amount: work in bulk is what takes long, and small pieces are slower than it, since each has a
    cost of its own.
    """

    def __init__(self) -> None:
        self._seen = (0.0, 0.0)
        self._amount = self._work = 0.0

    @property
    def value(self) -> float | None:
        """``None`` before anything was done."""
        return self._amount / self._work if self._amount and self._work else None

    def observe(self, amount: float, work: float) -> None:
        """Counters since start: so much was done, in so much work. Lower ones than before: they began anew."""
        more, more_work = amount - self._seen[0], work - self._seen[1]
        self._seen = amount, work
        if more > 0 and more_work > 0:
            self._amount = MEMORY * self._amount + more * more
            self._work = MEMORY * self._work + more * more_work


@dataclass(frozen=True)
class WorkerReport:
    """A worker to the router. Rates are ``None`` until measured; bytes are those of cold chunks.

    ``prefill_tokens_left``: of prompts whose prefill has begun. ``prefill_tokens_per_prompt``: what had to be prefilled
    of a prompt, where the rate was measured. ``requests_per_s``: answered per second of steps.
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
        """From Ray Serve's routing stats, which are empty until the worker's first report has come."""
        return cls(**{field.name: stats[field.name] for field in fields(cls) if field.name in stats})


class Reporter:
    """Makes the reports of one worker. ``chunk_bytes``: of a chunk in cold memory."""

    def __init__(self, layout_fingerprint: str, tier_id: str, chunk_bytes: int, batch_size: int) -> None:
        self._who = layout_fingerprint, tier_id, chunk_bytes, batch_size
        self._prefill, self._prompt, self._recall = MovingRate(), MovingRate(), MovingRate()
        self._fetch, self._requests = MovingRate(), MovingRate()
        self._prefilled_prompts = 0

    def report(self, engine: EngineStats, tier: TierStats | None) -> WorkerReport:
        """``tier``: ``None`` while it does not answer."""
        self._prefill.observe(engine.prefilled_tokens, engine.prefill_s)
        if engine.prefilled_prompts > self._prefilled_prompts:  # a long one takes several reports
            self._prompt.observe(engine.prefilled_tokens, engine.prefilled_prompts)
            self._prefilled_prompts = engine.prefilled_prompts
        self._recall.observe(engine.recall_bytes, engine.recall_s)
        self._requests.observe(engine.finished_requests, engine.step_s)
        if tier is not None:
            self._fetch.observe(tier.fetched_bytes, tier.fetch_s)
        return WorkerReport(
            *self._who,
            running=engine.running,
            waiting=engine.waiting,
            prefill_tokens_left=engine.prefill_tokens_left,
            prefill_tokens_per_s=self._prefill.value,
            prefill_tokens_per_prompt=self._prompt.value,
            recall_bytes_per_s=self._recall.value,
            fetch_bytes_per_s=self._fetch.value,
            requests_per_s=self._requests.value,
        )
