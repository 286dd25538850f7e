"""Every Prometheus series of forecache, made from the frozen statistics of its processes.

Each process serves its own series, whose counters start at 0 and never fall. Prometheus adds them up.
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forecache.indexer.serving.protocol import IndexerStats
from forecache.workers.core.requests import TokenEvent
from forecache.workers.core.stats import RECALL_BOUNDS_S, EngineCounters, WorkerStats
from forecache.workers.memory.arena.stats import TierStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RECALLED = (
    "Chunks recalled from colder memory, by source: into a hot pool from its node's arena (local), into an arena "
    "from another node (remote) or from the node's disk (disk)."
)


@dataclass(frozen=True)
class _Counter:
    """A counter that is one field of a process' statistics."""

    name: str
    help: str
    field: str
    source: str | None = None


_ENGINE_COUNTERS = (
    _Counter("forecache_prefix_cache_queries", "Prompt tokens looked up in the cache.", "prefix_queried_tokens"),
    _Counter("forecache_prefix_cache_hits", "Prompt tokens found in the cache.", "prefix_hit_tokens"),
    _Counter("forecache_recalled_chunks", _RECALLED, "recalled_chunks", "local"),
    _Counter("forecache_recall_bytes", "Bytes copied from cold memory to the hot pool.", "recall_bytes"),
    _Counter(
        "forecache_written_back_chunks",
        "Chunks copied from the hot pool to cold memory.",
        "written_back_chunks",
    ),
    _Counter("forecache_prefetch_stall_seconds", "Seconds that steps waited for recalls.", "prefetch_stall_s"),
    _Counter("forecache_lookahead_windows", "Windows started.", "windows"),
    _Counter(
        "forecache_lookahead_late",
        "Windows whose prediction or recalls were late, so that they kept the old resident set.",
        "late_windows",
    ),
    _Counter("forecache_lookahead_failed", "Windows whose prediction failed.", "failed_predictions"),
    _Counter("forecache_lookahead_hits", "Retrieval events on resident chunks.", "event_hits"),
    _Counter("forecache_lookahead_misses", "Retrieval events on chunks that were not resident.", "event_misses"),
    _Counter(
        "forecache_fallbacks",
        "Budgets doubled because of low coverage, including switches to full attention.",
        "fallbacks",
    ),
    _Counter("forecache_fallbacks_refused", "Budgets not doubled because hot slots were missing.", "refused_fallbacks"),
    _Counter(
        "forecache_non_finite_steps",
        "Steps of a request that were discarded because keys, values or logits were infinite or NaN.",
        "non_finite_steps",
    ),
    _Counter("forecache_lost_chunks", "Chunks whose stored bytes were missing or wrong when needed.", "lost_chunks"),
    _Counter("forecache_prompt_tokens", "Prompt tokens of admitted requests.", "prompt_tokens"),
    _Counter("forecache_generation_tokens", "Tokens generated.", "generated_tokens"),
    _Counter("forecache_requests_finished", "Requests that ended with a complete answer.", "finished_requests"),
    _Counter("forecache_requests_cancelled", "Requests whose client disconnected.", "cancelled_requests"),
    _Counter("forecache_requests_failed", "Requests that failed on a worker.", "failed_requests"),
)

_TIER_COUNTERS = (
    _Counter("forecache_memory_tier_fetched_bytes", "Bytes fetched from other nodes.", "fetched_bytes"),
    _Counter("forecache_memory_tier_moved_chunks", "Chunks moved to other nodes for lack of room.", "moved_chunks"),
    _Counter("forecache_memory_tier_replicated_chunks", "Chunks replicated to other nodes.", "replicated_chunks"),
    _Counter("forecache_memory_tier_spilled_chunks", "Chunks written to disk.", "spilled_chunks"),
    _Counter("forecache_memory_tier_evicted_chunks", "Chunks evicted to make room.", "evicted_chunks"),
    _Counter(
        "forecache_memory_tier_dropped_chunks", "Chunks dropped because their checksum did not match.", "dropped_chunks"
    ),
)

