"""Who holds the beginning of a prompt gets it, unless others wait less."""

import asyncio
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from forecache.cluster.router import PrefixAffinityRouter, PrefixMemory, rank
from forecache.workers.decode.messages import ChannelRequest

ROUTER: Any = None
"""Nothing of a router is asked for a channel."""

KEYS = [bytes([number]) * 16 for number in range(10)]


def test_prefix_memory_counts_from_the_first_chunk_without_gaps() -> None:
    memory = PrefixMemory()
    memory.record(KEYS[:6], "a")
    memory.record(KEYS[:2], "b")
    memory.record(KEYS[4:8], "c")
    assert memory.prefix_chunks(KEYS) == {"a": 6, "b": 2}
    assert memory.prefix_chunks(KEYS[4:]) == {"a": 2, "c": 4}
    assert memory.prefix_chunks(KEYS[9:]) == {} and memory.prefix_chunks([]) == {}


def test_prefix_memory_forgets_the_least_recently_used() -> None:
    memory = PrefixMemory(capacity_chunks=4)
    memory.record(KEYS[:3], "a")
    memory.record(KEYS[3:6], "b")
    memory.record(KEYS[3:4], "b")
    assert memory.prefix_chunks(KEYS) == {}
    assert memory.prefix_chunks(KEYS[3:6]) == {"b": 3}


def test_rank_prefers_hot_then_stored_then_nobody() -> None:
    loads = {"a": 0, "b": 0, "c": 0}
    assert rank(loads, {"b": 3, "c": 1}, {"a": 9}, imbalance=8) == [["b"], ["a", "c"]]
    assert rank(loads, {}, {"a": 9, "c": 9}, imbalance=8) == [["a", "c"], ["b"]]
    assert rank(loads, {"a": 3, "b": 3}, {"b": 3}, imbalance=8) == [["b"], ["a", "c"]]
    assert rank(loads, {}, {}, imbalance=8) == [["a", "b", "c"]]


def test_rank_leaves_who_is_far_busier_than_others() -> None:
    assert rank({"a": 9, "b": 1}, {"a": 5}, {}, imbalance=8) == [["a", "b"]]
    assert rank({"a": 8, "b": 1}, {"a": 5}, {}, imbalance=8) == [["a"], ["b"]]
    assert rank({"a": 9, "b": 1, "c": 1}, {"a": 5, "c": 1}, {}, imbalance=8) == [["c"], ["a", "b"]]


def test_a_channel_goes_to_the_worker_that_it_is_for_and_to_anyone_when_that_is_gone() -> None:
    replicas: Any = [SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("DecodeWorker"))) for name in "abc"]

    async def chosen(worker_id: str) -> list[str]:
        asked = ChannelRequest("client", "channel", worker_id)
        pending = PendingRequest([asked], {}, RequestMetadata(request_id="r", internal_request_id="i"))
        [rank_one] = await PrefixAffinityRouter.choose_replicas(ROUTER, replicas, pending)
        return [replica.replica_id.unique_id for replica in rank_one]

    assert asyncio.run(chosen("b")) == ["b"]
    assert asyncio.run(chosen("gone")) == ["a", "b", "c"]
