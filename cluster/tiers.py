"""The memory tiers of one start of the cluster, from wherever in it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from forecache.cluster.errors import StartError
from forecache.workers.core.config import actor_name

logger = logging.getLogger(__name__)

INTERNAL_HOLDERS = frozenset({"transfer"})
"""Holders that are no workers, but the tier itself."""


@dataclass(frozen=True)
class Tiers:
    """Named actors of ``namespace`` whose names begin with ``run``; nothing is remembered from one call to the next."""

    namespace: str
    run: str
    redis_url: str = field(repr=False)
    deadline_s: float

    def name(self, node_id: str) -> str:
        return actor_name(self.run, "tier", node_id)

    def actors(self) -> "dict[str, ActorHandle[Any]]":
        """Tier id → actor, of all that have not died for good."""
        return self._found(actor_name(self.run, "tier", ""))

    def node_actors(self) -> "dict[str, ActorHandle[Any]]":
        """Name → actor of tiers and indexers alike."""
        return self._found(f"{self.run}-")

    def _found(self, prefix: str) -> "dict[str, ActorHandle[Any]]":
        found = {}
        for name in sorted(actor_names(self.namespace)):
            if name.startswith(prefix):
                try:
                    found[name] = ray.get_actor(name, namespace=self.namespace)
                except ValueError:
                    continue  # it has died since
        return found

    def ask(self, method: str, *args: object, only: "dict[str, ActorHandle[Any]] | None" = None) -> dict[str, Any]:
        """Tier id → what it answers, of those that do within the deadline."""
        actors = self.actors() if only is None else only
        refs = {name: getattr(actor, method).remote(*args) for name, actor in actors.items()}
        end_s = time.monotonic() + self.deadline_s
        answers = {}
        for name, ref in refs.items():
            try:
                answers[name] = ray.get(ref, timeout=max(0.0, end_s - time.monotonic()))
            except RayError as error:
                logger.warning("%s does not answer %s: %s", name, method, str(error).splitlines()[0])
        return answers


def actor_names(namespace: str | None = None) -> set[str]:
    """Names of the living actors of a namespace, or of all."""
    actors: Sequence[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if namespace is None or actor["namespace"] == namespace}


def find_tiers(namespace: str, deadline_s: float = 10.0) -> Tiers:
    """Those of the cluster that is running in the Ray that is joined.

    Raises:
        StartError: there is none, or more than one.
    """
    runs = {name.partition("-tier-")[0] for name in actor_names(namespace) if "-tier-" in name}
    if len(runs) != 1:
        raise StartError(f"{len(runs) or 'no'} forecache clusters have memory tiers here: start one with --address")
    found = Tiers(namespace, runs.pop(), "", deadline_s)
    settings = next(iter(found.ask("settings").values()), None)
    if settings is None or settings.redis_url is None:
        raise StartError("no memory tier answers")
    return replace(found, redis_url=settings.redis_url)
