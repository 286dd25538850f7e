"""Typed errors → the error objects of OpenAI's HTTP API."""

import logging
import math
from dataclasses import dataclass, replace

from pydantic import ValidationError

from forecache.workers.errors import (
    CatalogUnavailableError,
    ChunkLostError,
    ForecacheError,
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
)
from forecache.workers.masking import mask_places

logger = logging.getLogger(__name__)

NAME_CHARS = 100
"""Error messages repeat at most this many characters of a name."""


class StartError(ForecacheError):
    """The cluster can't be started here; the message says what to change."""


class ContextLengthError(InvalidRequestError):
    """Prompt and answer don't fit the model's context."""


class UnknownModelError(InvalidRequestError):
    """No such model is served."""


class BodyTooLargeError(InvalidRequestError):
    """The body or the headers exceed their limit."""


class AuthenticationError(ForecacheError):
    """The request carries no valid API key."""


class RetryLaterError(ForecacheError):
    """The request can't be served now; the client may retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequestsError(RetryLaterError):
    """The queue is full, or the tenant's limit is reached."""


class DrainingError(RetryLaterError):
    """The server is being stopped and accepts no new requests."""


class BodyDeadlineError(ForecacheError):
    """The client took too long to send its body."""


class DeadlineError(ForecacheError):
    """The request took longer than its ``timeout_s``."""


class UnknownSessionError(InvalidRequestError):
    """No request has named this session, or its record has expired."""


class TierSilentError(ForecacheError):
    """A memory tier did not answer a call in time."""


class PromptProcessError(ForecacheError):
    """The process that parses large requests ended or took too long before it had parsed the request."""


class PinLimitError(InvalidRequestError):
    """Pinning would exceed a limit. Waiting does not help: other sessions have to be unpinned first."""


class AnswerFailedError(ForecacheError):
    """A worker could not continue an answer, for example because of its grammar; the message says why."""


class WorkerLostError(ForecacheError):
    """The worker of a request died before its answer was complete."""


class WorkerSilentError(WorkerLostError):
    """The worker of a request sent no event for too long, or reported itself as hung."""


class NoWorkerError(WorkerLostError):
    """No worker was running for ``replacement_deadline_s``."""


@dataclass(frozen=True)
class ApiError:
    """An HTTP status and the four fields of ``{"error": {…}}``."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """The label of ``forecache_errors_total``: the code, else the type."""
        return self.code or self.type


class RefusedError(InvalidRequestError):
    """A request that was refused in another process or thread, where :func:`from_exception` made the ``error``."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message, error.param)
        self.error = error


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, "invalid_request_error", param, code)


def shortened(name: str) -> str:
    """``name``, which a client chose, cut to ``NAME_CHARS`` for an error message."""
    return name if len(name) <= NAME_CHARS else f"{name[:NAME_CHARS]}…"


_VARIANTS = {"system", "developer", "user", "assistant", "tool", "json_object", "ChosenFunction"}


