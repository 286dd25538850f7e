"""The series, their names, and how workers' stats become them."""

from prometheus_client.parser import text_string_to_metric_families

from forecache.cluster.metrics import Metrics
from forecache.workers.decode.messages import SequenceStats, TokenEvent
from forecache.workers.decode.stats import EngineStats
from forecache.workers.decode.worker import ScorerStats, WorkerStats
from forecache.workers.memory.protocol import TierStats

TIER = TierStats(10, used_slots=4, held_slots=1, stored_chunks=4, evicted_chunks=0, dropped_chunks=0, moved_chunks=3)

NAMES = {
    "forecache_prefix_cache_queries_total",
    "forecache_prefix_cache_hits_total",
    "forecache_recalled_chunks_total",
    "forecache_resident_ratio",
    "forecache_hot_pool_usage_perc",
    "forecache_memory_tier_usage_perc",
    "forecache_recall_bytes_total",
    "forecache_recall_seconds_total",
    "forecache_memory_tiers",
    "forecache_memory_tier_disk_usage_perc",
    "forecache_prefetch_stall_seconds_total",
    "forecache_lookahead_late_total",
    "forecache_lookahead_hits_total",
    "forecache_lookahead_misses_total",
    "forecache_fallbacks_total",
    "forecache_fallbacks_refused_total",
    "forecache_attention_coverage_count",
    "forecache_time_to_first_token_seconds_count",
    "forecache_inter_token_latency_seconds_count",
    "forecache_e2e_request_latency_seconds_count",
    "forecache_request_queue_time_seconds_count",
    "forecache_num_requests_running",
    "forecache_num_requests_waiting",
    "forecache_prompt_tokens_total",
    "forecache_generation_tokens_total",
    "forecache_indexer_fallbacks_total",
}


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample name (and kind, for errors) → value; every sample has the model's name."""
    values = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
            kind = sample.labels.get("kind")
            values[f"{sample.name}[{kind}]" if kind else sample.name] = sample.value
    return values


def worker(name: str, node: str, engine: EngineStats, tier: TierStats | None = TIER) -> WorkerStats:
    return WorkerStats(name, node, engine, tier, ScorerStats("trained", "abc", 2))


def test_every_series_is_there_before_any_request() -> None:
    metrics = Metrics("m")
    metrics.workers.update([worker("w", "n", EngineStats())])
    assert set(samples(metrics)) >= NAMES


def test_workers_are_summed_and_a_nodes_tier_counts_once() -> None:
    metrics = Metrics("m")
    one = EngineStats(
        running=1, hot_slots=10, hot_slots_referenced=5, resident_ratio=0.5, recalled_chunks=7, fallbacks=1
    )
    two = EngineStats(
        running=3, hot_slots=30, hot_slots_referenced=5, resident_ratio=0.1, recalled_chunks=2, fallbacks=2
    )
    metrics.workers.update([worker("a", "n", one), worker("b", "n", two), worker("c", "o", EngineStats(), None)])
    found = samples(metrics)
    assert found["forecache_num_requests_running"] == 4 and found["forecache_workers"] == 3
    assert found["forecache_recalled_chunks_total"] == 9
    assert found["forecache_fallbacks_total"] == 3
    assert found["forecache_hot_pool_usage_perc"] == 0.25
    assert found["forecache_resident_ratio"] == 0.2
    assert found["forecache_memory_tier_usage_perc"] == 0.4
    assert found["forecache_memory_tier_moved_chunks_total"] == 3


def test_tiers_are_counted_by_node_and_their_disks_filled_together() -> None:
    metrics = Metrics("m")
    half = TierStats(10, 4, 1, 4, 0, 0, disk_slots=30, disk_used_slots=15)
    empty = TierStats(10, 4, 1, 4, 0, 0, disk_slots=10)
    copied = EngineStats(recall_bytes=300, recall_s=0.25)
    metrics.workers.update(
        [
            worker("a", "n", copied, half),
            worker("b", "n", copied, half),
            worker("c", "o", copied, empty),
            worker("d", "p", copied, None),
        ]
    )
    found = samples(metrics)
    assert found["forecache_memory_tiers"] == 2 and found["forecache_workers"] == 4
    assert found["forecache_memory_tier_disk_usage_perc"] == 0.375
    assert found["forecache_recall_seconds_total"] == 1


def test_no_worker_is_no_division_by_zero() -> None:
    metrics = Metrics("m")
    found = samples(metrics)
    assert found["forecache_workers"] == 0 and found["forecache_hot_pool_usage_perc"] == 0
    assert found["forecache_memory_tiers"] == 0 and found["forecache_memory_tier_disk_usage_perc"] == 0


def test_errors_by_kind() -> None:
    metrics = Metrics("m")
    for kind in ("overloaded", "overloaded", "model_not_found"):
        metrics.error(kind)
    found = samples(metrics)
    assert found["forecache_errors_total[overloaded]"] == 2
    assert found["forecache_errors_total[model_not_found]"] == 1


def test_latencies_of_a_request() -> None:
    metrics = Metrics("m")
    observe = metrics.request()
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


def test_what_scores_is_told() -> None:
    metrics = Metrics("m")
    metrics.workers.update([worker("a", "n1", EngineStats()), worker("b", "n1", EngineStats())])
    rendered = metrics.render().decode()
    assert 'forecache_indexer_info{checkpoint="abc",model_name="m",scorer="trained"} 2.0' in rendered
    assert samples(metrics)["forecache_indexer_fallbacks_total"] == 4
