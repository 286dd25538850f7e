"""Prometheus series: their names, and how they are made from the statistics of each kind of process."""

from collections.abc import Iterable

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from forecache.cluster.observe.metrics import Metrics, registry_of
from forecache.cluster.observe.metrics_targets import MergedPages, service_discovery
from forecache.indexer.serving.protocol import IndexerStats
from forecache.indexer.serving.telemetry import Component, MetricsTarget
from forecache.workers.core.requests import FinishReason, SequenceStats, TokenEvent
from forecache.workers.core.stats import RECALL_BOUNDS_S, EngineCounters, EngineStats, ScorerStats, WorkerStats
from forecache.workers.engine.counters import count_recall
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.hot.completions import Recalled

TIER = TierStats(
    10, used_slots=4, held_slots=1, stored_chunks=4, evicted_chunks=0, dropped_chunks=0, moved_chunks=3, pinned_slots=1,
    quota_slots=6, quarantined_slots=2, bad_slots=5, disk_bad_slots=7,
)  # fmt: skip

NAMES: dict[Component, set[str]] = {
    "worker": {
        "forecache_prefix_cache_queries_total",
        "forecache_prefix_cache_hits_total",
        "forecache_recalled_chunks_total[local]",
        "forecache_resident_ratio",
        "forecache_hot_pool_usage_perc",
        "forecache_recall_bytes_total",
        "forecache_recall_seconds_sum",
        "forecache_recall_seconds_count",
        "forecache_prefetch_stall_seconds_total",
        "forecache_lookahead_late_total",
        "forecache_lookahead_hits_total",
        "forecache_lookahead_misses_total",
        "forecache_fallbacks_total",
        "forecache_fallbacks_refused_total",
        "forecache_num_requests_running",
        "forecache_num_requests_waiting",
        "forecache_prompt_tokens_total",
        "forecache_generation_tokens_total",
        "forecache_indexer_fallbacks_total",
    },
    "tier": {
        "forecache_memory_tier_usage_perc",
        "forecache_memory_tier_promised_perc",
        "forecache_memory_tier_disk_usage_perc",
        "forecache_recalled_chunks_total[remote]",
        "forecache_recalled_chunks_total[disk]",
    },
    "indexer": {"forecache_indexer_predictions_total", "forecache_indexer_predict_seconds_total"},
    "ingress": {
        "forecache_attention_coverage_count",
        "forecache_time_to_first_token_seconds_count",
        "forecache_inter_token_latency_seconds_count",
        "forecache_e2e_request_latency_seconds_count",
        "forecache_request_queue_time_seconds_count",
        "forecache_resumed_answers_total",
    },
}


