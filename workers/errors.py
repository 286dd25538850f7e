"""Errors of the floors below `cluster/`: each says what, why and what to do."""


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
