"""Log lines of processes, and holder names, by which tiers log whose request they serve."""

import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.cluster.config import TelemetryConfig
from forecache.cluster.observe import logs
from forecache.workers.memory.format.hold_id import HoldId, request_of


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("forecache.cluster.test")


def test_json_lines(logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure(TelemetryConfig(log_format="json", log_level="info"), "tier", "t1", stream)
    logger.info("looked up %s", "a\nb\u00e9", extra={"request_id": "r1", "held_chunks": 3})
    logger.debug("not this")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "logger": "forecache.cluster.test", "component": "tier", "process": "t1",
        "message": "looked up a\nb\u00e9", "request_id": "r1", "held_chunks": 3,
    }  # fmt: skip
    assert second["level"] == "error" and second["exception"].endswith("ValueError: why")


def test_text_lines(logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure(TelemetryConfig(log_level="info"), "tier", "t1", stream)
    logger.info("looked up", extra={"request_id": "r1"})
    assert stream.getvalue().endswith(" INFO forecache.cluster.test: looked up request_id=r1\n")


def test_a_second_configuration_replaces_the_first(logger: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    for stream in (first, second):
        logs.configure(TelemetryConfig(), "tier", "t1", stream)
    logger.warning("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1


@given(
    request_id=st.text("abc-~_123#@/", min_size=1, max_size=12),
    serial=st.integers(0, 10**6),
    traceparent=st.sampled_from(["", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]),
)
def test_a_holders_name_tells_its_request(request_id: str, serial: int, traceparent: str) -> None:
    assert request_of(HoldId("w", request_id, serial, traceparent).name) == (request_id, traceparent)


@pytest.mark.parametrize("name", ["", "transfer", "w/x", "bench"])
def test_other_holders_have_no_request(name: str) -> None:
    assert request_of(name) == ("", "")


@pytest.mark.parametrize(
    "wrong", [{"otlp_endpoint": "collector:4318"}, {"metrics_first_port": 65000, "metrics_ports": 1000}]
)
def test_settings_that_can_not_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"http://|65536"):
        TelemetryConfig.model_validate(wrong)
