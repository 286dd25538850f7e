"""Admission: limits, `Retry-After`, tenants, draining; the counts return to zero."""

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from forecache.cluster.config import LimitsConfig
from forecache.cluster.dispatch.admission import FIRST_RETRY_S, LONGEST_RETRY_S, Admission, Throughput, Ticket, Usage
from forecache.cluster.errors import (
    AuthenticationError,
    DrainingError,
    StartError,
    TooManyRequestsError,
    from_exception,
)
from forecache.cluster.tenants import Anonymous, Tenant, Tenants, entry, new_key
from forecache.workers.errors import InvalidRequestError


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def door(**limits: int) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(LimitsConfig(**limits), Throughput(clock)), clock  # type: ignore[arg-type]


def test_the_queue_is_bounded_in_requests_and_a_first_token_leaves_it() -> None:
    admission, _ = door(max_queued_requests=2)
    first, second = (admission.admit(Anonymous(), [10], 0) for _ in range(2))
    with pytest.raises(TooManyRequestsError):
        admission.check_open()
    first.begun(0)
    first.begun(0)
    admission.check_open()
    assert (admission.queued_requests, admission.queued_tokens, admission.in_flight) == (1, 10, 2)
    first.close()
    second.close()
    second.close()
    assert (admission.queued_requests, admission.queued_tokens, admission.in_flight) == (0, 0, 0)


def test_a_prompt_that_is_being_tokenized_has_its_place_already() -> None:
    admission, _ = door(max_queued_requests=2)
    with admission.entering():
        ticket = admission.admit(Anonymous(), [10], 0)  # its own place is not in its way
        for _ in range(3):
            with pytest.raises(TooManyRequestsError), admission.entering():
                raise AssertionError("let in, though one waits and one is about to")
    with admission.entering():
        other = admission.admit(Anonymous(), [10], 0)
    with pytest.raises(TooManyRequestsError):
        admission.admit(Anonymous(), [10], 0)
    ticket.close()
    other.close()
    with pytest.raises(ValueError), admission.entering():
        raise ValueError("a bad prompt")
    with admission.entering(), admission.entering():
        pass
    admission.draining = True
    with pytest.raises(DrainingError), admission.entering():
        pass


def test_the_queue_is_bounded_in_tokens_but_an_empty_one_takes_any_prompt() -> None:
    admission, _ = door(max_queued_tokens=100)
    long = admission.admit(Anonymous(), [5000], 0)
    with pytest.raises(TooManyRequestsError, match="5000 prompt tokens"):
        admission.admit(Anonymous(), [1], 0)
    long.begun(0)
    admission.admit(Anonymous(), [60], 0)
    with pytest.raises(TooManyRequestsError):
        admission.admit(Anonymous(), [41], 0)
    admission.admit(Anonymous(), [40], 0)


def test_several_answers_count_each() -> None:
    admission, _ = door(max_queued_requests=4)
    ticket = admission.admit(Anonymous(), [7, 7, 7], 0)
    with pytest.raises(TooManyRequestsError):
        admission.admit(Anonymous(), [1, 1], 0)
    ticket.begun(1)
    admission.admit(Anonymous(), [1, 1], 0)
    ticket.close()
    assert (admission.queued_requests, admission.queued_tokens) == (2, 2)


def test_retry_after_is_the_time_that_the_queue_takes_at_the_measured_pace() -> None:
    admission, clock = door(max_queued_requests=10)
    assert admission.throughput.seconds_for(10, 10) == FIRST_RETRY_S
    tickets = [admission.admit(Anonymous(), [100], 0) for _ in range(10)]
    for ticket in tickets[:5]:
        clock.now_s += 2.0
        ticket.begun(0)
    for _ in range(5):
        admission.admit(Anonymous(), [100], 0)
    with pytest.raises(TooManyRequestsError) as refused:
        admission.check_open()
    assert refused.value.retry_after_s == pytest.approx(10 * 2.0, rel=0.1)
    error = from_exception(refused.value)
    assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", (("Retry-After", "20"),))


