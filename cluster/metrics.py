"""Every Prometheus series of forecache, defined once. Components below expose frozen stats; this maps them."""

import time
from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forecache.workers.decode.messages import TokenEvent
from forecache.workers.decode.stats import EngineStats
from forecache.workers.memory.protocol import TierStats

if TYPE_CHECKING:
    from forecache.workers.decode.worker import WorkerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class _Counter:
    """A counter summed over workers or tiers, from one field of their stats."""

    name: str
    help: str
    field: str


_ENGINE_COUNTERS = (
    _Counter("forecache_prefix_cache_queries", "Prompt tokens looked up in the cache.", "prefix_queried_tokens"),
    _Counter("forecache_prefix_cache_hits", "Prompt tokens found in the cache.", "prefix_hit_tokens"),
    _Counter("forecache_recalled_chunks", "Chunks copied from cold memory to the hot pool.", "recalled_chunks"),
    _Counter("forecache_recall_bytes", "Bytes copied from cold memory to the hot pool.", "recall_bytes"),
    _Counter("forecache_recall_seconds", "Seconds that copies from cold memory to the hot pool took.", "recall_s"),
    _Counter(
        "forecache_written_back_chunks",
        "Chunks copied from the hot pool to cold memory.",
        "written_back_chunks",
    ),
    _Counter("forecache_prefetch_stall_seconds", "Seconds that steps waited for a recall.", "prefetch_stall_s"),
    _Counter("forecache_lookahead_windows", "Windows begun.", "windows"),
    _Counter("forecache_lookahead_late", "Windows whose prediction or copies were late.", "late_windows"),
    _Counter("forecache_lookahead_failed", "Windows without a prediction.", "failed_predictions"),
    _Counter("forecache_lookahead_hits", "Chunks with retrieval events that were resident.", "event_hits"),
    _Counter("forecache_lookahead_misses", "Chunks with retrieval events that were not resident.", "event_misses"),
    _Counter("forecache_fallbacks", "Budgets doubled for low coverage, full attention included.", "fallbacks"),
    _Counter("forecache_fallbacks_refused", "Budgets not doubled for want of hot slots.", "refused_fallbacks"),
    _Counter("forecache_lost_chunks", "Chunks whose stored bytes were gone or wrong.", "lost_chunks"),
    _Counter("forecache_prompt_tokens", "Prompt tokens of admitted requests.", "prompt_tokens"),
    _Counter("forecache_generation_tokens", "Tokens generated.", "generated_tokens"),
    _Counter("forecache_requests_finished", "Requests answered to the end.", "finished_requests"),
    _Counter("forecache_requests_cancelled", "Requests whose client went away.", "cancelled_requests"),
    _Counter("forecache_requests_failed", "Requests that failed on a worker.", "failed_requests"),
)

_TIER_COUNTERS = (
    _Counter("forecache_memory_tier_fetched_chunks", "Chunks brought from other nodes.", "fetched_chunks"),
    _Counter("forecache_memory_tier_fetched_bytes", "Bytes brought from other nodes.", "fetched_bytes"),
    _Counter("forecache_memory_tier_moved_chunks", "Chunks moved to nodes with room.", "moved_chunks"),
    _Counter("forecache_memory_tier_replicated_chunks", "Chunks copied to other nodes.", "replicated_chunks"),
    _Counter("forecache_memory_tier_spilled_chunks", "Chunks written to disk.", "spilled_chunks"),
    _Counter("forecache_memory_tier_disk_recalled_chunks", "Chunks read from disk.", "disk_recalled_chunks"),
    _Counter("forecache_memory_tier_evicted_chunks", "Chunks that others took the place of.", "evicted_chunks"),
    _Counter("forecache_memory_tier_dropped_chunks", "Chunks whose bytes were found wrong.", "dropped_chunks"),
)


