"""Jobs that wait for a place to run: tenants take turns by cost, and a tenant's short jobs pass its long ones."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")


@dataclass(eq=False)
class Waiting(Generic[Job]):
    """A job in line. ``rank`` orders the jobs of one tenant."""

    job: Job
    tenant: str
    cost: int
    rank: tuple[int, int]


@dataclass
class FairQueue(Generic[Job]):
    """Belongs to one thread.

    Between tenants: start-time fair queueing. Each tenant has a clock that its jobs' costs move forward; the tenant
    whose clock is furthest behind is next, and one that had nothing in line starts at the time of the others. So a
    tenant with a hundred jobs delays another's first job by the job that runs, and no more.

    Within a tenant: the job with the least sum of its cost and of all that had been taken when it came. Short jobs pass
    long ones, but a long one is passed only by as much work as it has itself.
    """

    _lines: dict[str, list[Waiting[Job]]] = field(default_factory=dict)
    _clocks: dict[str, int] = field(default_factory=dict)
    _now: int = 0
    _taken: int = 0
    _numbers: int = 0

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def push(self, tenant: str, cost: int, job: Job) -> Waiting[Job]:
        """Put ``job`` in line; give what is returned to :meth:`remove` if it is not wanted any more."""
        self._numbers += 1
        waiting = Waiting(job, tenant, cost, (self._taken + cost, self._numbers))
        self._lines.setdefault(tenant, []).append(waiting)
        return waiting

    def pop(self, most_cost: int | None = None) -> Job | None:
        """The job whose turn it is, of those that cost ``most_cost`` at most; None where there is none."""
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
        """``waiting`` is not wanted any more. Fine if it was taken already."""
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
            # who waits for nothing, and owes nothing, starts like a new one
            self._clocks = {t: clock for t, clock in self._clocks.items() if t in self._lines or clock > self._now}
