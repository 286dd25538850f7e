"""The number of workers and memory nodes that autoscaling asks for."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from forecache.cluster.launch.autoscaling import HOT_POOL_TARGET, HOT_POOL_USAGE, PROMISED_TARGET, memory_nodes, workers
from forecache.workers.memory.arena.stats import TierStats


def context(requests: float, usages: list[float] | None, replicas: int = 2) -> AutoscalingContext:
    deployment: Any = None
    metrics = None if usages is None else {HOT_POOL_USAGE: dict(enumerate(usages))}
    options: dict[str, Any] = {"aggregated_metrics": metrics, "raw_metrics": None, "policy_state": {}}
    times = dict.fromkeys(("last_scale_up_time", "last_scale_down_time", "current_time"))
    return AutoscalingContext(
        deployment_id=deployment, deployment_name="DecodeWorker", app_name="forecache", current_num_replicas=replicas,
        target_num_replicas=replicas, running_replicas=[], total_num_requests=requests, total_queued_requests=0,
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8,
        config=AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=8), **options, **times,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("requests", "usages", "wanted"),
    [
        (32, [0.1, 0.1], 4),  # by the queue
        (2, [HOT_POOL_TARGET, HOT_POOL_TARGET], 2),
        (2, [1.0, 1.0], 2 / HOT_POOL_TARGET),  # two long contexts fill both pools
        (16, None, 2),  # no worker has told yet
        (0, [0.0, 0.0], 0),
    ],
)
def test_workers_by_queue_and_by_hot_pool(requests: float, usages: list[float] | None, wanted: float) -> None:
    assert workers(context(requests, usages))[0] == pytest.approx(wanted)


def test_without_workers_serve_decides() -> None:
    assert workers(context(5, None, replicas=0)) == (0, {})


def tier(promised: int, pinned: int = 0, held: int = 0) -> TierStats:
    return TierStats(100, 100, held, 100, 0, 0, pinned_slots=pinned, quota_slots=promised)


def test_memory_nodes_by_what_is_promised_and_pinned() -> None:
    target = round(100 * PROMISED_TARGET)
    assert memory_nodes(2, [tier(target), tier(target)], 9) == 2
    assert memory_nodes(2, [tier(0), tier(0)], 9) == 2, "full of what may go"
    assert memory_nodes(2, [tier(100), tier(100, held=10)], 9) == 3, "a full tier admits no more, whatever is held"
    assert memory_nodes(2, [tier(target), tier(target, pinned=10)], 9) == 3
    assert memory_nodes(2, [tier(100), tier(100), tier(100)], 9) == 4, "a GPU node's tier is full too"
    assert memory_nodes(2, [tier(100)] * 9, 3) == 3
    assert memory_nodes(4, [tier(100)] * 9, 3) == 4, "none is taken away"
