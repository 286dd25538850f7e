"""`/v1/sessions/{id}`: which chunks a session has and where they are, and that they stay."""

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
    """What the catalog and the tiers know of sessions. Calls block for a deadline of theirs at most."""

    def __init__(self, tiers: Tiers, chunk_tokens: int) -> None:
        self._tiers = tiers
        self._chunk_tokens = chunk_tokens
        self._catalog = Catalog(tiers.redis_url)

    def describe(self, session_id: str) -> dict[str, Any]:
        """Raises :class:`UnknownSessionError`, :class:`CatalogUnavailableError`."""
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
        """No tier evicts the session's chunks for ``ttl_s``.

        Leaves the session as it was, and raises :class:`PinLimitError` where more would be pinned than may be,
        :class:`OverloadedError` where slots are promised to running answers,
        :class:`TierSilentError` where a tier did not say that it keeps them.
        """
        record, now_s = self._record(session_id), time.time()
        pinned = replace(record, pinned_until_unix_s=now_s + ttl_s, changed_unix_s=now_s).after(record)
        yielding, silent = self._set(pinned)
        shares = self._tiers.ask("pin_share", session_id).values() if yielding else ()
        if yielding or silent:
            self._set(record.after(pinned))
        if silent:
            raise TierSilentError(
                f"the session is not pinned: {silent} of the memory tiers did not answer in time. Try again later."
            )
        if refused := over_limit(session_id, list(shares)):
            raise refused
        if yielding:
            raise OverloadedError(
                f"of the session's chunks {yielding} can't be pinned now: the memory tier has promised their slots to "
                "running answers. Try again later, or raise --cold-bytes."
            )
        return self.describe(session_id)

    def delete(self, session_id: str) -> dict[str, Any]:
        """Its chunks may be evicted, and it is not known any more.

        Raises :class:`TierSilentError`, and the session stays known, where a tier did not say that it has let go.
        """
        record = self._record(session_id)
        # a tier that starts now takes no pin from there, and one that missed what follows can be told again
        self._catalog.set_session(replace(record, pinned_until_unix_s=0.0, changed_unix_s=time.time()).after(record))
        _, silent = self._tell("forget_session", session_id)
        if silent:
            raise TierSilentError(
                f"the session is not deleted: {silent} of the memory tiers did not answer in time. Try again later."
            )
        self._catalog.remove_session(session_id)
        return {"object": "session", "deleted": True}

    def _set(self, record: SessionRecord) -> tuple[int, int]:
        """Returns how many chunks the tiers can't keep, and how many tiers did not answer."""
        self._catalog.set_session(record)  # first: a tier that is being restarted takes it from there
        yielding, silent = self._tell("set_session", record)
        return sum(yielding), silent

    def _tell(self, method: str, *args: object) -> tuple[list[Any], int]:
        """Ask all tiers; returns what they answer, and how many did not answer and may go on as before.

        One that the catalog does not count as living takes the sessions from there when it comes back.
        """
        actors = self._tiers.actors()
        answers = self._tiers.ask(method, *args, only=actors)
        silent = actors.keys() - answers.keys()
        living = {tier.tier_id for tier in self._catalog.tiers()} if silent else set()
        return list(answers.values()), len(silent & living)

    def _record(self, session_id: str) -> SessionRecord:
        record = self._catalog.session(session_id)
        if record is None:
            raise UnknownSessionError("no such session is known: it begins with a request that names it")
        return record


def over_limit(session_id: str, shares: Sequence[PinShare]) -> PinLimitError | None:
    """Why the session can't be pinned, if that is since its tenant, or all tenants, would have more pinned at a tier
    than they may. Names the tenant's own sessions alone."""
    share = max(shares, key=lambda share: share.over, default=None)
    if share is None or not share.over:
        return None
    others = Counter[str]()
    for each in shares:
        others.update({name.rpartition(TENANT_MARK)[2]: slots for name, slots in each.sessions if name != session_id})
    mine = share.pinned > share.limit
    whose, limit, pinned = (
        ("", share.limit, share.pinned) if mine else ("all ", share.limit_of_all, share.pinned_by_all)
    )
    said = f"the session can't be pinned: {whose}pins may keep {limit} chunks of a node and would keep {pinned}. "
    if others:
        named = ", ".join(f"{name!r} ({slots} chunks)" for name, slots in others.most_common(MOST_NAMED))
        return PinLimitError(
            f"{said}Let go of others with DELETE /v1/sessions/ID first; yours that are pinned: {named}."
        )
    what = "--max-tenant-pinned-fraction" if mine and tenant_of(session_id) else "--max-pinned-fraction"
    return PinLimitError(f"{said}None of your other sessions is pinned. The operator may raise {what}.")


class SessionRoutes:
    """The handlers. A tenant sees only its own sessions."""

    def __init__(self, directory: SessionDirectory, api: Api) -> None:
        self._directory = directory
        self._api = api

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to ``api``'s application, which turns the errors that handlers raise into error objects."""
        app.add_api_route("/v1/sessions/{session_id:path}", self.get, methods=["GET"])
        app.add_api_route("/v1/sessions/{session_id:path}", self.pin, methods=["POST"])
        app.add_api_route("/v1/sessions/{session_id:path}", self.delete, methods=["DELETE"])

    async def get(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).own(session_id)
        return _session(session_id, await asyncio.to_thread(self._directory.describe, name))

    async def pin(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).own(session_id)
        request = PinRequest.model_validate(await read_short_json(http, self._api.limits, empty={}))
        return _session(session_id, await asyncio.to_thread(self._directory.pin, name, request.ttl_s))

    async def delete(self, http: Request, session_id: str) -> Response:
        name = self._api.tenant_of(http).own(session_id)
        return _session(session_id, await asyncio.to_thread(self._directory.delete, name))


def _session(session_id: str, fields: dict[str, Any]) -> Response:
    return JSONResponse(fields | {"id": session_id})