def samples_of(page: str) -> dict[str, float]:
    """Sample name (with kind or source) → value; every sample has the label of the model."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
            kind = sample.labels.get("kind") or sample.labels.get("source")
            values[f"{sample.name}[{kind}]" if kind else sample.name] = sample.value
    return values


def samples(metrics: Metrics) -> dict[str, float]:
    return samples_of(metrics.render().decode())


def page(stats: object) -> str:
    return generate_latest(registry_of("m", lambda: stats)).decode()


def worker(engine: EngineStats) -> WorkerStats:
    return WorkerStats("w", "n", engine, None, ScorerStats("trained", "abc", 2))


def test_every_series_is_there_before_any_request() -> None:
    found = {
        "worker": samples_of(page(worker(EngineStats()))),
        "tier": samples_of(page(TIER)),
        "indexer": samples_of(page(IndexerStats())),
        "ingress": samples(Metrics("m")),
    }
    for component, names in NAMES.items():
        assert names <= found[component].keys()
        assert found[component]["forecache_build_info"] == 1
    own = [set(one) - {"forecache_build_info"} for one in found.values()]
    assert sum(map(len, own)) == len(set().union(*own)), "a series of two kinds of processes would be added up twice"


def test_a_worker() -> None:
    counters = EngineCounters(recalled_chunks=9, fallbacks=2)
    stats = EngineStats(counters, running=3, hot_slots=30, hot_slots_referenced=6, resident_ratio=0.1)
    found = samples_of(page(worker(stats)))
    assert found["forecache_num_requests_running"] == 3
    assert found["forecache_recalled_chunks_total[local]"] == 9
    assert found["forecache_fallbacks_total"] == 2 and found["forecache_indexer_fallbacks_total"] == 2
    assert found["forecache_hot_pool_usage_perc"] == 0.2
    assert found["forecache_resident_ratio"] == 0.1
    text = page(worker(stats))
    assert 'forecache_indexer_info{checkpoint="abc",model_name="m",scorer="trained"} 1.0' in text


def test_a_tier_without_disk() -> None:
    found = samples_of(page(TIER))
    assert found["forecache_memory_tier_usage_perc"] == 0.4 and found["forecache_memory_tier_held_perc"] == 0.1
    assert found["forecache_memory_tier_promised_perc"] == 0.7, "reserved and pinned slots"
    assert found["forecache_memory_tier_moved_chunks_total"] == 3
    assert found["forecache_memory_tier_quarantined_slots"] == 2
    assert found["forecache_memory_tier_bad_slots"] == 5 and found["forecache_memory_tier_disk_bad_slots"] == 7
    assert found["forecache_memory_tier_disk_usage_perc"] == 0


def test_recalls_are_counted_by_their_time() -> None:
    counters = EngineCounters()
    times = (0.0, RECALL_BOUNDS_S[0], RECALL_BOUNDS_S[3] * 1.01, RECALL_BOUNDS_S[-1] + 1)
    for duration_s in times:
        count_recall(counters, Recalled(0, (), 100, duration_s, 2))
    text = page(worker(EngineStats(counters)))
    found = samples_of(text)
    assert found["forecache_recall_seconds_sum"] == sum(times) and found["forecache_recall_seconds_count"] == 4
    [family] = [one for one in text_string_to_metric_families(text) if one.name == "forecache_recall_seconds"]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert buckets[str(RECALL_BOUNDS_S[0])] == buckets[str(RECALL_BOUNDS_S[3])] == 2
    assert buckets[str(RECALL_BOUNDS_S[4])] == buckets[str(RECALL_BOUNDS_S[-1])] == 3 and buckets["+Inf"] == 4


def test_an_indexer() -> None:
    found = samples_of(page(IndexerStats(7, 1, 0.5, 3)))
    assert found["forecache_indexer_predictions_total"] == 7 and found["forecache_indexer_failed_total"] == 1
    assert found["forecache_indexer_predict_seconds_total"] == 0.5 and found["forecache_indexer_waiting"] == 3


def test_errors_by_kind() -> None:
    metrics = Metrics("m")
    for kind in ("overloaded", "overloaded", "model_not_found"):
        metrics.error(kind)
    found = samples(metrics)
    assert found["forecache_errors_total[overloaded]"] == 2
    assert found["forecache_errors_total[model_not_found]"] == 1


def test_answers_that_went_on_elsewhere() -> None:
    metrics = Metrics("m")
    assert samples(metrics)["forecache_resumed_answers_total"] == 0
    metrics.resumed()
    assert samples(metrics)["forecache_resumed_answers_total"] == 1


def test_latencies_of_a_request() -> None:
    metrics = Metrics("m")
    observe = metrics.request().observe
    observe(TokenEvent("r", (), "", prefill_tokens_done=5))
    observe(TokenEvent("r", (1,), "a"))
    observe(TokenEvent("r", (2, 3), "bc"))
    observe(TokenEvent("r", (4,), "d", "stop", SequenceStats(queue_s=0.25, coverage=0.75)))
    found = samples(metrics)
    assert (found["forecache_attention_coverage_count"], found["forecache_attention_coverage_sum"]) == (1, 0.75)
    assert found["forecache_time_to_first_token_seconds_count"] == 1
    assert found["forecache_inter_token_latency_seconds_count"] == 3
    assert found["forecache_e2e_request_latency_seconds_count"] == 1
    assert found["forecache_request_queue_time_seconds_sum"] == 0.25


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_what_failed_is_no_answer_that_was_fast(reason: FinishReason) -> None:
    metrics = Metrics("m")
    metrics.request().observe(TokenEvent("r", (), "", reason, SequenceStats(), "no room", overloaded=True))
    found = samples(metrics)
    assert found["forecache_e2e_request_latency_seconds_count"] == 0
    assert found["forecache_request_queue_time_seconds_count"] == 0


def targets(processes: Iterable[tuple[Component, str]]) -> list[MetricsTarget]:
    return [MetricsTarget(f"h:{number}", *one, "n") for number, one in enumerate(processes)]


def test_service_discovery_lists_each_process() -> None:
    found = service_discovery(targets([("worker", "w1"), ("tier", "t1")]))
    assert found[1] == {"targets": ["h:1"], "labels": {"component": "tier", "process": "t1", "node": "n"}}
    assert len(found) == 2


def test_pages_are_merged_and_nothing_is_added_up() -> None:
    one, two, gone = targets([("worker", "w1"), ("worker", "w2"), ("tier", "t1")])
    pages = [(one, page(worker(EngineStats(EngineCounters(recalled_chunks=3))))), (gone, None)]
    pages.append((two, page(worker(EngineStats(EngineCounters(recalled_chunks=4))))))
    merged = generate_latest(MergedPages(pages)).decode()  # type: ignore[arg-type]
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert merged.count("# HELP forecache_recalled_chunks_total ") == 1
    recalled = {sample.labels["process"]: sample.value for sample in families["forecache_recalled_chunks"].samples}
    assert recalled == {"w1": 3, "w2": 4}
    up = {sample.labels["process"]: sample.value for sample in families["up"].samples}
    assert up == {"w1": 1, "w2": 1, "t1": 0}
    assert families["forecache_recall_seconds"].type == "histogram"
