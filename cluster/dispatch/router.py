"""Which worker gets a request: the one whose first token is expected soonest, by what is stored where and by load."""

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from forecache.cluster.dispatch.failover import first_try_id
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
from forecache.workers.core.worker_report import WorkerReport
from forecache.workers.errors import CatalogUnavailableError
from forecache.workers.memory.format.keys import ChunkKey, prefix_keys, root_key
from forecache.workers.memory.tier.catalog import Catalog, StoredRun

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked", ChannelRequest, GenerateRequest)

CATALOG_RETRY_S = 5.0
MOST_CHOICES = 10_000
MOST_TRIED = 10_000
"""Requests of which it is kept which workers had them: of those that are under way, with all that may wait."""


class PrefixMemory:
    """Where chunks went: chunk key → names of workers, the least recently used forgotten first."""

    def __init__(self, capacity_chunks: int = 200_000) -> None:
        self._capacity_chunks = capacity_chunks
        self._workers: OrderedDict[ChunkKey, frozenset[str]] = OrderedDict()

    def record(self, keys: Sequence[ChunkKey], worker: str) -> None:
        """``worker`` computes, so will hold, the chunks ``keys``."""
        for key in keys:
            self._workers[key] = self._workers.get(key, frozenset()) | {worker}
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity_chunks:
            self._workers.popitem(last=False)

    def prefix_chunks(self, keys: Sequence[ChunkKey]) -> dict[str, int]:
        """Worker → how many of ``keys``, from the first without a gap, it has seen."""
        chunks: dict[str, int] = {}
        holding: frozenset[str] | None = None
        for at, key in enumerate(keys, start=1):
            holding = (
                self._workers.get(key, frozenset())
                if holding is None
                else holding & self._workers.get(key, frozenset())
            )
            if not holding:
                break
            chunks.update(dict.fromkeys(holding, at))
        return chunks


@dataclass(frozen=True)
class _Choice:
    """The worker that a request is to go to since ``chosen_s``, the tokens that it would prefill there, and the keys
    of its chunks."""

    worker: str
    chosen_s: float
    prefill_tokens: int
    keys: list[ChunkKey]


