"""Errors of everything below `cluster/`. A message says what happened, why, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MESSAGE_CHARACTERS = 400
"""Most characters of a library's message that are shown."""


class ForecacheError(Exception):
    """Base class of all errors that forecache raises itself."""


class UnsupportedModelError(ForecacheError):
    """The model can't be served exactly; the message says which part of it, and why."""


class InvalidModelError(UnsupportedModelError):
    """The model's files are missing, damaged or inconsistent; with repaired files it may be supported."""


class InvalidRequestError(ForecacheError):
    """The request itself is wrong: sending it again unchanged can't help. ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(ForecacheError):
    """There is no room now; the same request may succeed later."""


class MemorySizeError(ForecacheError):
    """A size of hot or cold memory does not fit the device or the machine; the message names one that does."""


class ArenaError(ForecacheError):
    """The shared-memory arena can't be created, mapped or trusted."""


class ArenaMissingError(ArenaError):
    """There is no complete arena at the expected path; its tier may be creating it."""


class ChunkLostError(ForecacheError):
    """A chunk can't be read or stored: its owner is gone, its slot was given away, or its bytes are wrong."""


class ReleasedError(ChunkLostError):
    """A call for a released holder came too late and changed nothing."""


class NonFiniteError(ForecacheError):
    """The model computed infinity or NaN for a request, twice."""


class CatalogUnavailableError(ForecacheError):
    """Redis does not answer."""


class EngineDeadError(ForecacheError):
    """An error ended the engine's thread; replace the process."""


class EngineHungError(EngineDeadError):
    """The engine's thread makes no progress, though there is work; replace the process."""


@contextmanager
def explained(path: Path | str, what: str, advice: str = "") -> Iterator[None]:
    """Turn any error of a library into an :class:`UnsupportedModelError`: "PATH WHAT: ERROR. ADVICE".

    transformers, its quantizers and its tokenizers raise errors of any type, even ImportError and bare Exception.
    """
    try:
        yield
    except ForecacheError:
        raise
    except Exception as error:
        text = f"{path} {what}: {one_line(error)}".removesuffix(".")
        raise UnsupportedModelError(f"{text}. {advice}".strip()) from error


def one_line(error: BaseException) -> str:
    """The type and the first paragraph of an error's message on one line, since Serve passes on single lines."""
    paragraph = str(error).strip().split("\n\n", 1)[0]
    text = " ".join(paragraph.split())
    if len(text) > MESSAGE_CHARACTERS:
        text = f"{text[:MESSAGE_CHARACTERS]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