def test_time_in_which_nobody_waits_says_nothing_of_the_pace() -> None:
    admission, clock = door()
    admission.admit(Anonymous(), [100], 0).begun(0)
    for _ in range(20):
        clock.now_s += 50.0
        ticket = admission.admit(Anonymous(), [100], 0)
        clock.now_s += 1.0
        ticket.begun(0)
        ticket.close()
    assert admission.throughput.seconds_for(3, 300) == pytest.approx(3.0, rel=0.1)
    assert admission.throughput.seconds_for(10**9, 0) == LONGEST_RETRY_S


def test_draining_refuses_and_counts_down() -> None:
    admission, _ = door()
    ticket = admission.admit(Anonymous(), [1], 0)
    admission.draining = True
    with pytest.raises(DrainingError) as refused:
        admission.admit(Anonymous(), [1], 0)
    assert from_exception(refused.value).status == 503 and from_exception(refused.value).headers
    assert admission.in_flight == 1
    ticket.close()
    assert admission.in_flight == 0


def test_a_tenant_has_its_share_and_no_more() -> None:
    admission, _ = door()
    small = Tenant(name="small", max_concurrent=2, max_resident_bytes=1000)
    first = admission.admit(small, [5], 600)
    with pytest.raises(TooManyRequestsError, match="bytes"):
        admission.admit(small, [5], 401)
    second = admission.admit(small, [5], 400)
    with pytest.raises(TooManyRequestsError, match="requests"):
        admission.admit(small, [5], 0)
    admission.admit(Tenant(name="other"), [5], 10**9)
    first.begun(0)
    with pytest.raises(TooManyRequestsError):
        admission.admit(small, [5], 0)  # it still runs
    first.close()
    admission.admit(small, [5], 600)
    second.close()
    with pytest.raises(InvalidRequestError):
        admission.admit(small, [5, 5, 5], 0)
    with pytest.raises(InvalidRequestError):
        admission.admit(small, [5], 1001)
    with pytest.raises(InvalidRequestError):
        admission.admit(Tenant(name="new", max_concurrent=1), [5, 5], 0)
    admission.check_integrity()


class Doors(RuleBasedStateMachine):
    """Requests of three tenants arrive, reach their first token and end in any order."""

    @initialize()
    def start(self) -> None:
        self.admission, self.clock = door(max_queued_requests=6, max_queued_tokens=300)
        self.tickets: list[tuple[Ticket, int]] = []

    @rule(
        name=st.sampled_from("abc"),
        choices=st.lists(st.integers(1, 200), min_size=1, max_size=4),
        nbytes=st.integers(0, 900),
    )
    def come(self, name: str, choices: list[int], nbytes: int) -> None:
        tenant = Tenant(name=name, max_concurrent=5, max_resident_bytes=1000)
        try:
            self.tickets.append((self.admission.admit(tenant, choices, nbytes), len(choices)))
        except TooManyRequestsError as error:
            assert 1 <= error.retry_after_s <= LONGEST_RETRY_S

    @rule(data=st.data(), passed_s=st.floats(0, 100))
    def begin(self, data: st.DataObject, passed_s: float) -> None:
        self.clock.now_s += passed_s
        if self.tickets:
            ticket, choices = data.draw(st.sampled_from(self.tickets))
            ticket.begun(data.draw(st.integers(0, choices - 1)))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.tickets:
            ticket, _ = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
            ticket.close()
            ticket.begun(0)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "admission"):
            self.admission.check_integrity()
            assert self.admission.in_flight == len(self.tickets)

    def teardown(self) -> None:
        for ticket, _ in getattr(self, "tickets", ()):
            ticket.close()
        if hasattr(self, "admission"):
            assert (self.admission.queued_requests, self.admission.queued_tokens, self.admission._uses) == (0, 0, {})


TestDoors = Doors.TestCase
TestDoors.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_keys_of_a_file(tmp_path: Path) -> None:
    (one, one_digest), (two, two_digest) = new_key(), new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"- {{key_sha256: {one_digest}, tenant: {{name: one, max_concurrent: 3, max_resident_bytes: 1GiB}}}}\n"
        f"- {{key_sha256: {two_digest}, tenant: {{name: two}}}}\n"
    )
    assert one not in file.read_text()
    tenants = Tenants.load(file)
    assert tenants.of(f"Bearer {one}").max_resident_bytes == 1 << 30
    assert tenants.of(f"bearer {two}").name == "two"
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {one}",
        one,
        f"Bearer {one}x",
        f"Bearer {one_digest}",
        "Bearer é",
    ):
        with pytest.raises(AuthenticationError):
            tenants.of(wrong)
    error = from_exception(AuthenticationError("x"))
    assert (error.status, error.code, error.headers) == (401, "invalid_api_key", (("WWW-Authenticate", "Bearer"),))


