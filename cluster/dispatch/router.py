"""Routes requests to the worker with the earliest expected first token, by stored prefixes and by load."""

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
"""Requests whose chosen worker is remembered until a worker accepts them."""
MOST_TRIED = 10_000
"""Requests whose previous workers are remembered: more than run and wait at one time."""


class PrefixMemory:
    """Remembers which workers computed which chunks (chunk key → workers), as an LRU cache."""

    def __init__(self, capacity_chunks: int = 200_000) -> None:
        self._capacity_chunks = capacity_chunks
        self._workers: OrderedDict[ChunkKey, frozenset[str]] = OrderedDict()

    def record(self, keys: Sequence[ChunkKey], worker: str) -> None:
        """``worker`` will compute, and then hold, the chunks ``keys``."""
        for key in keys:
            self._workers[key] = self._workers.get(key, frozenset()) | {worker}
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity_chunks:
            self._workers.popitem(last=False)

    def prefix_chunks(self, keys: Sequence[ChunkKey]) -> dict[str, int]:
        """Worker → the number of ``keys`` it has seen, counted from the first one to the first gap."""
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
    """The worker chosen for a request at ``chosen_s``, the tokens to prefill there, and the keys of its chunks."""

    worker: str
    chosen_s: float
    prefill_tokens: int
    keys: list[ChunkKey]


class PrefixAffinityRouter(RequestRouter):
    """Ray Serve's request router for decode workers. It runs in the process of the handle that sends to them.

    A request goes to the worker with the earliest expected first token (:mod:`.routing_cost`). The estimate uses the
    speeds that workers report, the catalog's record of which node stores which chunks, and this router's memory of what
    it sent to which GPU. When Redis does not answer, it works without the catalog.
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
            # to its worker; if that is gone, to any other, which answers that it has no such channel
            addressed = [r for r in candidate_replicas if _name(r.replica_id) == channel.worker_id]
            return [addressed or candidate_replicas]
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
            self._undo_choice(before)  # Serve calls again after workers refused the request, or have no room
        loads: dict[str, int] = {}
        prices: dict[str, FirstToken] = {}
        # of equally good workers, the one that has received nothing for the longest time is first
        for name in sorted(replicas, key=lambda name: self._backlogs[name].last_s):
            loads[name] = self._loads[name].requests(now_s)
            queue_s = max(
                self._backlogs[name].tokens(now_s, rates[name]) / rates[name].prefill_tokens_per_s,
                slot_wait_s(loads[name], reports[name], rates[name]),
            )
            prices[name] = first_token(tokens, self._chunk_tokens, stored[name], reports[name], rates[name], queue_s)
        # put workers that lost the request last: one that restarted or hangs has the least load, and would get it again
        tried = self._tried.get(first_try_id(request.request_id), ())
        best, *others = sorted(order(prices, loads, self._imbalance), key=lambda name: name in tried)
        self._backlogs[best].add(prices[best].prefill_tokens, now_s, rates[best])
        self._loads[best].chosen(now_s)
        self._choices[request.request_id] = _Choice(best, now_s, prices[best].prefill_tokens, keys)
        while len(self._choices) > MOST_CHOICES:
            self._choices.popitem(last=False)  # a request that was cancelled before a worker accepted it
        expected = {name: round(value, 3) for name, value in asdict(prices[best]).items()}
        logger.info("request routed", extra={"request_id": request.request_id, "worker": best, **expected})
        return [[replicas[name]] for name in (best, *others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A worker has accepted the request, usually the chosen one."""
        request, worker = _argument(pending_request, GenerateRequest), _name(replica_id)
        if request is not None:
            self._note_tried(first_try_id(request.request_id), worker)
        choice = None if request is None else self._choices.pop(request.request_id, None)
        if choice is None:
            return
        if choice.worker != worker:
            self._undo_choice(choice)
            known = dict(zip(self._reports, measured_rates(self._reports.values()), strict=True))
            rates = known.get(worker, Rates())
            self._backlogs[worker].add(choice.prefill_tokens, time.monotonic(), rates)
        self._memory.record(choice.keys, worker)

    def _note_tried(self, request_id: str, worker: str) -> None:
        """Remember that ``worker`` got the request: a failover chooses it only if there is no other."""
        self._tried[request_id] = (*self._tried.pop(request_id, ()), worker)
        while len(self._tried) > MOST_TRIED:
            self._tried.popitem(last=False)

    def _undo_choice(self, choice: _Choice) -> None:
        """Uncount a request that was not sent to the chosen worker."""
        if choice.worker in self._backlogs:
            self._backlogs[choice.worker].subtract(choice.prefill_tokens)
            self._loads[choice.worker].undo_choice(choice.chosen_s)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._loads[_name(replica_id)].sent()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count the request's end here too: Serve's queue lengths expire after seconds, but answers take minutes."""
        super().on_request_completed(replica_id, internal_request_id)
        self._loads[_name(replica_id)].ended()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        # a missing worker may be draining: its requests run on, so its chunks stay held. When its process has ended,
        # the supervisor has the tiers release them
        super().update_replicas(replicas)
        self._take_reports({_name(replica.replica_id): WorkerReport.of(replica.routing_stats) for replica in replicas})

    def _take_reports(self, reports: dict[str, WorkerReport]) -> None:
        """Take the latest reports of all current workers."""
        now_s = time.monotonic()
        for (name, report), rates in zip(reports.items(), measured_rates(reports.values()), strict=True):
            if report != self._reports.get(name):  # else it is unchanged, and came with another worker's new report
                self._backlogs[name].update(report.prefill_tokens_left, now_s, rates)
                self._loads[name].update(report.running + report.waiting)
        self._reports = reports
        for of_workers in (self._backlogs, self._loads):
            for name in of_workers.keys() - reports.keys():
                del of_workers[name]

    def _look_up(
        self, request: GenerateRequest, reports: Mapping[str, WorkerReport]
    ) -> tuple[list[ChunkKey], StoredRun | None]:
        """The chunk keys of the prompt, and where the catalog says they are; ``None`` without a catalog."""
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
        """Where the prompt's chunks are, as seen by each worker.

        Without the catalog, a worker is assumed to have only the chunks of requests that this router sent to it.
        """
        sent = self._memory.prefix_chunks(keys)
        if run is None:
            return {name: Stored(hot=sent.get(name, 0)) for name in reports}
        here = {name: run.by_tier.get(report.tier_id, 0) for name, report in reports.items()}
        hot = {name: min(sent.get(name, 0), chunks) for name, chunks in here.items()}
        return {name: Stored(hot[name], here[name] - hot[name], run.chunks - here[name]) for name in reports}


def _argument(pending: PendingRequest | None, kind: type[Asked]) -> Asked | None:
    """The request's argument, if it is of this ``kind``."""
    if pending is None or not pending.args or not isinstance(pending.args[0], kind):
        return None
    return pending.args[0]


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
