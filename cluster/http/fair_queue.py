"""A queue that is fair between tenants by cost, and lets a tenant's short jobs overtake its long ones."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")


@dataclass(eq=False)
class Waiting(Generic[Job]):
    """A queued job. ``rank`` orders the jobs of one tenant: the smallest is next."""

    job: Job
    tenant: str
    cost: int
    rank: tuple[int, int]


@dataclass
class FairQueue(Generic[Job]):
    """Not thread-safe.

    Between tenants: start-time fair queueing. Each tenant has a virtual clock, which advances by the cost of its jobs.
    The tenant whose clock is furthest behind is next. A tenant without queued jobs starts at the time of the others. So
    a tenant with a hundred jobs delays another tenant's first job by the job that runs, and no more.

    Within a tenant: a job ranks by its cost plus the total cost that had been taken from the queue when it arrived.
    Short jobs overtake long ones, but a long job waits for at most as much overtaking work as it costs itself.
    """

    _lines: dict[str, list[Waiting[Job]]] = field(default_factory=dict)
    _clocks: dict[str, int] = field(default_factory=dict)
    _now: int = 0
    _taken: int = 0
    _numbers: int = 0

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def push(self, tenant: str, cost: int, job: Job) -> Waiting[Job]:
        """Queue ``job``. Returns its entry, with which :meth:`remove` cancels it."""
        self._numbers += 1
        waiting = Waiting(job, tenant, cost, (self._taken + cost, self._numbers))
        self._lines.setdefault(tenant, []).append(waiting)
        return waiting

    def pop(self, most_cost: int | None = None) -> Job | None:
        """Take the next job among those that cost ``most_cost`` at most; None if there is none."""
        heads = [
            min(fitting, key=lambda waiting: waiting.rank)
            for line in self._lines.values()
            if (fitting := [waiting for waiting in line if most_cost is None or waiting.cost <= most_cost])
        ]
        if not heads:
            return None
        head = min(heads, key=lambda waiting: (self._clock(waiting.tenant), waiting.rank[1]))
        self._now = self._clock(head.tenant)
        self._clocks[head.tenant] = self._now + head.cost
        self._taken += head.cost
        self._leave(head)
        return head.job

    def remove(self, waiting: Waiting[Job]) -> None:
        """Remove a job that is not needed any more. Does nothing if it was taken already."""
        if waiting in self._lines.get(waiting.tenant, ()):
            self._leave(waiting)

    def _clock(self, tenant: str) -> int:
        return max(self._clocks.get(tenant, 0), self._now)

    def _leave(self, waiting: Waiting[Job]) -> None:
        line = self._lines[waiting.tenant]
        line.remove(waiting)
        if not line:
            del self._lines[waiting.tenant]
        if len(self._clocks) > len(self._lines):
            # forget tenants without queued jobs whose clock is not ahead: they would start like new ones anyway
            self._clocks = {t: clock for t, clock in self._clocks.items() if t in self._lines or clock > self._now}