class WorkerCollector(Collector):
    """The workers' and tiers' stats of the last :meth:`update`, summed over the workers of a model."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._workers: Sequence[WorkerStats] = ()

    def update(self, workers: "Sequence[WorkerStats]") -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        engines = [worker.engine for worker in self._workers]
        for counter in _ENGINE_COUNTERS:
            yield self._counter(counter, engines)
        yield self._gauge("forecache_num_requests_running", "Requests in the batch.", sum(e.running for e in engines))
        yield self._gauge("forecache_num_requests_waiting", "Requests not admitted.", sum(e.waiting for e in engines))
        yield self._gauge(
            "forecache_hot_pool_usage_perc",
            "Hot slots that live sequences reference / all, 0 to 1.",
            _ratio(sum(e.hot_slots_referenced for e in engines), sum(e.hot_slots for e in engines)),
        )
        yield self._gauge(
            "forecache_resident_ratio",
            "Resident chunks / all chunks of running sequences; mean over workers by requests.",
            _resident_ratio(engines),
        )
        # workers of one node share its tier
        tiers = {worker.node_id: worker.tier for worker in self._workers if worker.tier is not None}
        yield self._gauge(
            "forecache_memory_tier_usage_perc",
            "Arena slots in use / all, over the nodes, 0 to 1.",
            _ratio(sum(tier.used_slots for tier in tiers.values()), sum(tier.slots for tier in tiers.values())),
        )
        yield self._gauge(
            "forecache_memory_tier_held_perc",
            "Arena slots that sequences hold, so that nothing can take their place / all, 0 to 1.",
            _ratio(sum(tier.held_slots for tier in tiers.values()), sum(tier.slots for tier in tiers.values())),
        )
        yield self._gauge(
            "forecache_memory_tier_disk_usage_perc",
            "Chunk slots on disk in use / all, over the nodes, 0 to 1.",
            _ratio(sum(t.disk_used_slots for t in tiers.values()), sum(t.disk_slots for t in tiers.values())),
        )
        yield self._gauge("forecache_memory_tiers", "Memory tiers of the workers' nodes that answered.", len(tiers))
        fallbacks = CounterMetricFamily(
            "forecache_indexer_fallbacks",
            "Predictions that a worker made itself since its indexer actor did not answer.",
            labels=["model_name"],
        )
        fallbacks.add_metric([self._model_name], sum(worker.scorer.fallbacks for worker in self._workers))
        yield fallbacks
        scorers = GaugeMetricFamily(
            "forecache_indexer_info",
            "Workers by what scores their chunks: trained (with the checkpoint's digest), training-free or bounds.",
            labels=["model_name", "scorer", "checkpoint"],
        )
        for (name, digest), count in Counts((w.scorer.name, w.scorer.digest) for w in self._workers).items():
            scorers.add_metric([self._model_name, name, digest], count)
        yield scorers
        yield self._gauge(
            "forecache_memory_tier_pinned_slots",
            "Arena slots that sessions have pinned.",
            sum(tier.pinned_slots for tier in tiers.values()),
        )
        for counter in _TIER_COUNTERS:
            yield self._counter(counter, tiers.values())
        yield self._gauge("forecache_workers", "Decode workers that answered.", len(self._workers))

    def _counter(self, counter: _Counter, stats: Iterable[EngineStats | TierStats]) -> CounterMetricFamily:
        family = CounterMetricFamily(counter.name, counter.help, labels=["model_name"])
        family.add_metric([self._model_name], sum(getattr(one, counter.field) for one in stats))
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _resident_ratio(engines: Sequence[EngineStats]) -> float:
    running = sum(engine.running for engine in engines)
    if running == 0:
        return 1.0
    return sum(engine.resident_ratio * engine.running for engine in engines) / running


class Metrics:
    """The ingress' registry: its own request series, and what the workers report."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series per series, of use to nobody here
        self.model_name = model_name
        self.workers = WorkerCollector(model_name)
        self._registry = CollectorRegistry(auto_describe=True)
        self._registry.register(self.workers)
        self._first_token_s = self._histogram("forecache_time_to_first_token_seconds", "Request to first token.")
        self._inter_token_s = self._histogram("forecache_inter_token_latency_seconds", "Between two tokens.")
        self._end_to_end_s = self._histogram("forecache_e2e_request_latency_seconds", "Request to last token.")
        self._queue_s = self._histogram("forecache_request_queue_time_seconds", "Request to admission.")
        self._coverage = self._histogram(
            "forecache_attention_coverage",
            "Share of a request's retrieval-event mass on resident chunks, 0 to 1; requests without events left out.",
            _SHARES,
        )
        self._errors = Counter(
            "forecache_errors",
            "Requests that got an error, by its code.",
            ["model_name", "kind"],
            registry=self._registry,
        )

    def error(self, kind: str) -> None:
        self._errors.labels(self.model_name, kind).inc()

    def request(self) -> "RequestTimer":
        return RequestTimer(self, time.monotonic())

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return family.labels(self.model_name)


class RequestTimer:
    """Latencies of one request, as the ingress sees its events."""

    def __init__(self, metrics: Metrics, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._last_token_s: float | None = None

    def __call__(self, event: TokenEvent) -> None:
        now = time.monotonic()
        if event.token_ids:
            if self._last_token_s is None:
                self._metrics._first_token_s.observe(now - self._started_s)
            else:
                for _ in event.token_ids:
                    self._metrics._inter_token_s.observe((now - self._last_token_s) / len(event.token_ids))
            self._last_token_s = now
        if event.finish_reason is not None:
            self._metrics._end_to_end_s.observe(now - self._started_s)
            if event.stats is not None:
                self._metrics._queue_s.observe(event.stats.queue_s)
                if event.stats.coverage is not None:
                    self._metrics._coverage.observe(event.stats.coverage)
