"""`/v1/sessions/{id}`: shows, pins and deletes the stored chunks of a session."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from forecache.cluster.errors import PinLimitError, TierSilentError, UnknownSessionError
from forecache.cluster.http.api import Api
from forecache.cluster.http.body import read_short_json
from forecache.cluster.http.openai_types import PinRequest
from forecache.cluster.tiers import Tiers
from forecache.workers.errors import OverloadedError
from forecache.workers.memory.arena.ledger import MOST_NAMED, TENANT_MARK, PinShare, tenant_of
from forecache.workers.memory.tier.catalog import Catalog, SessionRecord


class SessionDirectory:
    """Sessions in the catalog and the memory tiers. Calls block, at most until the deadlines of Redis and the tiers."""

    def __init__(self, tiers: Tiers, chunk_tokens: int) -> None:
        self._tiers = tiers
        self._chunk_tokens = chunk_tokens
        self._catalog = Catalog(tiers.redis_url)

    def describe(self, session_id: str) -> dict[str, Any]:
        """The fields that `GET` returns. Raises :class:`UnknownSessionError`, :class:`CatalogUnavailableError`."""
        record = self._record(session_id)
        places = self._catalog.locate(record.keys)
        return {
            "object": "session",
            "chunks": len(record.keys),
            "tokens": len(record.keys) * self._chunk_tokens,
            "stored_chunks": sum(bool(tiers) for tiers in places),
            "tiers": dict(sorted(Counter(tier for tiers in places for tier in tiers).items())),
            "state_pieces": len(record.state_keys),
            "pinned_until": record.pinned_until_unix_s if record.is_pinned else None,
        }

    def pin(self, session_id: str, ttl_s: float) -> dict[str, Any]:
        """Keep the session's chunks from eviction for ``ttl_s`` seconds. If that fails, the session is as before.

        Raises:
            PinLimitError: more would be pinned than the limits allow.
            OverloadedError: running requests have reserved the slots.
            TierSilentError: a memory tier did not answer in time.
        """
        record, now_s = self._record(session_id), time.time()
        pinned = replace(record, pinned_until_unix_s=now_s + ttl_s, changed_unix_s=now_s).after(record)
        unpinned, silent = self._set(pinned)
        shares = self._tiers.ask("pin_share", session_id).values() if unpinned else ()
        if unpinned or silent:
            self._set(record.after(pinned))
        if silent:
            raise TierSilentError(
                f"the session is not pinned: {silent} of the memory tiers did not answer in time. Try again later."
            )
        if refused := over_limit(session_id, list(shares)):
            raise refused
        if unpinned:
            raise OverloadedError(
                f"{unpinned} of the session's chunks can't be pinned now: the memory tier has reserved their slots for "
                "running requests. Try again later, or raise --cold-bytes."
            )
        return self.describe(session_id)

    def delete(self, session_id: str) -> dict[str, Any]:
        """Unpin and forget the session; its chunks may be evicted from then on.

        Raises :class:`TierSilentError` if a memory tier did not answer in time; the session then still exists.
        """
        record = self._record(session_id)
        # unpin it in the catalog first: tiers that start now read their pins there. The record itself stays until all
        # tiers have answered, so that a client can repeat the call
        self._catalog.set_session(replace(record, pinned_until_unix_s=0.0, changed_unix_s=time.time()).after(record))
        _, silent = self._ask_tiers("forget_session", session_id)
        if silent:
            raise TierSilentError(
                f"the session is not deleted: {silent} of the memory tiers did not answer in time. Try again later."
            )
        self._catalog.remove_session(session_id)
        return {"object": "session", "deleted": True}

    def _set(self, record: SessionRecord) -> tuple[int, int]:
        """Store ``record``; returns how many chunks the tiers could not pin, and how many tiers did not answer."""
        self._catalog.set_session(record)  # first, since a restarting tier reads its sessions from the catalog
        unpinned, silent = self._ask_tiers("set_session", record)
        return sum(unpinned), silent

    def _ask_tiers(self, method: str, *args: object) -> tuple[list[Any], int]:
        """Call all tiers; returns their answers, and how many living tiers did not answer.

        A tier that is dead by the catalog does not count: it reads its sessions from the catalog when it restarts.
        """
        actors = self._tiers.actors()
        answers = self._tiers.ask(method, *args, only=actors)
        silent = actors.keys() - answers.keys()
        living = {tier.tier_id for tier in self._catalog.tiers()} if silent else set()
        return list(answers.values()), len(silent & living)

    def _record(self, session_id: str) -> SessionRecord:
        record = self._catalog.session(session_id)
        if record is None:
            raise UnknownSessionError("there is no such session: the first request that names it creates it")
        return record


def over_limit(session_id: str, shares: Sequence[PinShare]) -> PinLimitError | None:
    """The error if pinning the session would exceed the limit of its tenant, or of all tenants, at a tier; else None.

    The message names only sessions of the same tenant.
    """
    share = max(shares, key=lambda share: share.over, default=None)
    if share is None or not share.over:
        return None
    other_sessions = Counter[str]()
    for each in shares:
        other_sessions.update(
            {name.rpartition(TENANT_MARK)[2]: slots for name, slots in each.sessions if name != session_id}
        )
    of_tenant = share.pinned > share.limit
    whose, limit, pinned = (
        ("", share.limit, share.pinned) if of_tenant else ("all ", share.limit_of_all, share.pinned_by_all)
    )
    reason = f"the session can't be pinned: {whose}pins may keep {limit} chunks of a node and would keep {pinned}. "
    if other_sessions:
        named = ", ".join(f"{name!r} ({slots} chunks)" for name, slots in other_sessions.most_common(MOST_NAMED))
        return PinLimitError(
            f"{reason}Unpin other sessions with DELETE /v1/sessions/ID first; your pinned sessions: {named}."
        )
    flag = "--max-tenant-pinned-fraction" if of_tenant and tenant_of(session_id) else "--max-pinned-fraction"
    return PinLimitError(f"{reason}None of your other sessions is pinned. The operator may raise {flag}.")


class SessionRoutes:
    """The HTTP handlers. A tenant can access only its own sessions."""

    def __init__(self, directory: SessionDirectory, api: Api) -> None:
        self._directory = directory
        self._api = api

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the application of :class:`Api`, which turns errors of the handlers into error objects."""
        app.add_api_route("/v1/sessions/{session_id:path}", self.get, methods=["GET"])
        app.add_api_route("/v1/sessions/{session_id:path}", self.pin, methods=["POST"])
        app.add_api_route("/v1/sessions/{session_id:path}", self.delete, methods=["DELETE"])

    async def get(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).scoped_name(session_id)
        return _session(session_id, await asyncio.to_thread(self._directory.describe, name))

    async def pin(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).scoped_name(session_id)
        request = PinRequest.model_validate(await read_short_json(http, self._api.limits, empty={}))
        return _session(session_id, await asyncio.to_thread(self._directory.pin, name, request.ttl_s))

    async def delete(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).scoped_name(session_id)
        return _session(session_id, await asyncio.to_thread(self._directory.delete, name))


def _session(session_id: str, fields: dict[str, Any]) -> Response:
    return JSONResponse(fields | {"id": session_id})
