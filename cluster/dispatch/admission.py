"""Admits or refuses requests: limits on queued requests and prompt tokens, limits of each tenant, and draining.

A request counts as queued from its admission to its first token. Refusing one only compares a few numbers.
With several ingresses the limits hold for all of them together: an ingress knows its own requests exactly, and those of
the others as of the last exchange, at most a second ago.
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
"""Time constant of the measured throughput: older measurements decay exponentially with it."""

FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 600.0
"""``Retry-After`` before anything was measured, and its maximum."""


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
            engine, least_tokens = self.engine, cache.min_resident_tokens
            keep_ratio = engine.keep_ratio if cache.keep_ratio is None else cache.keep_ratio
            least_tokens = engine.min_resident_tokens if least_tokens is None else least_tokens
            chunks = budget_chunks(chunks, keep_ratio, self.selection, -(-least_tokens // engine.chunk_tokens))
        return chunks * self.chunk_bytes


@dataclass
class Throughput:
    """Measures how many requests and prompt tokens per second reach their first token while requests are queued."""

    clock: Callable[[], float] = time.monotonic
    _requests: float = 0.0
    _tokens: float = 0.0
    _busy_s: float = 0.0
    _seen_s: float | None = None

    def elapse(self, queued: bool) -> None:
        """Account for the time since the last call. ``queued``: requests were queued during it."""
        now = self.clock()
        if self._seen_s is not None and queued:
            passed_s = now - self._seen_s
            decay = math.exp(-passed_s / MEMORY_S)
            self._requests, self._tokens = self._requests * decay, self._tokens * decay
            self._busy_s = self._busy_s * decay + passed_s
        self._seen_s = now

    def begun(self, tokens: int) -> None:
        """Count a request with so many prompt ``tokens`` that reached its first token."""
        self._requests += 1
        self._tokens += tokens

    def seconds_for(self, requests: int, tokens: int) -> float:
        """Expected seconds until so many queued requests and prompt tokens have reached their first token."""
        if not self._requests or not self._busy_s:
            return FIRST_RETRY_S
        by_requests = requests * self._busy_s / self._requests
        by_tokens = tokens * self._busy_s / max(self._tokens, 1.0)
        return min(max(by_requests, by_tokens, 1.0), LONGEST_RETRY_S)


@dataclass
class _Use:
    """The running requests of one tenant, queued ones included."""

    requests: int = 0
    resident_bytes: int = 0


@dataclass(frozen=True)
class Usage:
    """The requests that one ingress has admitted. ``tenants``: name → (running requests, bytes of hot K/V)."""

    ingress: str
    queued_requests: int = 0
    queued_tokens: int = 0
    tenants: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __add__(self, other: "Usage") -> "Usage":
        """The sum of both."""
        tenants = dict(self.tenants)
        for name, (requests, resident_bytes) in other.tenants.items():
            before = tenants.get(name, (0, 0))
            tenants[name] = before[0] + requests, before[1] + resident_bytes
        queued = self.queued_requests + other.queued_requests
        return Usage(self.ingress, queued, self.queued_tokens + other.queued_tokens, tenants)


class Ticket:
    """An admitted HTTP request, with the prompt tokens of each of its choices. Call :meth:`close` when it ends."""

    def __init__(self, admission: "Admission", tenant: str, choices: Sequence[int], resident_bytes: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._waiting = dict(enumerate(choices))
        self._requests, self._resident_bytes = len(choices), resident_bytes
        self._open = True

    def begun(self, choice: int) -> None:
        """The choice has its first token. Further calls change nothing."""
        tokens = self._waiting.pop(choice, None)
        if tokens is not None:
            self._admission.leave_queue(tokens, begun=True)

    def close(self) -> None:
        """The request has ended, for any reason. Further calls change nothing."""
        if self._open:
            self._open = False
            for tokens in self._waiting.values():
                self._admission.leave_queue(tokens, begun=False)
            self._waiting.clear()
            self._admission.leave(self._tenant, self._requests, self._resident_bytes)


@dataclass
class Admission:
    """Admits the requests of one ingress. Use it on the event loop only."""

    limits: LimitsConfig
    throughput: Throughput = field(default_factory=Throughput)
    draining: bool = False
    queued_requests: int = 0
    queued_tokens: int = 0
    in_flight: int = 0
    _entering: Counter[str] = field(default_factory=Counter)
    _uses: dict[str, _Use] = field(default_factory=dict)
    _remote: Usage = field(default_factory=lambda: Usage(""))

    def usage(self, ingress: str) -> Usage:
        """The requests admitted here, for the other ingresses. ``ingress``: the name of this one."""
        tenants = {name: (use.requests, use.resident_bytes) for name, use in self._uses.items()}
        return Usage(ingress, self.queued_requests, self.queued_tokens, tenants)

    def set_remote_usage(self, usages: Sequence[Usage]) -> None:
        """Set the requests that all other ingresses have admitted."""
        self._remote = sum(usages, Usage(""))

    def check_open(self, tenant: str = "") -> None:
        """Check whether a request of ``tenant`` can be admitted, before its body is received.

        Requests that are still being received hold a place in the queue. With named tenants, those of other tenants
        count for at most half of the places, so that one tenant's uploads can't keep out another's.

        Raises:
            DrainingError: the server is being stopped.
            TooManyRequestsError: the queue is full.
        """
        if self.draining:
            raise self._draining()
        same_tenant = self._entering[tenant]
        other_tenants = self._entering.total() - same_tenant
        counted = min(other_tenants, self.limits.max_queued_requests // 2) if tenant else other_tenants
        self._check_places(same_tenant + counted)

    @contextmanager
    def entering(self, tenant: str = "") -> Iterator[None]:
        """Hold a place in the queue for a request while it is parsed, until it is admitted.

        A request without a place is refused before it is parsed. Raises as :meth:`check_open` does.
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
        """Admit a request.

        Args:
            choices: prompt tokens of each of its choices.
            resident_bytes: hot K/V that it may hold at most.

        Raises:
            DrainingError: the server is being stopped.
            TooManyRequestsError: the queue is full, or the tenant's running requests reach its limit.
            InvalidRequestError: the request alone exceeds the limit of its tenant.
        """
        if self.draining:
            raise self._draining()
        self._check_places(0)
        tokens = sum(choices)
        waiting = self.queued_requests + self._remote.queued_requests
        waiting_tokens = self.queued_tokens + self._remote.queued_tokens
        if waiting and waiting + len(choices) > self.limits.max_queued_requests:
            raise self._full(f"{waiting} requests wait already, and this one asks for {len(choices)}")
        if waiting and waiting_tokens + tokens > self.limits.max_queued_tokens:
            raise self._full(f"{waiting_tokens} prompt tokens wait already, and this request has {tokens}")
        use = self._uses.get(tenant.name) or _Use()
        self._check_tenant(tenant, use, len(choices), resident_bytes)
        self.throughput.elapse(self.queued_requests > 0)
        ticket = Ticket(self, tenant.name, choices, resident_bytes)
        self._uses[tenant.name] = use  # nothing can fail from here on: only the ticket subtracts what is counted now
        use.requests += len(choices)
        use.resident_bytes += resident_bytes
        self.queued_requests += len(choices)
        self.queued_tokens += tokens
        self.in_flight += 1
        return ticket

    def leave_queue(self, tokens: int, *, begun: bool) -> None:
        """A choice with so many prompt ``tokens`` is not queued any more. ``begun``: it has its first token."""
        self.throughput.elapse(self.queued_requests > 0)
        self.queued_requests -= 1
        self.queued_tokens -= tokens
        if begun:
            self.throughput.begun(tokens)

    def leave(self, tenant: str, requests: int, resident_bytes: int) -> None:
        """A request of ``tenant`` with so many choices has ended."""
        use = self._uses[tenant]
        use.requests -= requests
        use.resident_bytes -= resident_bytes
        self.in_flight -= 1
        self._tidy(tenant)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the sums contradict each other."""
        assert 0 <= self.queued_requests <= sum(use.requests for use in self._uses.values())
        assert self.queued_tokens >= 0 and (self.queued_requests or not self.queued_tokens)
        assert all(use.requests > 0 and use.resident_bytes >= 0 for use in self._uses.values())
        assert (self.in_flight > 0) == bool(self._uses)

    def _check_places(self, taken: int) -> None:
        """Raise if the queue is full. ``taken``: places held by requests that are not admitted yet."""
        waiting = self.queued_requests + self._remote.queued_requests + taken
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
                "shorten the prompt, lower max_tokens, forecache.keep_ratio or forecache.min_resident_tokens",
                "max_tokens",
            )
        requests, used_bytes = self._remote.tenants.get(tenant.name, (0, 0))
        requests, used_bytes = requests + use.requests, used_bytes + use.resident_bytes
        if most is not None and requests + choices > most:
            raise self._full(f"your key has {requests} requests under way and may have {most}")
        if most_bytes is not None and used_bytes + resident_bytes > most_bytes:
            raise self._full(f"your key's requests hold {used_bytes} bytes of K/V and may hold {most_bytes}")

    def _tidy(self, tenant: str) -> None:
        if not self._uses[tenant].requests:
            del self._uses[tenant]

    def _full(self, why: str) -> TooManyRequestsError:
        self.throughput.elapse(self.queued_requests > 0)
        wait_s = self.throughput.seconds_for(self.queued_requests, self.queued_tokens)
        return TooManyRequestsError(f"{why}; come again in {math.ceil(wait_s)} s", wait_s)
