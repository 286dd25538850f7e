"""The body of a request, read within its limits."""

import json
from typing import Any

from fastapi import Request

from forecache.workers.errors import InvalidRequestError

MAX_BODY_BYTES = 64 << 20


async def read_json(http: Request) -> Any:
    """The body as JSON.

    Raises:
        InvalidRequestError: too long, not UTF-8, or not JSON.
    """
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequestError(f"the body is longer than {MAX_BODY_BYTES >> 20} MiB")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
