"""The router: the earliest expected first token wins, except at workers with far more requests."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from forecache.cluster.dispatch.router import PrefixAffinityRouter, PrefixMemory
from forecache.cluster.dispatch.routing_cost import (
    Backlog,
    FirstToken,
    Load,
    Rates,
    Stored,
    first_token,
    measured_rates,
    order,
    slot_wait_s,
)
from forecache.workers.core.requests import ChannelRequest, GenerateRequest
from forecache.workers.core.stats import EngineCounters, EngineStats
from forecache.workers.core.worker_report import MovingRate, Reporter, WorkerReport
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.format.keys import prefix_keys, root_key
from forecache.workers.memory.tier.catalog import Catalog, TierRecord

KEYS = [bytes([number]) * 16 for number in range(10)]
CHUNK_TOKENS = 64
NUMBERS = itertools.count()
SLOW = WorkerReport("layout", "tier", chunk_bytes=1_000_000, batch_size=16, prefill_tokens_per_s=1e-6)
"""Works nothing off during a test."""
NO_ROUTER: Any = None
"""Nothing of a router is asked for a channel."""
PROMPT = tuple(range(10 * CHUNK_TOKENS + 1))
RATES = Rates(prefill_tokens_per_s=100, recall_bytes_per_s=1e6, fetch_bytes_per_s=1e5, requests_per_s=2)


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


def test_a_moving_rate_is_of_the_last_reports_with_work() -> None:
    rate = MovingRate()
    assert rate.value is None
    rate.observe(0, 5.0)
    assert rate.value is None
    rate.observe(100, 6.0)
    assert rate.value == 100
    rate.observe(100, 6.0)  # nothing was done
    assert rate.value == 100
    for number in range(1, 40):
        rate.observe(100 + 300 * number, 6.0 + number)
    assert rate.value == pytest.approx(300, rel=1e-3)
    rate.observe(10, 1.0)  # a process that has started again
    assert rate.value == pytest.approx(300, rel=1e-3)
    rate.observe(10 + 3000, 2.0)
    assert 300 < (rate.value or 0) < 3000


def test_a_moving_rate_is_that_of_work_in_bulk() -> None:
    rate = MovingRate()
    rate.observe(3000, 1.0)
    for number in range(1, 11):  # small and slow
        rate.observe(3000 + 60 * number, 1.0 + 0.1 * number)
    assert rate.value == pytest.approx(3000, rel=0.1)
    for number in range(11, 61):  # and nothing else any more
        rate.observe(3000 + 60 * number, 1.0 + 0.1 * number)
    assert rate.value == pytest.approx(600, rel=0.05)


def test_a_report_says_what_was_measured_and_comes_through_serve_as_it_was() -> None:
    reporter = Reporter("layout", "tier", chunk_bytes=1000, batch_size=4)
    first = reporter.report(EngineStats(), None)
    assert first == WorkerReport("layout", "tier", 1000, 4)
    counters = EngineCounters(recall_bytes=900, recall_s=3.0, finished_requests=6, step_s=12.0)
    engine = EngineStats(
        counters, running=3, waiting=2, prefill_tokens_left=70, prefilled_tokens=500, prefilled_prompts=4, prefill_s=2.0
    )
    tier = TierStats(10, 0, 0, 0, 0, 0, fetched_bytes=80, fetch_s=4.0)
    report = reporter.report(engine, tier)
    assert report == WorkerReport("layout", "tier", 1000, 4, 3, 2, 70, 250.0, 125.0, 300.0, 20.0, 0.5)
    assert WorkerReport.of(vars(report)) == report
    for number in (1, 2):  # a prompt that takes three reports
        middle = replace(engine, prefilled_tokens=500 + 1000 * number, prefill_s=2.0 + 4.0 * number)
        assert reporter.report(middle, None).prefill_tokens_per_prompt == 125
    last = replace(engine, prefilled_tokens=500 + 3000, prefilled_prompts=5, prefill_s=14.0)
    weighted = (0.8 * 500 * 500 + 3000 * 3000) / (0.8 * 500 * 4 + 3000)
    assert reporter.report(last, None).prefill_tokens_per_prompt == weighted
    assert WorkerReport.of({}) == WorkerReport()
    assert WorkerReport.of({"tier_id": "t", "of a later version": 1}).tier_id == "t"


def test_the_first_token_is_queue_and_prefill_and_fetch_and_recall() -> None:
    report = WorkerReport(chunk_bytes=1000)
    price = first_token(1000, 64, Stored(hot=2, local=5, remote=3), report, RATES, queue_s=1.5)
    assert price == FirstToken(1.5, 1000 - 640, (1000 - 640) / 100, 3000 / 1e5, 5000 / 1e6)
    assert price.total_s == pytest.approx(1.5 + 3.6 + 0.03 + 0.005)
    assert first_token(640, 64, Stored(hot=10), report, RATES, 0).prefill_s == 1 / 100  # the last token is computed


def test_a_batch_that_is_full_is_waited_for() -> None:
    report = WorkerReport(batch_size=4, running=3)
    assert slot_wait_s(0, report, RATES) == slot_wait_s(3, report, RATES) == 0
    assert slot_wait_s(4, report, RATES) == 0.5 and slot_wait_s(9, report, RATES) == 3.0
    # those that run fill the hot pool
    assert slot_wait_s(4, WorkerReport(batch_size=4, running=2, waiting=2), RATES) == 1.5
    assert slot_wait_s(1, WorkerReport(batch_size=4, running=0, waiting=1), RATES) == 0.5


def test_what_was_not_measured_is_as_at_other_workers() -> None:
    fast, slow, new = WorkerReport(prefill_tokens_per_s=300), WorkerReport(prefill_tokens_per_s=100), WorkerReport()
    rates = measured_rates([fast, slow, new])
    assert [rate.prefill_tokens_per_s for rate in rates] == [200, 200, 200]  # nothing to choose a worker by
    rates = measured_rates([WorkerReport(prefill_tokens_per_s=20), fast, fast, new])
    assert [rate.prefill_tokens_per_s for rate in rates] == pytest.approx([20, 620 / 3, 620 / 3, 620 / 3])
    assert {rate.fetch_bytes_per_s for rate in rates} == {Rates().fetch_bytes_per_s}
    assert measured_rates([new]) == [Rates()] and measured_rates([]) == []


def test_a_rate_of_much_shorter_prompts_is_not_held_against_a_worker() -> None:
    """Each step has a fixed cost, which dominates the rate measured with short prompts.

    A worker that seems slow gets no requests, so it could never correct its rate.
    """
    long = WorkerReport(prefill_tokens_per_s=9000, prefill_tokens_per_prompt=7000)
    short = WorkerReport(prefill_tokens_per_s=700, prefill_tokens_per_prompt=40)
    slow = WorkerReport(prefill_tokens_per_s=700, prefill_tokens_per_prompt=2000)
    unknown = WorkerReport(prefill_tokens_per_s=700)  # in its first prompt
    assert [rate.prefill_tokens_per_s for rate in measured_rates([long, short])] == [9000, 9000]
    assert [rate.prefill_tokens_per_s for rate in measured_rates([long, slow])] == [4850, 700]
    assert [rate.prefill_tokens_per_s for rate in measured_rates([short, short])] == [700, 700]
    assert measured_rates([short, unknown])[1].prefill_tokens_per_s == 700
    routing = Routing(
        [
            Replica("a", report("ta", prefill_tokens_per_s=9000, prefill_tokens_per_prompt=7000)),
            Replica("b", report("tb", prefill_tokens_per_s=700, prefill_tokens_per_prompt=40)),
        ],
        None,
    )
    assert [routing.send(tuple(range(number, number + 40))) for number in range(4)] == ["a", "b", "a", "b"]


def price(queue_s: float = 0.0, prefill_s: float = 0.0, fetch_s: float = 0.0) -> FirstToken:
    return FirstToken(queue_s, 1, prefill_s, fetch_s, 0.0)


def test_the_earliest_first_token_wins_and_of_close_ones_the_shorter_queue() -> None:
    idle = {"a": 0, "b": 0, "c": 0}
    prices = {"a": price(prefill_s=3), "b": price(prefill_s=1), "c": price(fetch_s=2)}
    assert order(prices, idle, imbalance=8) == ["b", "c", "a"]
    assert order(dict.fromkeys("cab", price()), idle, imbalance=8) == ["c", "a", "b"]
    close = {"a": price(prefill_s=1.0), "b": price(prefill_s=1.05), "c": price(prefill_s=1.3)}
    assert order(close, {"a": 3, "b": 2, "c": 0}, imbalance=8) == ["b", "a", "c"]
    # behind so long a queue it is quicker to compute all
    assert order({"a": price(queue_s=4), "b": price(prefill_s=3)}, {"a": 2, "b": 0}, imbalance=8) == ["b", "a"]


def test_who_is_far_busier_than_others_comes_last() -> None:
    prices = {"a": price(), "b": price(prefill_s=9), "c": price(prefill_s=8)}
    assert order(prices, {"a": 8, "b": 1, "c": 1}, imbalance=8) == ["a", "c", "b"]
    assert order(prices, {"a": 9, "b": 1, "c": 1}, imbalance=8) == ["c", "b", "a"]
    assert order({"a": price()}, {"a": 100}, imbalance=8) == ["a"]


class Replica:
    """The attributes of a Ray Serve replica that the router reads."""

    def __init__(self, name: str, report: WorkerReport | None) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("DecodeWorker", "forecache"))
        self.node_id = f"node of {name}"
        self.routing_stats = {} if report is None else vars(report)


class Routing:
    """A router with fake replicas."""

    def __init__(self, replicas: list[Replica], redis_url: str | None, imbalance: int = 8) -> None:
        self.replicas: list[Any] = list(replicas)
        self.router = PrefixAffinityRouter(
            DeploymentID("DecodeWorker", "forecache"), DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.router.initialize_state(CHUNK_TOKENS, redis_url, imbalance)

    def send(
        self, prompt: tuple[int, ...] = PROMPT, *, name: str = "", arrives: bool = True, accepted_by: str = ""
    ) -> str:
        """Route a request; returns the first choice, which gets it, unless it is ``accepted_by`` another."""
        request = GenerateRequest(name or f"r{next(NUMBERS)}", prompt)

        async def choose() -> tuple[PendingRequest, Any]:
            pending = PendingRequest([request], {}, SimpleNamespace(internal_request_id="r"))  # type: ignore[arg-type]
            return pending, await self.router.choose_replicas(self.replicas, pending)

        pending, ranks = asyncio.run(choose())
        assert sorted(str(r.replica_id) for rank in ranks for r in rank) == sorted(
            str(r.replica_id) for r in self.replicas
        )
        best = ranks[0][0].replica_id
        if arrives:
            taker = next((r.replica_id for r in self.replicas if r.replica_id.unique_id == accepted_by), best)
            self.router.on_send_request(taker)
            self.router.on_request_routed(pending, taker, None)
        return str(best.unique_id)

    def end(self, name: str) -> None:
        """End a request of the worker."""
        self.router.on_request_completed(
            next(r.replica_id for r in self.replicas if r.replica_id.unique_id == name), ""
        )

    def report(self, **requests: int) -> None:
        """Workers report how many requests they have."""
        self.router._take_reports({name: WorkerReport(running=running) for name, running in requests.items()})


def report(tier_id: str, **measured: Any) -> WorkerReport:
    rates = {"prefill_tokens_per_s": 640.0, "recall_bytes_per_s": 1e9, "fetch_bytes_per_s": 1e8}
    return WorkerReport("layout", tier_id, chunk_bytes=1_000_000, batch_size=16, **rates | measured)


@pytest.fixture
def catalog(redis_server: Any) -> Iterator[Catalog]:
    with Catalog(redis_server.url) as catalog:
        for tier_id in ("ta", "tb", "tc"):
            catalog.heartbeat(TierRecord(tier_id, "1", "node", 100, 0), expiry_s=600)
        yield catalog


def test_a_prefix_that_is_spread_is_fetched_by_who_has_most_of_it(catalog: Catalog, redis_server: Any) -> None:
    keys = list(prefix_keys(root_key("layout"), PROMPT[:-1], CHUNK_TOKENS))
    catalog.publish("ta", "1", keys[:3])
    catalog.publish("tb", "1", keys[3:10])
    for fetch_bytes_per_s in (1e5, 1e8):
        workers = [Replica(name, report(f"t{name}", fetch_bytes_per_s=fetch_bytes_per_s)) for name in "abc"]
        assert Routing(workers, redis_server.url).send() == "b"
    # where the network is slow for b alone, it had better be who has three chunks, or none
    workers = [
        Replica("b", report("tb", fetch_bytes_per_s=1e3)),
        Replica("c", report("tc")),
        Replica("a", report("ta")),
    ]
    assert Routing(workers, redis_server.url).send() == "a"


def test_prompts_go_to_the_other_worker_once_the_queue_costs_more_than_the_prefix(
    catalog: Catalog, redis_server: Any
) -> None:
    keys = list(prefix_keys(root_key("layout"), PROMPT[:-1], CHUNK_TOKENS))
    catalog.publish("ta", "1", keys)
    routing = Routing([Replica("a", report("ta")), Replica("b", report("tb"))], redis_server.url)
    other = tuple(range(1000, 1000 + 1280))  # two seconds of prefill
    assert routing.send() == "a"
    assert [routing.send(other), routing.send(other)] == ["b", "a"]
    # a has the chunks and two seconds of work, b two seconds and ten chunks, 0.1 s, to fetch: the shorter queue
    assert routing.send() == "b"
    assert [routing.send(other) for _ in range(4)].count("a") == 2


def test_a_backlog_is_worked_off_at_the_rate_of_the_day() -> None:
    backlog, fast = Backlog(), Rates(prefill_tokens_per_s=1000)
    backlog.add(500, 10.0, RATES)
    backlog.add(100, 12.0, RATES)
    assert backlog.tokens(12.0, RATES) == 400 and backlog.tokens(13.0, RATES) == 300
    assert backlog.tokens(12.2, fast) == pytest.approx(200) and backlog.tokens(20.0, RATES) == 0
    backlog.update(100, 13.0, RATES)  # what was sent last it may not have seen yet
    assert backlog.tokens(13.0, RATES) == 300
    backlog.update(700, 13.0, RATES)
    assert backlog.tokens(13.0, RATES) == 700 and backlog.last_s == 13.0


def test_a_worker_that_is_behind_what_was_expected_says_so() -> None:
    idle, behind = report("ta"), report("tb", prefill_tokens_left=6400)
    routing = Routing([Replica("b", behind), Replica("a", idle)], None)
    routing.router._take_reports({"a": idle, "b": behind})
    assert [routing.send(tuple(range(number, number + 640))) for number in range(3)] == ["a"] * 3
    routing.router._backlogs["b"] = Backlog()
    routing.router._take_reports({"a": idle, "b": behind})  # the same report once more is no news
    assert routing.send(tuple(range(64))) == "b"
    routing.router._take_reports({"a": idle})
    assert list(routing.router._backlogs) == ["a"]


def test_a_request_that_is_asked_for_again_counts_once() -> None:
    routing = Routing([Replica("a", SLOW), Replica("b", SLOW)], None)
    rates = Rates(prefill_tokens_per_s=1e-6)

    def tokens() -> dict[str, float]:
        return {
            name: round(backlog.tokens(backlog.last_s, rates)) for name, backlog in routing.router._backlogs.items()
        }

    first = routing.send(name="one", arrives=False)
    for _ in range(5):  # both refuse
        routing.send(name="one", arrives=False)
    assert sum(tokens().values()) == len(PROMPT)
    other = "b" if first == "a" else "a"
    routing.send(name="one", accepted_by=other)
    assert sum(tokens().values()) == tokens()[other] > 0
    assert not routing.router._choices
    assert routing.router._memory.prefix_chunks(list(prefix_keys(root_key("layout", ""), PROMPT, CHUNK_TOKENS)))[other]


def test_a_request_that_goes_on_goes_on_at_a_worker_that_did_not_have_it() -> None:
    """The worker that hangs has the least load, so it would be chosen first."""
    routing = Routing([Replica(name, SLOW) for name in "abc"], None)
    had = [routing.send(name="one")]
    for epoch in (1, 2):
        routing.end(had[-1])
        had.append(routing.send(name=f"one~{epoch}"))
    assert sorted(had) == ["a", "b", "c"]
    routing.end(had[-1])
    assert routing.send(name="one~3") in had  # all have had it: then it is as for any other request
    assert {routing.send(name=f"other{number}") for number in range(6)} == {"a", "b", "c"}


@pytest.mark.parametrize("redis_url", [None, "redis://127.0.0.1:1/0"])
def test_without_redis_prompts_go_where_their_beginning_went(redis_url: str | None) -> None:
    routing = Routing([Replica(name, report(f"t{name}")) for name in "abc"], redis_url)
    first = routing.send()
    other = tuple(range(5000, 5000 + 640))
    assert routing.send(other) != first
    routing.router._backlogs.clear()  # time passes
    assert routing.send((*PROMPT, *range(64))) == first


def test_workers_that_have_reported_nothing_share_what_comes(redis_server: Any) -> None:
    routing = Routing([Replica(name, None) for name in "abcd"], redis_server.url)
    prompts = [tuple(range(start, start + 300)) for start in range(0, 8000, 1000)]
    assert sorted(routing.send(prompt) for prompt in prompts) == sorted("abcd" * 2)


def test_streams_are_shared_by_workers_that_measured_differently(redis_server: Any) -> None:
    rates = {"a": 100.0, "b": 280.0}
    workers = [Replica(name, report(f"t{name}", prefill_tokens_per_s=rate)) for name, rate in rates.items()]
    routing = Routing(workers, redis_server.url)
    sent = []
    for number in range(8):
        sent.append(routing.send(tuple(range(1000 * number, 1000 * number + 300))))
        routing.router._backlogs.clear()  # it was prefilled, and goes on
    assert sent[::2] != sent[1::2] and sorted(sent) == list("aaaabbbb")


def test_one_prefix_does_not_pile_up(catalog: Catalog, redis_server: Any) -> None:
    keys = list(prefix_keys(root_key("layout"), PROMPT[:-1], CHUNK_TOKENS))
    catalog.publish("ta", "1", keys)
    # prefill so slow that no queue would be as bad
    slow = {"prefill_tokens_per_s": 0.1, "fetch_bytes_per_s": 1.0, "requests_per_s": 1e6}
    routing = Routing([Replica("a", report("ta", **slow)), Replica("b", report("tb", **slow))], redis_server.url, 4)
    sent = [routing.send() for _ in range(12)]
    ahead = [2 * sent[: n + 1].count("a") - (n + 1) for n in range(len(sent))]
    assert sent[:4] == list("aaaa") and max(ahead) == 4


def test_answers_that_take_minutes_are_counted_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's queue length of a replica expires after ten seconds without a change."""
    routing = Routing([Replica("a", report("ta")), Replica("b", report("tb"))], None)
    sent = [routing.send(tuple(range(number, number + 64))) for number in (0, 1000)]
    assert sorted(sent) == ["a", "b"]
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 3600)
    assert routing.router.replica_queue_len_cache.get(routing.replicas[0].replica_id) is None
    routing.end("b")
    routing.router._backlogs.clear()
    assert [routing.send(tuple(range(number, number + 64))) for number in (2000, 3000)] == ["b", "a"]


