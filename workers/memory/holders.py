"""Names of those who hold chunks: whose they are, for the tier that reclaims them, logs and traces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Holder:
    """One sequence of a worker. ``serial``: a name is never used again, since an older holder's release may still be on
    its way; ``traceparent``: of the request's trace (W3C), empty without one."""

    worker_id: str
    request_id: str
    serial: int
    traceparent: str = ""

    @property
    def name(self) -> str:
        """``<worker id>/<request id>#<serial>``, and ``@<traceparent>``."""
        trace = f"@{self.traceparent}" if self.traceparent else ""
        return f"{self.worker_id}/{self.request_id}#{self.serial}{trace}"


def request_of(name: str) -> tuple[str, str]:
    """(request id, traceparent) of a holder's name; both empty in names of another kind."""
    request_id, mark, rest = name.partition("/")[2].rpartition("#")
    return (request_id, rest.partition("@")[2]) if mark else ("", "")
