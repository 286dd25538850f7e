"""Finds and calls the memory tiers of a running cluster, from any process in it."""

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
"""Holders of chunks that are not workers: the tier itself, while it exchanges chunks."""


@dataclass(frozen=True)
class Tiers:
    """The actors of ``namespace`` whose names begin with ``run``. Every call looks them up again."""

    namespace: str
    run: str
    redis_url: str = field(repr=False)
    deadline_s: float

    def name(self, node_id: str) -> str:
        return actor_name(self.run, "tier", node_id)

    def actors(self) -> "dict[str, ActorHandle[Any]]":
        """Tier id → actor, of all tiers that run or are being restarted."""
        return self._found(actor_name(self.run, "tier", ""))

    def node_actors(self) -> "dict[str, ActorHandle[Any]]":
        """Name → actor, of tiers and indexers."""
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
        """Call ``method`` on all tiers, or on those of ``only``.

        Returns tier id → answer; tiers that don't answer within ``deadline_s`` are left out, and logged.
        """
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
    """The names of the living actors of a namespace, or of all namespaces."""
    actors: Sequence[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if namespace is None or actor["namespace"] == namespace}


def find_tiers(namespace: str, deadline_s: float = 10.0) -> Tiers:
    """The tiers of the forecache cluster in ``namespace`` of the Ray cluster that this process has joined.

    Raises:
        StartError: no forecache cluster runs there, more than one does, or its tiers don't answer.
    """
    runs = {name.partition("-tier-")[0] for name in actor_names(namespace) if "-tier-" in name}
    if len(runs) != 1:
        raise StartError(f"{len(runs) or 'no'} forecache clusters have memory tiers here: start one with --address")
    found = Tiers(namespace, runs.pop(), "", deadline_s)
    settings = next(iter(found.ask("settings").values()), None)
    if settings is None or settings.redis_url is None:
        raise StartError("no memory tier answers")
    return replace(found, redis_url=settings.redis_url)