def test_a_report_of_answers_that_are_over_is_not_believed() -> None:
    """Reports are a second or two old.

    A reported load is ignored if it may consist of this router's ended requests.
    """
    routing = Routing([Replica("a", None), Replica("b", None)], None)
    prompts = iter([tuple(range(number, number + 64)) for number in range(0, 20_000, 1000)])
    assert [routing.send(next(prompts)) for _ in range(4)] == ["a", "b", "a", "b"]
    for name in "aabb":
        routing.end(name)
    routing.report(a=2, b=0)
    assert [routing.send(next(prompts)) for _ in range(4)] == ["a", "b", "a", "b"]
    # another ingress has sent it three more
    routing.report(a=5, b=2)
    assert [routing.send(next(prompts)) for _ in range(3)] == ["b", "b", "b"]


def test_what_comes_at_once_is_shared() -> None:
    """All choose before any is sent, because the lookup takes a moment. Queueing takes almost no time here."""
    fast = {"prefill_tokens_per_s": 1e6}
    routing = Routing([Replica("a", report("ta", **fast)), Replica("b", report("tb", **fast))], None)
    routing.send(tuple(range(9000, 9064)))
    chosen = [routing.send(tuple(range(number, number + 64)), arrives=False) for number in range(7)]
    assert sorted(chosen) == list("aaabbbb")


