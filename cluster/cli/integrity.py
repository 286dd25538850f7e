"""`forecache doctor --cluster`: checks that catalog, memory tiers and workers of a running cluster agree."""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forecache.cluster.launch.cluster import NAMESPACE
from forecache.cluster.launch.machine import check_ray
from forecache.cluster.tiers import INTERNAL_HOLDERS, Tiers, actor_names, find_tiers
from forecache.workers.errors import CatalogUnavailableError, ForecacheError
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.format.hold_id import worker_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.tier.catalog import Catalog

WORKERS_DEADLINE_S = 30.0
SETTLE_S = 3.0
"""Longest time that a difference may last: a chunk in transit is at its source, at its target, or at both."""


def bad_memory(stats: Mapping[str, TierStats]) -> list[str]:
    """One sentence for each tier (name → stats) with bad memory or a bad disk."""
    return [
        f"bad {kind} on the node of {name}: {slots} slots held wrong bytes twice and are out of use. Remove the node "
        f"and test its {kind}."
        for name, tier in stats.items()
        for kind, slots in (("memory", tier.bad_slots), ("disk", tier.disk_bad_slots))
        if slots
    ]


def run(address: str) -> int:
    """Check the cluster at the Ray ``address``. Returns 1 if something is wrong, else 0.

    Raises:
        ForecacheError: no Ray cluster or no memory tier is there.
    """
    check_ray(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (ConnectionError, ValueError) as error:
        raise ForecacheError(f"no Ray cluster at {address}: {error}") from error
    try:
        tiers = find_tiers(NAMESPACE)
        stats = tiers.ask("stats")
        table = Table(box=None, pad_edge=False)
        for column in ("tier", "slots", "used", "held", "pinned", "chunks"):
            table.add_column(column, justify="left" if column == "tier" else "right")
        for name, tier in stats.items():
            numbers = (tier.slots, tier.used_slots, tier.held_slots, tier.pinned_slots, tier.stored_chunks)
            table.add_row(escape(name), *map(str, numbers))
        wrong = [*bad_memory(stats), *check_integrity(tiers)]
    finally:
        ray.shutdown()
    console = Console()
    console.print(table)
    for sentence in wrong:
        console.print(f"[red]wrong[/] {escape(sentence)}")
    if not wrong:
        console.print("catalog, memory tiers and workers [green]agree[/]")
    return int(bool(wrong))


def check_integrity(tiers: Tiers, *, settle_s: float = SETTLE_S) -> list[str]:
    """Everything that is wrong, one sentence each; empty if all is well.

    Looks again for ``settle_s`` seconds while something seems wrong, and drops what becomes right: it was in transit.
    """
    wrong = _look(tiers)
    end_s = time.monotonic() + settle_s
    while wrong and time.monotonic() < end_s:
        time.sleep(0.2)
        now = set(_look(tiers))
        wrong = [sentence for sentence in wrong if sentence in now]
    return wrong


def _look(tiers: Tiers) -> list[str]:
    return [*_tiers_themselves(tiers), *_catalog_and_tiers(tiers), *_holders(tiers), *_orphans(tiers), *_workers()]


def _tiers_themselves(tiers: Tiers) -> list[str]:
    actors = tiers.actors()
    answers = tiers.ask("integrity", only=actors)
    silent = [f"{name}: does not answer" for name in actors if name not in answers]
    return [*silent, *(f"{name}: {found}" for name, found in answers.items() if found)]


def _catalog_and_tiers(tiers: Tiers) -> list[str]:
    """Every catalog entry names a stored chunk, and every stored chunk has an entry."""
    stored = {name: set(keys) for name, keys in tiers.ask("stored_keys").items()}
    entered: dict[str, set[ChunkKey]] = {name: set() for name in stored}
    wrong = []
    try:
        with Catalog(tiers.redis_url, timeout_s=tiers.deadline_s) as catalog:
            for key, tier_ids in catalog.entries():
                for tier_id in tier_ids:
                    entered.setdefault(tier_id, set()).add(key)
    except CatalogUnavailableError as error:
        return [f"catalog: {error}"]
    for name, keys in stored.items():
        wrong += [f"{name}: the catalog lists chunk {key.hex()}, which is not stored" for key in entered[name] - keys]
        wrong += [f"{name}: chunk {key.hex()} is stored, but not in the catalog" for key in keys - entered[name]]
    wrong += [
        f"{name}: has catalog entries, but is not a tier"
        for name, keys in entered.items()
        if keys and name not in stored
    ]
    return wrong


def _holders(tiers: Tiers) -> list[str]:
    holding = tiers.ask("holding_workers")
    living = {name.rpartition("#")[2] for name in actor_names()}
    return [
        f"{name}: worker {worker} is gone, but still holds slots"
        for name, workers in holding.items()
        for worker in workers
        if worker not in living and worker not in INTERNAL_HOLDERS
    ]


def _orphans(tiers: Tiers) -> list[str]:
    held = tiers.ask("holders")
    # after the tiers: a holder that they know exists already
    living = {answer[0]: answer[1] for answer in _ask_workers("holders") if isinstance(answer, tuple)}
    return orphans(held, living)


def orphans(held: Mapping[str, Iterable[str]], living: Mapping[str, Iterable[str]]) -> list[str]:
    """Holders whose worker lives and does not know them: their slots leak. One sentence each.

    ``held``: tier id → ids of holders; ``living``: worker id → ids of its holders. Ignores holders of other workers.
    """
    known = {worker_id: set(holders) for worker_id, holders in living.items()}
    return [
        f"{name}: {holder} has ended, but still holds slots"
        for name, holders in held.items()
        for holder in holders
        if worker_of(holder) in known and holder not in known[worker_of(holder)]
    ]


def _workers() -> list[str]:
    """The references in each hot pool are those of its sequences."""
    return [f"worker: {answer}" for answer in _ask_workers("integrity") if answer]


def _ask_workers(method: str) -> list[Any]:
    """Each worker's answer, or its error; a worker that drains is not asked."""
    if "forecache" not in serve.status().applications:
        return []
    handle = serve.get_deployment_handle("DecodeWorker", "forecache")
    try:
        return list(handle.broadcast(method).results(timeout_s=WORKERS_DEADLINE_S, return_exceptions=True))
    except (RayError, TimeoutError, RuntimeError) as error:
        return [error]