@pytest.mark.parametrize("name", ["me", "123", "on", "null", "1e3", "a.b@c-d_e"])
def test_the_line_of_a_new_key_can_be_read(tmp_path: Path, name: str) -> None:
    key, digest = new_key()
    line = entry(digest, name)
    file = tmp_path / "keys.yaml"
    file.write_text(f"{line}\n{line}\n")
    assert line.startswith("- ") and "\n" not in line
    assert Tenants.load(file).of(f"Bearer {key}").name == name


@pytest.mark.parametrize("name", ["my team", "a:b", "", "x" * 129])
def test_no_tenant_has_such_a_name(name: str) -> None:
    with pytest.raises(StartError, match="--tenant"):
        entry("0" * 64, name)


def test_without_a_file_everybody_comes_and_salts_are_their_own() -> None:
    anybody = Tenants.load(None).of(None)
    assert anybody.scoped_name("s") == "s" and anybody.max_concurrent is None
    salts = [Tenant(name=name).scoped_name(asked) for name, asked in (("a", "b"), ("a", ""), ("ab", ""), ("b", "a"))]
    assert len({*salts, "", "b", "a"}) == 7
    sessions = {Tenant(name=name).scoped_name("trip") for name in ("a", "b")} | {anybody.scoped_name("trip")}
    assert len(sessions) == 3 and "trip" in sessions


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "a: b", "- {key_sha256: abc, tenant: {name: x}}", "- {tenant: {name: x}}", "\xff",
        f"- {{key_sha256: {'0' * 64}, tenant: {{name: 'a b'}}}}", f"- {{key_sha256: {'0' * 64}, tenant: {{nam: x}}}}",
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_said_at_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(StartError, match="api-keys-file"):
        Tenants.load(file)
    with pytest.raises(StartError):
        Tenants.load(tmp_path / "missing")


def test_several_doors_keep_their_limits_together() -> None:
    doors = [door(max_queued_requests=4, max_queued_tokens=100)[0] for _ in range(3)]

    def tell_each_other() -> None:
        usages = [one.usage(str(number)) for number, one in enumerate(doors)]
        for number, one in enumerate(doors):
            one.set_remote_usage([usage for usage in usages if usage.ingress != str(number)])
            one.check_integrity()

    tenant = Tenant(name="t", max_concurrent=3, max_resident_bytes=100)
    tickets = [one.admit(tenant, [10], 20) for one in doors]
    tell_each_other()
    for one in doors:
        with pytest.raises(TooManyRequestsError, match="your key has 3 requests under way and may have 3"):
            one.admit(tenant, [10], 20)
    fourth = doors[0].admit(Tenant(name="u"), [10], 0)
    tell_each_other()
    for one in doors:
        with pytest.raises(TooManyRequestsError, match="4 requests wait already"):
            one.check_open()
    tickets.pop().close()
    tell_each_other()
    with pytest.raises(TooManyRequestsError, match="30 prompt tokens wait already, and this request has 80"):
        doors[2].admit(Tenant(name="u"), [80], 0)
    with pytest.raises(TooManyRequestsError, match="your key's requests hold 40 bytes of K/V and may hold 100"):
        doors[2].admit(tenant, [10], 70)
    tickets.append(doors[2].admit(tenant, [10], 60))
    for ticket in (*tickets, fourth):
        ticket.close()
    tell_each_other()
    assert [one.usage("") for one in doors] == [Usage("")] * 3
    long = doors[1].admit(Tenant(name="u"), [5000], 0)  # nobody waits anywhere
    tell_each_other()
    with pytest.raises(TooManyRequestsError, match="5000 prompt tokens"):
        doors[0].admit(Tenant(name="u"), [1], 0)
    long.close()
    doors[0].set_remote_usage([])  # the others are gone, with all they had
    doors[0].admit(Tenant(name="u"), [1], 0).close()
    doors[0].check_integrity()
