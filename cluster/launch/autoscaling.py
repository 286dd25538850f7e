"""How many workers and memory nodes a cluster should have, for Ray's autoscaler."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from forecache.workers.memory.arena.stats import TierStats

HOT_POOL_USAGE = "hot_pool_usage"
"""Name of the metric that workers report to Serve: hot slots that sequences reference / all slots, 0 to 1."""
HOT_POOL_TARGET = 0.8
PROMISED_TARGET = 0.7


def workers(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Autoscaling policy for Ray Serve: the larger number of workers by queue length and by hot-pool usage.

    By queue length, as Serve's default, each worker gets ``target_ongoing_requests``, running or waiting. By usage, the
    mean of the hot pools is ``HOT_POOL_TARGET``, since a few long contexts can fill a pool. Serve applies bounds and
    delays.
    """
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    assert context.config is not None
    by_queue = context.total_num_requests / context.config.get_target_ongoing_requests()
    usage: Mapping[Any, float] = (context.aggregated_metrics or {}).get(HOT_POOL_USAGE, {})
    return max(by_queue, sum(usage.values()) / HOT_POOL_TARGET), {}


def memory_nodes(now: int, tiers: Iterable[TierStats], most: int) -> int:
    """Number of memory-only nodes that keeps committed slots (promised or pinned) below ``PROMISED_TARGET`` of all
    slots.

    At most ``most``. Ignores usage: an arena is a cache, which fills sooner or later. Never below ``now``: a node that
    leaves loses its chunks.
    """
    shares = [tier.committed_slots / tier.slots for tier in tiers]
    more = math.ceil(sum(shares) / PROMISED_TARGET) - len(shares)
    return max(now, min(most, now + more))
