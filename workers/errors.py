"""Errors of the floors below `cluster/`: each says what, why and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MESSAGE_CHARACTERS = 400
"""Most characters of a library's message that are shown."""


class ForecacheError(Exception):
    """Base of every error raised on purpose."""


class UnsupportedModelError(ForecacheError):
    """The model can't be served exactly; the message says what in it and why."""


class InvalidModelError(UnsupportedModelError):
    """The model's files are missing, damaged or contradict one another: with sound files it may be served."""


class InvalidRequestError(ForecacheError):
    """The request itself is wrong; sending it again unchanged can't help. ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(ForecacheError):
    """No room now; the same request may be served later."""


class ArenaError(ForecacheError):
    """The shared-memory arena can't be made, mapped or trusted."""


class ArenaMissingError(ArenaError):
    """There is no arena where one should be, or none that is whole; its tier may be making it."""


class ChunkLostError(ForecacheError):
    """A chunk that was held can't be read back (owner gone, checksum wrong)."""


class ReleasedError(ChunkLostError):
    """A call for a holder that was released came too late: it changes nothing."""


class NonFiniteError(ForecacheError):
    """The model computed infinity or no number for a request, twice."""


class CatalogUnavailableError(ForecacheError):
    """Redis does not answer."""


class EngineDeadError(ForecacheError):
    """The engine's thread ended on an error; the process should be replaced."""


class EngineHungError(EngineDeadError):
    """The engine's thread does not get on, though there is work; the process should be replaced."""


@contextmanager
def explained(path: Path | str, what: str, advice: str = "") -> Iterator[None]:
    """Raise whatever a library raises as :class:`UnsupportedModelError`: "PATH WHAT: ERROR. ADVICE".

    transformers, its quantisers and its tokenizers raise errors of any type, ImportError and bare Exception among them.
    """
    try:
        yield
    except ForecacheError:
        raise
    except Exception as error:
        text = f"{path} {what}: {one_line(error)}".removesuffix(".")
        raise UnsupportedModelError(f"{text}. {advice}".strip()) from error


def one_line(error: BaseException) -> str:
    """The type and the first paragraph of an error's message, without line breaks: Serve hands over lines."""
    paragraph = str(error).strip().split("\n\n", 1)[0]
    text = " ".join(paragraph.split())
    if len(text) > MESSAGE_CHARACTERS:
        text = f"{text[:MESSAGE_CHARACTERS]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