class PrefixAffinityRouter(RequestRouter):
    """Ray Serve's request router over decode workers, in the process of the handle that sends to them.

    A request goes where its first token is expected soonest, which :mod:`.first_token` reckons. How fast workers are
    they report themselves. What is stored where it knows from the catalog, a hint that it does without when Redis does
    not answer; what is on which GPU, from its own routing.
    """

    def initialize_state(  # type: ignore[override]
        self, chunk_tokens: int, redis_url: str | None = None, imbalance: int = 8
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._imbalance = imbalance
        self._memory = PrefixMemory()
        self._catalog = Catalog(redis_url) if redis_url else None
        self._catalog_asleep_until_s = 0.0
        self._reports: dict[str, WorkerReport] = {}
        self._backlogs: defaultdict[str, Backlog] = defaultdict(Backlog)
        self._loads: defaultdict[str, Load] = defaultdict(Load)
        self._choices: OrderedDict[str, _Choice] = OrderedDict()
        self._tried: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if (channel := _argument(pending_request, ChannelRequest)) is not None:
            # to its worker; where that is gone, to anyone, who says that it has nothing
            meant = [r for r in candidate_replicas if _name(r.replica_id) == channel.worker_id]
            return [meant or candidate_replicas]
        request = _argument(pending_request, GenerateRequest)
        if request is None or len(candidate_replicas) < 2:
            return [candidate_replicas]
        replicas = {_name(replica.replica_id): replica for replica in candidate_replicas}
        reports = {name: WorkerReport.of(replica.routing_stats) for name, replica in replicas.items()}
        rates = dict(zip(reports, measured_rates(reports.values()), strict=True))
        keys, run = await asyncio.to_thread(self._look_up, request, reports)
        stored, now_s = self._stored(keys, run, reports), time.monotonic()
        tokens = len(request.prompt_token_ids) + len(request.resume_token_ids)
        if (before := self._choices.pop(request.request_id, None)) is not None:
            self._take_back(before)  # Serve asks again when workers have refused, or have no room
        loads: dict[str, int] = {}
        prices: dict[str, FirstToken] = {}
        # of workers that are as good as each other, the one that was sent nothing for longest is first
        for name in sorted(replicas, key=lambda name: self._backlogs[name].last_s):
            loads[name] = self._loads[name].requests(now_s)
            queue_s = max(
                self._backlogs[name].tokens(now_s, rates[name]) / rates[name].prefill_tokens_per_s,
                slot_wait_s(loads[name], reports[name], rates[name]),
            )
            prices[name] = first_token(tokens, self._chunk_tokens, stored[name], reports[name], rates[name], queue_s)
        # one that has lost it, or hangs with it, has the least to do: it would get it again and again
        tried = self._tried.get(first_try_id(request.request_id), ())
        best, *others = sorted(order(prices, loads, self._imbalance), key=lambda name: name in tried)
        self._backlogs[best].add(prices[best].prefill_tokens, now_s, rates[best])
        self._loads[best].chosen(now_s)
        self._choices[request.request_id] = _Choice(best, now_s, prices[best].prefill_tokens, keys)
        while len(self._choices) > MOST_CHOICES:
            self._choices.popitem(last=False)  # of a request that was cancelled while it waited
        expected = {name: round(value, 3) for name, value in asdict(prices[best]).items()}
        logger.info("request routed", extra={"request_id": request.request_id, "worker": best, **expected})
        return [[replicas[name]] for name in (best, *others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A worker has accepted: mostly the one that was chosen."""
        request, worker = _argument(pending_request, GenerateRequest), _name(replica_id)
        if request is not None:
            self._note_tried(first_try_id(request.request_id), worker)
        choice = None if request is None else self._choices.pop(request.request_id, None)
        if choice is None:
            return
        if choice.worker != worker:
            self._take_back(choice)
            known = dict(zip(self._reports, measured_rates(self._reports.values()), strict=True))
            rates = known.get(worker, Rates())
            self._backlogs[worker].add(choice.prefill_tokens, time.monotonic(), rates)
        self._memory.record(choice.keys, worker)

    def _note_tried(self, request_id: str, worker: str) -> None:
        """``worker`` has the request: where it goes on later, that is the last to be chosen."""
        self._tried[request_id] = (*self._tried.pop(request_id, ()), worker)
        while len(self._tried) > MOST_TRIED:
            self._tried.popitem(last=False)

    def _take_back(self, choice: _Choice) -> None:
        """The worker that was chosen was not sent the request."""
        if choice.worker in self._backlogs:
            self._backlogs[choice.worker].take_back(choice.prefill_tokens)
            self._loads[choice.worker].take_back(choice.chosen_s)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._loads[_name(replica_id)].sent()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve's own count of what a worker has is not for long answers: it is forgotten after seconds of silence."""
        super().on_request_completed(replica_id, internal_request_id)
        self._loads[_name(replica_id)].ended()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        # one that is not among them any more may be draining: its answers go on, and it holds what they need. Once its
        # process is gone the supervisor has the tiers reclaim what it held
        super().update_replicas(replicas)
        self._hear({_name(replica.replica_id): WorkerReport.of(replica.routing_stats) for replica in replicas})

    def _hear(self, reports: dict[str, WorkerReport]) -> None:
        """News of the workers that there are now."""
        now_s = time.monotonic()
        for (name, report), rates in zip(reports.items(), measured_rates(reports.values()), strict=True):
            if report != self._reports.get(name):  # else it came again, with another worker's news
                self._backlogs[name].hear(report.prefill_tokens_left, now_s, rates)
                self._loads[name].hear(report.running + report.waiting)
        self._reports = reports
        for of_workers in (self._backlogs, self._loads):
            for name in of_workers.keys() - reports.keys():
                del of_workers[name]

    def _look_up(
        self, request: GenerateRequest, reports: Mapping[str, WorkerReport]
    ) -> tuple[list[ChunkKey], StoredRun | None]:
        """Chunk keys of the prompt, and what the catalog has of them; ``None`` where there is none to ask."""
        layout = next((report.layout_fingerprint for report in reports.values() if report.layout_fingerprint), "")
        root = root_key(layout, request.cache.cache_salt)
        token_ids = (*request.prompt_token_ids, *request.resume_token_ids)
        keys = list(prefix_keys(root, token_ids[:-1], self._chunk_tokens))
        if self._catalog is None or time.monotonic() < self._catalog_asleep_until_s:
            return keys, None
        try:
            return keys, self._catalog.stored_run(keys)
        except CatalogUnavailableError as error:
            logger.warning("routing without the catalog for %.0f s: %s", CATALOG_RETRY_S, error)
            self._catalog_asleep_until_s = time.monotonic() + CATALOG_RETRY_S
            return keys, None

    def _stored(
        self, keys: list[ChunkKey], run: StoredRun | None, reports: Mapping[str, WorkerReport]
    ) -> dict[str, Stored]:
        """Where the prompt's chunks are, from each worker's point of view.

        Without the catalog it is thought to have what was sent there, and nobody else's chunks.
        """
        sent = self._memory.prefix_chunks(keys)
        if run is None:
            return {name: Stored(hot=sent.get(name, 0)) for name in reports}
        here = {name: run.by_tier.get(report.tier_id, 0) for name, report in reports.items()}
        hot = {name: min(sent.get(name, 0), chunks) for name, chunks in here.items()}
        return {name: Stored(hot[name], here[name] - hot[name], run.chunks - here[name]) for name in reports}


def _argument(pending: PendingRequest | None, kind: type[Asked]) -> Asked | None:
    """What a worker is asked, if it is of this kind."""
    if pending is None or not pending.args or not isinstance(pending.args[0], kind):
        return None
    return pending.args[0]


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