def from_validation(error: ValidationError) -> ApiError:
    """The first fault that pydantic found, with the name of the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    # pydantic puts the tried variant of a union into the path, such as "str" or "list[int]", which is not a field
    path = [str(part) for part in first["loc"] if str(part).isidentifier() or str(part).isdigit()]
    path = [part for part in path if part not in ("str", "int", "float", "bool")]
    # the variant that a message's role or a format's type chose is not a field either
    path = [part for at, part in enumerate(path) if part not in _VARIANTS and part not in path[at - 1 : at]]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(first["ctx"]["discriminator"].strip("'"))
    param = ".".join(path) or None
    message = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "missing":
            return invalid_request(f"missing required parameter: {param!r}", param, "missing_required_parameter")
        case "extra_forbidden":
            return invalid_request(f"unknown parameter: {param!r}", param, "unknown_parameter")
    return invalid_request(f"{param}: {message}" if param else message, param, "invalid_value")


def from_http_status(status: int, method: str, path: str, detail: str) -> ApiError:
    """An error that the web framework raised: unknown path, method not allowed."""
    match status:
        case 404:
            return ApiError(404, f"no such path: {shortened(path)}", "invalid_request_error", code="unknown_url")
        case 405:
            message = f"{shortened(method)} is not allowed on {shortened(path)}"
            return ApiError(405, message, "invalid_request_error", code="method_not_allowed")
    return ApiError(status, mask_places(detail), "invalid_request_error" if status < 500 else "server_error")


INTERNAL = "internal error; the server's log has the details"
MEMORY_UNAVAILABLE = "the cluster's memory can't be read now; send the request again"
CATALOG_UNAVAILABLE = "the cluster's catalog does not answer now; send the request again"


def from_exception(error: BaseException) -> ApiError:
    """The error that a client sees. Every error object for an exception is made here.

    Only errors about the request itself, or about waiting for it, show their own message, with addresses, paths and
    keys masked. All others show a general sentence; :func:`log_exception` logs the details.
    """
    if isinstance(error, RefusedError):
        return error.error
    seen = _from_exception(error)
    return replace(seen, message=mask_places(seen.message))


def log_exception(error: BaseException, what: str) -> ApiError:
    """:func:`from_exception`; logs the details that the client does not see.

    ``what`` names what failed, for example the request's method and path.
    """
    seen = from_exception(error)
    if not isinstance(error, ForecacheError | ValidationError):
        logger.error("%s failed", what, exc_info=error)
    elif seen.message != str(error) and not isinstance(error, ValidationError):
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
    return seen


def _from_exception(error: BaseException) -> ApiError:
    match error:
        case ValidationError():
            return from_validation(error)
        case AuthenticationError():
            challenge = (("WWW-Authenticate", "Bearer"),)
            return ApiError(401, str(error), "invalid_request_error", code="invalid_api_key", headers=challenge)
        case RetryLaterError():
            retry = (("Retry-After", str(math.ceil(error.retry_after_s))),)
            if isinstance(error, DrainingError):
                return ApiError(503, str(error), "server_error", code="draining", headers=retry)
            return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=retry)
        case BodyDeadlineError():
            return ApiError(408, str(error), "invalid_request_error", code="request_timeout")
        case BodyTooLargeError():
            status = 431 if error.param == "headers" else 413
            return ApiError(status, str(error), "invalid_request_error", code="request_too_large")
        case ContextLengthError():
            return invalid_request(str(error), error.param, "context_length_exceeded")
        case UnknownModelError():
            return ApiError(404, str(error), "invalid_request_error", error.param, "model_not_found")
        case UnknownSessionError():
            return ApiError(404, str(error), "invalid_request_error", "session_id", "session_not_found")
        case PinLimitError():
            return invalid_request(str(error), "session_id", "pin_limit_exceeded")
        case InvalidRequestError():
            return invalid_request(str(error), error.param, "invalid_value")
        case OverloadedError():
            return ApiError(503, str(error), "server_error", code="overloaded")
        case DeadlineError():
            # the deadline of the request or of the server: no server failure, so not a 5xx, which dashboards count
            return ApiError(408, str(error), "timeout_error", code="deadline_exceeded")
        case PromptProcessError():
            return ApiError(503, str(error), "server_error", code="prompt_process_lost")
        case WorkerLostError():
            return ApiError(503, str(error), "server_error", code="worker_lost")
        case TierSilentError():
            return ApiError(503, str(error), "server_error", code="memory_unavailable")
        case AnswerFailedError():
            return ApiError(500, str(error), "server_error", code="internal_error")
        case NonFiniteError():
            return ApiError(500, str(error), "server_error", code="non_finite")
        case ChunkLostError():
            return ApiError(503, MEMORY_UNAVAILABLE, "server_error", code="memory_unavailable")
        case CatalogUnavailableError():
            return ApiError(503, CATALOG_UNAVAILABLE, "server_error", code="memory_unavailable")
    return ApiError(500, INTERNAL, "server_error", code="internal_error")
