"""What a client sends, read within its limits."""

import asyncio
import json
from typing import Any

from fastapi import Request

from forecache.cluster.errors import BodyDeadlineError, BodyTooLargeError
from forecache.cluster.limits import LimitsConfig
from forecache.workers.errors import InvalidRequestError


def check_headers(http: Request, limits: LimitsConfig) -> None:
    """Raise :class:`BodyTooLargeError` for headers, or an announced body, that are too long."""
    length = sum(len(name) + len(value) + 4 for name, value in http.headers.raw)
    if length > limits.max_header_bytes:
        raise BodyTooLargeError(f"the headers are longer than {limits.max_header_bytes} bytes", "headers")
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise _too_long(limits)


async def read_json(http: Request, limits: LimitsConfig, *, empty: Any = None) -> Any:
    """The body as JSON; ``empty``, if that is given, where there is none.

    Raises:
        BodyTooLargeError: too long.
        BodyDeadlineError: it did not come in time.
        InvalidRequestError: not UTF-8, or not JSON.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_deadline_s):
            async for part in http.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise _too_long(limits)
    except TimeoutError as error:
        raise BodyDeadlineError(f"the body did not come within {limits.body_deadline_s:g} s") from error
    if not body and empty is not None:
        return empty
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _too_long(limits: LimitsConfig) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is longer than {limits.max_body_bytes} bytes")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
