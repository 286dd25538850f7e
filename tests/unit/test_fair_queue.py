"""The fair queue: tenants take turns by cost, short jobs overtake long ones, and no job starves."""

from hypothesis import given
from hypothesis import strategies as st

from forecache.cluster.http.fair_queue import FairQueue


def popped(queue: FairQueue[str], most_cost: int | None = None) -> list[str]:
    jobs = []
    while (job := queue.pop(most_cost)) is not None:
        jobs.append(job)
    return jobs


def test_one_tenants_hundred_jobs_delay_anothers_first_by_none_that_waits() -> None:
    queue = FairQueue[str]()
    for number in range(100):
        queue.push("many", 1000, f"m{number}")
    assert queue.pop() == "m0"
    queue.push("few", 10, "f0")
    queue.push("few", 10, "f1")
    assert [queue.pop() for _ in range(3)] == ["f0", "f1", "m1"]


def test_equal_jobs_of_tenants_alternate() -> None:
    queue = FairQueue[str]()
    for number in range(3):
        queue.push("a", 5, f"a{number}")
    for number in range(3):
        queue.push("b", 5, f"b{number}")
    assert popped(queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_tenants_short_jobs_pass_its_long_ones_for_a_while() -> None:
    queue = FairQueue[str]()
    queue.push("a", 100, "long")
    order = []
    for number in range(30):
        queue.push("a", 10, f"s{number}")
        order.append(queue.pop())
    assert order.index("long") == 9, "it was passed by no more work than it has itself"


def test_long_jobs_can_be_left_out() -> None:
    queue = FairQueue[str]()
    queue.push("a", 100, "long")
    queue.push("a", 10, "short")
    assert popped(queue, most_cost=50) == ["short"]
    assert popped(queue) == ["long"]


def test_what_was_removed_is_not_given_out() -> None:
    queue = FairQueue[str]()
    first, second = queue.push("a", 1, "x"), queue.push("a", 1, "y")
    queue.remove(first)
    assert popped(queue) == ["y"]
    queue.remove(second)  # it was taken
    assert len(queue) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=60))
def test_every_job_comes_once_and_waiting_tenants_stay_close(jobs: list[tuple[str, int]]) -> None:
    queue = FairQueue[tuple[str, int]]()
    for tenant, cost in jobs:
        queue.push(tenant, cost, (tenant, cost))
    left = {tenant: [cost for t, cost in jobs if t == tenant] for tenant in "abc"}
    served = dict.fromkeys("abc", 0)
    while (job := queue.pop()) is not None:
        tenant, cost = job
        left[tenant].remove(cost)
        served[tenant] += cost
        waiting = [served[t] for t in "abc" if left[t]]
        if left[tenant] and waiting:
            assert max(waiting) - min(waiting) <= 50, "by one job at most"
    assert not any(left.values())
