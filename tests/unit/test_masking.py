"""The cost of masking secrets in long texts, and its result: clients choose the texts, event loops mask them."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from forecache.cluster.config import TelemetryConfig
from forecache.cluster.errors import UnknownModelError, from_exception, from_http_status
from forecache.cluster.observe import logs
from forecache.workers.errors import InvalidRequestError
from forecache.workers.masking import CLIENT_CHARS, LOG_CHARS, mask_log, mask_places, mask_secrets

PIECES = [
    *("a-", "a.", "a", "-", ".", "1.", "a+", "a:", "a.a:1", "a:12", "x://", "a://a:", "://@", "a://@", "@", "é", "_"),
    *("/", "/a", "~/", "%/", "/v1", "/v1%", "[", "[:", "[a]:", "10.1.", "1:", " ", "\n", "\t ", "=", "'", '"', "("),
    *(
        "Bearer ",
        "bearer,",
        "fc-",
        "sk-a",
        "fc-aaaaaaaa",
        "-",
        "--api-keys-file",
        "--api-keys-file=",
        "api_keys_file = ",
    ),
    *("api_keys_file = ", "api_keys_file=a(", "password", "password=", "password ", "secret'", "api-key:"),
    *("requirepass ", "requirepass"),
]
LENGTH = 64 << 10
WORK = """
import sys, time
from forecache.workers import masking
pieces, length = eval(sys.argv[1]), int(sys.argv[2])
for piece in pieces:
    text = "x" + piece * (length // len(piece))
    masking._replaced(masking._replaced(text + "!", masking._SECRETS), masking._PLACES)
"""


def test_masking_takes_time_linear_in_the_text() -> None:
    """Patterns that rescan 64 KiB from each start would take minutes; all of these texts take seconds."""
    command = [sys.executable, "-c", WORK, repr(PIECES), str(LENGTH)]
    subprocess.run(command, timeout=120, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("piece", ["a-", "a.", "x://", "a://a:", "/", "password "])
def test_a_client_chooses_no_more_than_the_longest_message(piece: str) -> None:
    text = piece * LENGTH
    for said in (from_exception(InvalidRequestError(text)), from_exception(UnknownModelError(f"no model {text}"))):
        assert len(said.message) <= CLIENT_CHARS + 2
    for status in (404, 405):
        assert len(from_http_status(status, piece * 1000, f"/{text}", "").message) < 300
    assert len(mask_log(text)) <= LOG_CHARS


@pytest.mark.parametrize("at", range(CLIENT_CHARS - 40, CLIENT_CHARS + 4))
@pytest.mark.parametrize("secret", ["redis://:hunter2@h/0", "fc-hunter2hunter2", "Bearer hunter2", "password=hunter2"])
def test_a_cut_leaves_no_half_of_a_secret(secret: str, at: int) -> None:
    said = mask_places("a " * (at // 2) + "b" * (at % 2) + f" {secret} " + "c " * CLIENT_CHARS)
    assert "hu" not in said and said.endswith("…")


def test_a_long_log_text_keeps_its_beginning_and_its_last_lines() -> None:
    lines = [f"line {number} of redis://:hunter2@host:1/0" for number in range(5000)]
    masked = mask_log("\n".join(lines))
    assert masked.startswith("line 0 of redis://…@host:1/0\nline 1 ")
    assert masked.endswith("line 4998 of redis://…@host:1/0\nline 4999 of redis://…@host:1/0")
    assert "characters left out)" in masked and "hunter2" not in masked and len(masked) < LOG_CHARS
    assert mask_log(masked) == masked


@pytest.mark.parametrize("at", range(0, 40))
def test_the_cut_of_a_log_text_leaves_no_half_of_a_secret(at: int) -> None:
    line = "the url is redis://:hunter2hunter2@host:1/0 now"
    one_line = mask_log("a" * at + f" {line}" * 1000)
    many_lines = mask_log("a" * at + f"\n{line}" * 1000)
    for masked in (one_line, many_lines):
        assert "hu" not in masked and "nter" not in masked and "redis://…@host:1/0" in masked


def test_a_log_line_of_any_length_is_written_short() -> None:
    for log_format in ("json", "text"):
        stream = io.StringIO()
        logger = logging.getLogger(logs.LOGGER)
        logs.configure(TelemetryConfig(log_format=log_format), "ingress", "1", stream)
        logger.warning("said %s", "a.b " * LENGTH)
        logger.warning("said", extra={"what": "a.b " * LENGTH})
        lines = stream.getvalue().splitlines()
        assert len(lines) == 2 and all("characters left out" in line for line in lines)
        assert all(len(line) < LOG_CHARS for line in lines)
        if log_format == "json":
            assert json.loads(lines[1])["what"].startswith("a.b a.b ")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("at -http://u:p@h/x", "at [address]"),
        ("9redis://:pw@h", "[address]"),
        ("node7:8265, node7:80, a.b.c:443", "[address], [address], [address]"),
        ("localhost:80 redis:6379", "[address] [address]"),
        ("param:100, max_tokens:16, 12:30, line:7", "param:100, max_tokens:16, 12:30, line:7"),
        ("a:b.c:8265", "a:[address]"),
        ("x..y:8265", "[address]"),
    ],
)
def test_addresses_are_hidden_and_numbers_are_not(text: str, masked: str) -> None:
    assert mask_places(text) == masked


def test_a_password_is_hidden_behind_whatever_scheme() -> None:
    assert mask_secrets("9redis+x://:pw@h _://a:b@c") == "9redis+x://…@h _://…@c"
