"""How many workers and memory nodes a cluster should have, where Ray's autoscaler may bring more."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from forecache.workers.memory.arena.stats import TierStats

HOT_POOL_USAGE = "hot_pool_usage"
"""What a worker tells Serve for :func:`workers`: hot slots that live sequences reference / all, 0 to 1."""
HOT_POOL_TARGET = 0.8
PROMISED_TARGET = 0.7


def workers(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Autoscaling policy of the workers for Ray Serve: by queue length, as Serve's own, or by hot-pool use.

    As many as give each ``target_ongoing_requests``, running or waiting; or, if that is more, as would bring the mean
    usage of hot pools to ``HOT_POOL_TARGET``: a few long contexts fill a pool that a count of requests calls idle.
    Serve applies bounds and delays.
    """
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    assert context.config is not None
    by_queue = context.total_num_requests / context.config.get_target_ongoing_requests()
    usage: Mapping[Any, float] = (context.aggregated_metrics or {}).get(HOT_POOL_USAGE, {})
    return max(by_queue, sum(usage.values()) / HOT_POOL_TARGET), {}


def memory_nodes(now: int, tiers: Iterable[TierStats], most: int) -> int:
    """Nodes that only give memory: ``now`` and as many more as bring what is promised and pinned, by which requests are
    admitted, below ``PROMISED_TARGET`` of all arenas, ``most`` at most.

    Usage itself is no sign of want: an arena is a cache, and full sooner or later. Never fewer than now: a node that
    goes takes its chunks along.
    """
    shares = [tier.committed_slots / tier.slots for tier in tiers]
    more = math.ceil(sum(shares) / PROMISED_TARGET) - len(shares)
    return max(now, min(most, now + more))