def test_a_load_is_what_was_chosen_and_sent_and_is_not_over() -> None:
    load = Load()
    load.chosen(10.0)
    load.chosen(10.5)
    assert load.requests(10.6) == 2 and load.requests(11.2) == 1 and load.requests(12.0) == 0
    load.chosen(20.0)
    load.sent()
    load.chosen(20.1)
    load.chosen(20.2)
    load.undo_choice(20.2)
    load.undo_choice(20.2)  # sent meanwhile
    assert load.requests(20.3) == 2
    load.update(4)
    assert load.requests(22.0) == 4
    load.ended()
    assert load.requests(22.0) == 3
    load.update(4)  # the one that ended may be in it
    assert load.requests(22.0) == 3
    for _ in range(2):
        load.update(4)
    assert load.requests(22.0) == 4
    load.ended()
    assert load.requests(22.0) == 4


def test_other_calls_and_lone_workers_are_left_to_serve() -> None:
    routing = Routing([Replica("a", None), Replica("b", None)], None)

    async def choose(replicas: list[Any], pending: PendingRequest | None) -> Any:
        return await routing.router.choose_replicas(replicas, pending)

    assert asyncio.run(choose(routing.replicas, None)) == [routing.replicas]
    assert asyncio.run(choose([], None)) == [[]]
    assert asyncio.run(choose(routing.replicas[:1], None)) == [routing.replicas[:1]]