_INDEXER_COUNTERS = (
    _Counter("forecache_indexer_predictions", "Predictions of an indexer actor.", "predictions"),
    _Counter("forecache_indexer_failed", "Predictions of an indexer actor that failed.", "failed_predictions"),
    _Counter("forecache_indexer_predict_seconds", "Seconds that an indexer actor spent scoring.", "predict_s"),
)


class StatsCollector(Collector):
    """Series of one process, made from ``stats()`` at each scrape, in the thread of the scrape."""

    def __init__(self, model_name: str, stats: Callable[[], object]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        build = GaugeMetricFamily(
            "forecache_build_info", "1 for each running process, with its version.", labels=["model_name", "version"]
        )
        build.add_metric([self._model_name, importlib.metadata.version("forecache")], 1)
        yield build
        stats = self._stats()
        if isinstance(stats, WorkerStats):
            yield from self._worker(stats)
        elif isinstance(stats, TierStats):
            yield from self._tier(stats)
        elif isinstance(stats, IndexerStats):
            yield from self._indexer(stats)

    def _worker(self, stats: WorkerStats) -> Iterable[Metric]:
        engine = stats.engine
        yield from self._counters(_ENGINE_COUNTERS, engine.counters)
        yield self._gauge("forecache_num_requests_running", "Requests in the batch.", engine.running)
        yield self._gauge("forecache_num_requests_waiting", "Requests that wait for admission.", engine.waiting)
        yield self._gauge(
            "forecache_hot_pool_usage_perc",
            "Hot slots that live sequences reference / all hot slots, 0 to 1.",
            _ratio(engine.hot_slots_referenced, engine.hot_slots),
        )
        yield self._gauge(
            "forecache_resident_ratio",
            "Mean of resident chunks / all chunks over running sequences; 1 if none runs.",
            engine.resident_ratio,
        )
        yield self._recall_seconds(engine.counters)
        yield self._counter(
            "forecache_indexer_fallbacks",
            "Predictions that a worker made itself because its indexer actor did not answer.",
            stats.scorer.fallbacks,
        )
        scorer = GaugeMetricFamily(
            "forecache_indexer_info",
            "What scores a worker's chunks: trained (with the digest of the checkpoint), training-free or bounds.",
            labels=["model_name", "scorer", "checkpoint"],
        )
        scorer.add_metric([self._model_name, stats.scorer.name, stats.scorer.digest], 1)
        yield scorer

    def _tier(self, tier: TierStats) -> Iterable[Metric]:
        for name, text, part, whole in (
            ("usage", "Arena slots in use / all arena slots, 0 to 1.", tier.used_slots, tier.slots),
            (
                "held",
                "Arena slots that sequences hold, which can't be evicted / all arena slots, 0 to 1.",
                tier.held_slots,
                tier.slots,
            ),
            (
                "promised",
                "Arena slots promised to sequences or pinned by sessions / all arena slots, 0 to 1.",
                tier.committed_slots,
                tier.slots,
            ),
            ("disk_usage", "Disk slots in use / all disk slots, 0 to 1.", tier.disk_used_slots, tier.disk_slots),
        ):
            yield self._gauge(f"forecache_memory_tier_{name}_perc", text, _ratio(part, whole))
        yield self._gauge("forecache_memory_tier_pinned_slots", "Arena slots pinned by sessions.", tier.pinned_slots)
        yield self._gauge(
            "forecache_memory_tier_quarantined_slots",
            "Arena slots reclaimed from a worker that may still write to them, so they are not reused yet.",
            tier.quarantined_slots,
        )
        yield self._gauge(
            "forecache_memory_tier_bad_slots",
            "Arena slots out of use because they held wrong bytes twice: the node's memory is bad.",
            tier.bad_slots,
        )
        yield self._gauge(
            "forecache_memory_tier_disk_bad_slots",
            "Disk slots out of use because they held wrong bytes twice: the node's disk is bad.",
            tier.disk_bad_slots,
        )
        yield from self._counters(_TIER_COUNTERS, tier)
        recalled = CounterMetricFamily("forecache_recalled_chunks", _RECALLED, labels=["model_name", "source"])
        recalled.add_metric([self._model_name, "remote"], tier.fetched_chunks)
        recalled.add_metric([self._model_name, "disk"], tier.disk_recalled_chunks)
        yield recalled

    def _indexer(self, stats: IndexerStats) -> Iterable[Metric]:
        yield from self._counters(_INDEXER_COUNTERS, stats)
        yield self._gauge("forecache_indexer_waiting", "Predictions that wait for an indexer actor.", stats.waiting)

    def _counters(self, counters: Sequence[_Counter], stats: object) -> Iterable[Metric]:
        for counter in counters:
            yield self._counter(counter.name, counter.help, getattr(stats, counter.field), counter.source)

    def _counter(self, name: str, text: str, value: float, source: str | None = None) -> Metric:
        labels = {"model_name": self._model_name} | ({} if source is None else {"source": source})
        family = CounterMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _recall_seconds(self, counters: EngineCounters) -> Metric:
        family = HistogramMetricFamily(
            "forecache_recall_seconds",
            "Duration of one recall of a few chunks: copy and verify.",
            labels=["model_name"],
        )
        bounds = [*map(str, RECALL_BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(map(float, counters.recall_buckets)), strict=True))
        family.add_metric([self._model_name], cast(Any, buckets), counters.recall_s)
        return family


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


class Metrics:
    """The registry of an ingress: latencies and errors of requests."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp for each series, which nothing uses
        self.model_name = model_name
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(StatsCollector(model_name, lambda: None))
        self._first_token_s = self._histogram(
            "forecache_time_to_first_token_seconds", "Time from request to first token."
        )
        self._inter_token_s = self._histogram("forecache_inter_token_latency_seconds", "Time between two tokens.")
        self._end_to_end_s = self._histogram(
            "forecache_e2e_request_latency_seconds", "Time from request to last token."
        )
        self._queue_s = self._histogram("forecache_request_queue_time_seconds", "Time from request to admission.")
        self._coverage = self._histogram(
            "forecache_attention_coverage",
            "Share of a request's retrieval-event mass on resident chunks, 0 to 1; only requests with events.",
            _SHARES,
        )
        self._errors = Counter(
            "forecache_errors",
            "Requests that ended with an error, by code.",
            ["model_name", "kind"],
            registry=self.registry,
        )
        self._resumed = Counter(
            "forecache_resumed_answers",
            "Times that a request continued on another worker because its worker was lost.",
            ["model_name"],
            registry=self.registry,
        ).labels(model_name)

    def error(self, kind: str) -> None:
        self._errors.labels(self.model_name, kind).inc()

    def resumed(self) -> None:
        self._resumed.inc()

    def request(self) -> "RequestTimer":
        return RequestTimer(self, time.monotonic())

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self.model_name)


def registry_of(model_name: str, stats: Callable[[], object]) -> CollectorRegistry:
    """The registry of a process other than an ingress."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(StatsCollector(model_name, stats))
    return registry


class RequestTimer:
    """Measures the latencies of one request from the events that the ingress receives."""

    def __init__(self, metrics: Metrics, started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._last_token_s: float | None = None

    def observe(self, event: TokenEvent) -> None:
        now = time.monotonic()
        if event.token_ids:
            if self._last_token_s is None:
                self._metrics._first_token_s.observe(now - self._started_s)
            else:
                for _ in event.token_ids:
                    self._metrics._inter_token_s.observe((now - self._last_token_s) / len(event.token_ids))
            self._last_token_s = now
        if event.finish_reason in ("stop", "length"):  # the duration of a failed request is not a latency
            self._metrics._end_to_end_s.observe(now - self._started_s)
            if event.stats is not None:
                self._metrics._queue_s.observe(event.stats.queue_s)
                if event.stats.coverage is not None:
                    self._metrics._coverage.observe(event.stats.coverage)
