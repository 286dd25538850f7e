"""Who may come in: a bounded queue in requests and prompt tokens, limits of tenants, nobody while draining.

A request waits from its admission to its first token. What is refused costs nothing but the look at a few numbers.
Where there are several ingresses the limits are those of all together: each counts its own requests to the last one,
and those of the others as they were when it last asked, a second ago or less.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from forecache.cluster.config import LimitsConfig
from forecache.cluster.errors import DrainingError, TooManyRequestsError
from forecache.cluster.tenants import Tenant
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import CacheOptions
from forecache.workers.errors import InvalidRequestError

MEMORY_S = 30.0
"""How long back the measured throughput reaches: what happened this long ago counts 1/e."""

FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 600.0
"""Told before anything was measured; told at most."""


@dataclass(frozen=True)
class ResidentEstimate:
    """How much hot K/V sequences may hold under the server's settings. ``chunk_bytes``: size of one chunk."""

    engine: EngineConfig
    selection: SelectionConfig
    chunk_bytes: int

    def nbytes(self, tokens: int, cache: CacheOptions) -> int:
        """Most bytes that a sequence of ``tokens`` tokens may hold with the request's ``cache`` options."""
        chunks = -(-tokens // self.engine.chunk_tokens)
        if (cache.policy or self.engine.policy) != "full":
            keep_ratio = self.engine.keep_ratio if cache.keep_ratio is None else cache.keep_ratio
            chunks = budget_chunks(chunks, keep_ratio, self.selection)
        return chunks * self.chunk_bytes


@dataclass
class Throughput:
    """Requests and prompt tokens that get to their first token in a second, while any wait."""

    clock: Callable[[], float] = time.monotonic
    _requests: float = 0.0
    _tokens: float = 0.0
    _busy_s: float = 0.0
    _seen_s: float | None = None

    def waited(self, anybody: bool) -> None:
        """Time has passed, during which ``anybody`` waited or nobody did."""
        now = self.clock()
        if self._seen_s is not None and anybody:
            passed_s = now - self._seen_s
            fading = math.exp(-passed_s / MEMORY_S)
            self._requests, self._tokens = self._requests * fading, self._tokens * fading
            self._busy_s = self._busy_s * fading + passed_s
        self._seen_s = now

    def begun(self, tokens: int) -> None:
        self._requests += 1
        self._tokens += tokens

    def seconds_for(self, requests: int, tokens: int) -> float:
        """How long it takes until so many have begun."""
        if not self._requests or not self._busy_s:
            return FIRST_RETRY_S
        by_requests = requests * self._busy_s / self._requests
        by_tokens = tokens * self._busy_s / max(self._tokens, 1.0)
        return min(max(by_requests, by_tokens, 1.0), LONGEST_RETRY_S)


@dataclass
class _Use:
    """What one tenant has under way."""

    requests: int = 0
    resident_bytes: int = 0


@dataclass(frozen=True)
class Usage:
    """What one ingress has let in. ``tenants``: name → (requests, bytes of hot K/V) under way."""

    ingress: str
    queued_requests: int = 0
    queued_tokens: int = 0
    tenants: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __add__(self, other: "Usage") -> "Usage":
        """That of both."""
        tenants = dict(self.tenants)
        for name, (requests, resident_bytes) in other.tenants.items():
            before = tenants.get(name, (0, 0))
            tenants[name] = before[0] + requests, before[1] + resident_bytes
        queued = self.queued_requests + other.queued_requests
        return Usage(self.ingress, queued, self.queued_tokens + other.queued_tokens, tenants)


class Ticket:
    """One HTTP request that was let in, with the prompt tokens of each of its choices. ``close`` it at its end."""

    def __init__(self, admission: "Admission", tenant: str, choices: Sequence[int], resident_bytes: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._waiting = dict(enumerate(choices))
        self._requests, self._resident_bytes = len(choices), resident_bytes
        self._open = True

    def begun(self, choice: int) -> None:
        """The choice has its first token. Said again, it changes nothing."""
        tokens = self._waiting.pop(choice, None)
        if tokens is not None:
            self._admission.leave_queue(tokens, begun=True)

    def close(self) -> None:
        """The request is over, in whatever way. May be said again."""
        if self._open:
            self._open = False
            for tokens in self._waiting.values():
                self._admission.leave_queue(tokens, begun=False)
            self._waiting.clear()
            self._admission.leave(self._tenant, self._requests, self._resident_bytes)


@dataclass
class Admission:
    """The door of one ingress. Belongs to its event loop."""

    limits: LimitsConfig
    throughput: Throughput = field(default_factory=Throughput)
    draining: bool = False
    queued_requests: int = 0
    queued_tokens: int = 0
    in_flight: int = 0
    _entering: Counter[str] = field(default_factory=Counter)
    _uses: dict[str, _Use] = field(default_factory=dict)
    _elsewhere: Usage = field(default_factory=lambda: Usage(""))

    def usage(self, ingress: str) -> Usage:
        """What was let in here, for the other ingresses. ``ingress``: this one."""
        tenants = {name: (use.requests, use.resident_bytes) for name, use in self._uses.items()}
        return Usage(ingress, self.queued_requests, self.queued_tokens, tenants)

    def hear(self, others: Sequence[Usage]) -> None:
        """What the other ingresses have let in, all of them."""
        self._elsewhere = sum(others, Usage(""))

    def check_open(self, tenant: str = "") -> None:
        """Before a body of ``tenant`` is read: is there any hope for it?

        Where tenants have names, requests of others count for half of the places at most: none keeps another out.

        Raises:
            DrainingError: the server is being stopped.
            TooManyRequestsError: as many wait as may.
        """
        if self.draining:
            raise self._draining()
        own = self._entering[tenant]
        others = self._entering.total() - own
        self._check_places(own + (min(others, self.limits.max_queued_requests // 2) if tenant else others))

    @contextmanager
    def entering(self, tenant: str = "") -> Iterator[None]:
        """A place is kept for a request while it is read and until it is admitted. What finds none is refused before
        that work, and does not stand in line for it.

        Raises as :meth:`check_open` does.
        """
        self.check_open(tenant)
        self._entering[tenant] += 1
        try:
            yield
        finally:
            self._entering[tenant] -= 1
            if not self._entering[tenant]:
                del self._entering[tenant]

    def admit(self, tenant: Tenant, choices: Sequence[int], resident_bytes: int) -> Ticket:
        """Let in a request whose choices have so many prompt tokens, and may come to hold ``resident_bytes`` hot.

        Raises:
            DrainingError, TooManyRequestsError: as above; or the tenant has as much under way as it may.
            InvalidRequestError: the request alone is more than its tenant may have.
        """
        if self.draining:
            raise self._draining()
        self._check_places(0)
        tokens = sum(choices)
        waiting = self.queued_requests + self._elsewhere.queued_requests
        waiting_tokens = self.queued_tokens + self._elsewhere.queued_tokens
        if waiting and waiting + len(choices) > self.limits.max_queued_requests:
            raise self._full(f"{waiting} requests wait already, and this one asks for {len(choices)}")
        if waiting and waiting_tokens + tokens > self.limits.max_queued_tokens:
            raise self._full(f"{waiting_tokens} prompt tokens wait already, and this request has {tokens}")
        use = self._uses.get(tenant.name) or _Use()
        self._check_tenant(tenant, use, len(choices), resident_bytes)
        self.throughput.waited(self.queued_requests > 0)
        ticket = Ticket(self, tenant.name, choices, resident_bytes)
        self._uses[tenant.name] = use  # from here on nothing fails: what is counted is given back by the ticket alone
        use.requests += len(choices)
        use.resident_bytes += resident_bytes
        self.queued_requests += len(choices)
        self.queued_tokens += tokens
        self.in_flight += 1
        return ticket

    def leave_queue(self, tokens: int, *, begun: bool) -> None:
        self.throughput.waited(self.queued_requests > 0)
        self.queued_requests -= 1
        self.queued_tokens -= tokens
        if begun:
            self.throughput.begun(tokens)

    def leave(self, tenant: str, requests: int, resident_bytes: int) -> None:
        use = self._uses[tenant]
        use.requests -= requests
        use.resident_bytes -= resident_bytes
        self.in_flight -= 1
        self._tidy(tenant)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when the sums are not those of the requests under way."""
        assert 0 <= self.queued_requests <= sum(use.requests for use in self._uses.values())
        assert self.queued_tokens >= 0 and (self.queued_requests or not self.queued_tokens)
        assert all(use.requests > 0 and use.resident_bytes >= 0 for use in self._uses.values())
        assert (self.in_flight > 0) == bool(self._uses)

    def _check_places(self, taken: int) -> None:
        """``taken``: places that are kept for others, and not yet in the queue."""
        waiting = self.queued_requests + self._elsewhere.queued_requests + taken
        if waiting >= self.limits.max_queued_requests:
            raise self._full(f"{waiting} requests wait already")

    def _draining(self) -> DrainingError:
        return DrainingError("this server is being stopped; send the request again", FIRST_RETRY_S)

    def _check_tenant(self, tenant: Tenant, use: _Use, choices: int, resident_bytes: int) -> None:
        most, most_bytes = tenant.max_concurrent, tenant.max_resident_bytes
        if most is not None and choices > most:
            raise InvalidRequestError(f"{choices} answers at once are more than the {most} your key may have", "n")
        if most_bytes is not None and resident_bytes > most_bytes:
            raise InvalidRequestError(
                f"the request may come to hold {resident_bytes} bytes of K/V, but your key may have {most_bytes}: "
                "shorten the prompt, lower max_tokens or forecache.keep_ratio",
                "max_tokens",
            )
        requests, used_bytes = self._elsewhere.tenants.get(tenant.name, (0, 0))
        requests, used_bytes = requests + use.requests, used_bytes + use.resident_bytes
        if most is not None and requests + choices > most:
            raise self._full(f"your key has {requests} requests under way and may have {most}")
        if most_bytes is not None and used_bytes + resident_bytes > most_bytes:
            raise self._full(f"your key's requests hold {used_bytes} bytes of K/V and may hold {most_bytes}")

    def _tidy(self, tenant: str) -> None:
        if not self._uses[tenant].requests:
            del self._uses[tenant]

    def _full(self, why: str) -> TooManyRequestsError:
        self.throughput.waited(self.queued_requests > 0)
        wait_s = self.throughput.seconds_for(self.queued_requests, self.queued_tokens)
        return TooManyRequestsError(f"{why}; come again in {math.ceil(wait_s)} s", wait_s)