def test_a_channel_goes_to_the_worker_that_it_is_for_and_to_anyone_when_that_is_gone() -> None:
    replicas: Any = [SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("DecodeWorker"))) for name in "abc"]

    async def chosen(worker_id: str) -> list[str]:
        asked = ChannelRequest("client", "channel", worker_id)
        pending = PendingRequest([asked], {}, RequestMetadata(request_id="r", internal_request_id="i"))
        [rank_one] = await PrefixAffinityRouter.choose_replicas(NO_ROUTER, replicas, pending)
        return [replica.replica_id.unique_id for replica in rank_one]

    assert asyncio.run(chosen("b")) == ["b"]
    assert asyncio.run(chosen("gone")) == ["a", "b", "c"]


def test_several_routers_know_of_each_other_s_requests_by_what_the_worker_tells() -> None:
    """Each ingress' router counts its own requests exactly."""
    loads = [Load() for _ in range(3)]
    sent = [5, 2, 0]
    for load, count in zip(loads, sent, strict=True):
        for _ in range(count):
            load.chosen(0.0)
            load.sent()
    assert [load.requests(10.0) for load in loads] == sent
    for _ in range(3):
        for load in loads:
            load.update(sum(sent))
    assert [load.requests(10.0) for load in loads] == [7, 7, 7]
    for _ in range(4):  # what ends here is known at once, what ends elsewhere with the next reports
        loads[0].ended()
    assert [load.requests(10.0) for load in loads] == [3, 7, 7]
    for _ in range(3):
        for load in loads:
            load.update(3)
    assert [load.requests(10.0) for load in loads] == [3, 3, 3]
    del loads[0]  # its ingress has died, and its requests with it
    for _ in range(3):
        for load in loads:
            load.update(2)
    assert [load.requests(10.0) for load in loads] == [2, 2]
