"""Faults of clients are no server errors: no exception reaches the web server's log."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from forecache.cluster.config import LimitsConfig
from forecache.cluster.dispatch.admission import Admission
from forecache.cluster.dispatch.channels import ServeCall
from forecache.cluster.http.api import CLIENT_LEFT_STATUS, Api
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.tenants import Tenants
from forecache.workers.core.requests import Accepted, Refused
from forecache.workers.errors import InvalidRequestError, OverloadedError


@pytest.mark.parametrize("gone", [{"type": "http.disconnect"}, TaskCancelledError()], ids=["disconnect", "cancelled"])
def test_a_client_that_leaves_while_it_sends_is_no_error(gone: Any) -> None:
    """The web framework or Serve raises its exception for this; the application must not raise it again."""
    parts: Any = None  # it leaves before they are needed
    api = Api(parts, parts, Metrics("m"), Admission(LimitsConfig()), Tenants.load(None), parts)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, gone]
    sent: list[Any] = []

    async def receive() -> Any:
        message = messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions"},
        **{"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""},
        **{"server": ("x", 80), "client": ("y", 1)},
    }
    asyncio.run(api.app()(scope, receive, send))
    assert sent[0]["status"] == CLIENT_LEFT_STATUS


@pytest.mark.parametrize("error", [InvalidRequestError("no such token", "logit_bias"), OverloadedError("full")])
def test_what_a_worker_refuses_is_raised_at_the_client_of_its_call(
    error: InvalidRequestError | OverloadedError,
) -> None:
    """The worker sends a message, since Serve would log an exception as the worker's failure."""

    async def said() -> Any:
        yield Accepted("worker")
        yield Refused(error)

    async def read() -> None:
        response: Any = said()
        call = ServeCall(response)
        assert await anext(call) == Accepted("worker")
        with pytest.raises(type(error)) as raised:
            await anext(call)
        assert raised.value is error

    asyncio.run(read())
