"""No error message shows an address, path or secret to a client, and no log line shows a secret."""

import asyncio
import importlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from fake_workers import ONE_TRY, Errors, Workers, stream_over
from fastapi.testclient import TestClient

from forecache.cluster import errors
from forecache.cluster.config import LimitsConfig, ServeConfig, TelemetryConfig
from forecache.cluster.dispatch.admission import Admission, ResidentEstimate
from forecache.cluster.errors import RefusedError, StartError, from_exception, from_http_status
from forecache.cluster.http.api import Api
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.responses import AnswerFormat, server_sent_events
from forecache.cluster.launch.machine import check_redis
from forecache.cluster.observe import logs
from forecache.cluster.observe.metrics import Metrics
from forecache.cluster.tenants import Tenants, new_key
from forecache.cluster.tiers import Tiers
from forecache.indexer.serving.config import SelectionConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import GenerateRequest, TokenEvent
from forecache.workers.errors import CatalogUnavailableError, ForecacheError, InvalidRequestError
from forecache.workers.masking import mask_places, mask_secrets
from forecache.workers.memory.tier.catalog import Catalog
from forecache.workers.models.dense.probe import _FirstCallError
from forecache.workers.models.tokenizer import load_tokenizer

PASSWORD, KEY, FILE = "hunter2/s3cr@t", new_key()[0], "tenants-of-acme"
URL = f"redis://:{PASSWORD}@10.1.2.3:6379/0"
PLANTED = (
    f"Redis at {URL} does not answer; see --api-keys-file /etc/forecache/{FILE}.yaml, node7.internal:8265, "
    f"[fe80::1]:9001 and /home/acme/models/llama; the key was {KEY}, password={PASSWORD}"
)
PLACES = ("10.1.2.3", "6379", "node7", "8265", "fe80", "9001", "/home", "acme", "/etc")
SECRETS = ("hunter2", "s3cr", KEY, FILE)
OPTIONAL = {"matplotlib", "opentelemetry", "triton"}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token per byte."""
    spec = importlib.util.spec_from_file_location("byte_model", Path(__file__).parents[1] / "cluster" / "byte_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.write_byte_model(tmp_path_factory.mktemp("bytes"))
    return path


def _modules() -> Iterator[str]:
    for package in ("cluster", "workers", "indexer", "kernels"):
        # not forecache.__path__, which names no folder where the package is installed in editable mode
        folder = Path(str(errors.__file__)).parents[1] / package
        files = list(folder.rglob("*.py"))
        assert files, folder
        for sub in files:
            yield ".".join(["forecache", package, *sub.relative_to(folder).with_suffix("").parts])


def _error_types() -> list[type[BaseException]]:
    """All exception types that the package defines."""
    for name in sorted(set(_modules())):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert (error.name or "").partition(".")[0] in OPTIONAL, name
    found: dict[str, type[BaseException]] = {}
    seen, left = set[type[BaseException]](), [BaseException]
    while left:
        for kind in left.pop().__subclasses__():
            if kind not in seen:
                seen.add(kind)
                left.append(kind)
                if kind.__module__.startswith("forecache."):
                    found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return [found[name] for name in sorted(found)]


def _made(kind: type[BaseException]) -> BaseException:
    if kind is RefusedError:
        return RefusedError(from_exception(InvalidRequestError(PLANTED)))
    if kind is _FirstCallError:
        first_call = _FirstCallError(*[torch.zeros(1, 1, 1, 1)] * 3, None)
        first_call.args = (PLANTED,)
        return first_call
    for arguments in ((PLANTED,), (PLANTED, 1.0), (PLANTED, "param")):
        try:
            return kind(*arguments)
        except TypeError:
            continue
    raise AssertionError(f"give {kind} a way to be made here")


OURS = [_made(kind) for kind in _error_types()]
OTHERS: list[BaseException] = [
    RuntimeError(PLANTED),
    KeyError(PLANTED),
    OSError(2, PLANTED, "/home/acme/model"),
    redis.ConnectionError(PLANTED),
    UnicodeDecodeError("utf-8", PLANTED.encode(), 0, 1, PLANTED),
    AssertionError(PLANTED),
]
EXCEPTIONS = [error for error in [*OURS, *OTHERS] if isinstance(error, Exception)]


def test_all_error_types_are_walked() -> None:
    names = {type(error).__name__ for error in OURS}
    assert {"CatalogUnavailableError", "ChunkLostError", "TierAwayError", "StartError", "ManifestError"} <= names
    assert {"WorkerSilentError", "IndexerUnavailableError", "CheckpointError", "RedisStartError"} <= names
    assert len(names) > 30


def _ids(error: Exception) -> str:
    return type(error).__name__


def _assert_safe(text: str) -> None:
    for hidden in (*SECRETS, *PLACES):
        assert hidden not in text, text


@pytest.fixture
def log() -> io.StringIO:
    """The JSON log of a process that is configured as all processes are."""
    stream = io.StringIO()
    logs.configure(TelemetryConfig(log_format="json", log_level="info"), "ingress", "1", stream)
    return stream


RESIDENT = ResidentEstimate(EngineConfig(), SelectionConfig(), 1000)


class Failing:
    """Fake workers that fail with a given error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    failover_config = ONE_TRY

    def start(self, request: GenerateRequest) -> Any:
        return Stream(self.error)

    async def stats(self) -> list[Any]:
        raise self.error


class Stream:
    def __init__(self, error: Exception, *before: TokenEvent) -> None:
        self._error, self._before = error, list(before)
        self.assigned = True

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._before:
            return self._before.pop(0)
        raise self._error

    def cancel(self) -> None:
        pass


@contextmanager
def _client(text_model: Path, error: Exception) -> Iterator[TestClient]:
    encoder = PromptEncoder(load_tokenizer(text_model), 4096)
    admission = Admission(LimitsConfig())
    api = Api(Failing(error), encoder, Metrics("m"), admission, Tenants.load(None), RESIDENT)
    try:
        with TestClient(api.app(), raise_server_exceptions=False) as client:
            yield client
    finally:
        encoder.close()


@pytest.mark.parametrize("error", EXCEPTIONS, ids=_ids)
def test_an_error_object_is_safe(error: Exception) -> None:
    said = from_exception(error)
    _assert_safe(json.dumps(said.body(), ensure_ascii=False))
    assert said.message
    if not isinstance(error, ForecacheError):
        assert said.message == "internal error; the server's log has the details"


@pytest.mark.parametrize("error", EXCEPTIONS, ids=_ids)
def test_http_answers_and_the_log_are_safe(text_model: Path, log: io.StringIO, error: Exception) -> None:
    with _client(text_model, error) as client:
        request = {"model": "m", "prompt": "abc", "max_tokens": 2}
        for more in ({}, {"stream": True}):
            answer = client.post("/v1/completions", json=request | more)
            assert answer.status_code >= 400
            assert answer.json()["error"]["message"]
            _assert_safe(answer.text + str(dict(answer.headers)))
        ready = client.get("/ready")
        assert ready.status_code in (500, 503)
        _assert_safe(ready.text)
        for path in ("/health", "/metrics", "/openapi.json", "/v1/models"):
            _assert_safe(client.get(path).text)
    written = log.getvalue()
    assert not any(secret in written for secret in SECRETS), written
    if from_exception(error).status >= 500 and type(error).__name__ not in ("OverloadedError", "DrainingError"):
        assert "10.1.2.3:6379" in written  # the operator gets the details


@pytest.mark.parametrize("error", EXCEPTIONS, ids=_ids)
def test_error_events_of_a_stream_and_the_log_are_safe(log: io.StringIO, error: Exception) -> None:
    answer = AnswerFormat("id", 1, "m", chat=True, prompt_tokens=(3,))
    begun = TokenEvent("r", (1,), "a")
    stream, failed = stream_over(Workers(lambda _: Stream(error, begun))), Errors()

    async def told() -> str:
        return "".join([line async for line in server_sent_events(stream, answer, failed)])

    text = asyncio.run(told())
    assert '"error"' in text and len(failed.kinds) == 1
    _assert_safe(text)
    assert not any(secret in log.getvalue() for secret in SECRETS)


def test_log_lines_of_any_library_are_masked() -> None:
    """Also log lines of Ray and Serve, with their handlers and formatters; in a separate process."""
    program = f"""
import logging, sys
from forecache.cluster.observe import logs
from forecache.cluster.config import TelemetryConfig
logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout)
logs.configure(TelemetryConfig(), "worker", "1", sys.stdout)
planted = {PLANTED!r}
for name in ("ray.serve", "ray.worker", "forecache.workers", "uvicorn.error", ""):
    logger = logging.getLogger(name)
    logger.warning("said %s", planted)
    logger.warning(planted.replace("%", "%%"), extra={{"redis_url": {URL!r}}})
    try:
        raise RuntimeError(planted)
    except RuntimeError:
        logger.exception("failed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    written = done.stdout + done.stderr
    assert written.count("RuntimeError: Redis at redis://…@10.1.2.3:6379/0 does not answer") == 5
    assert not any(secret in written for secret in SECRETS), written


def test_the_catalog_does_not_name_its_password() -> None:
    """A fault that occurred: the text of a 503 contained the Redis password."""
    with (
        Catalog("redis://:hunter2@127.0.0.1:1/0", timeout_s=0.5) as catalog,
        pytest.raises(CatalogUnavailableError, match=r"Redis at redis://…@127\.0\.0\.1:1/0 does not answer") as lost,
    ):
        catalog.tiers()
    said = from_exception(lost.value)
    assert (said.status, said.code) == (503, "memory_unavailable")
    assert said.message == "the cluster's catalog does not answer now; send the request again"
    with pytest.raises(CatalogUnavailableError) as wrong:
        Catalog("http://:hunter2@host/0")
    assert "hunter2" not in str(wrong.value)
    for url in ("redis://:hunter2@127.0.0.1:1/0", "http://:hunter2@host/0"):
        with pytest.raises(StartError) as refused:
            check_redis(url, timeout_s=0.5)
        assert "hunter2" not in str(refused.value)


def test_settings_do_not_print_the_password() -> None:
    config = ServeConfig(redis_url=URL)
    assert "hunter2" not in f"{config} {config!r} {Tiers('n', 'r', URL, 1.0)!r}"


def test_other_processes_do_not_see_the_password_in_the_command_line() -> None:
    program = (
        "import sys; from forecache.cluster.cli.command_line import hide_passwords; hide_passwords(); "
        "print(open('/proc/self/cmdline').read().split(chr(0))[3:]); print(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "serve", "--redis-url", URL, "--model", "org/name@main"]
    seen, own = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    hidden = "*" * len(f":{PASSWORD}")
    assert seen.rstrip(", ']") == str(
        ["serve", "--redis-url", f"redis://{hidden}@10.1.2.3:6379/0", "--model", "org/name@main"]
    ).rstrip("]'")
    assert own == str(command[3:])


@pytest.mark.parametrize(
    "text",
    [
        "the model 'org/name-1.5' does not exist here; 'm' is served",
        "the body is not valid JSON: Expecting value: line 1 column 1 (char 0)",
        "prompt and answer may need 3/4 of 12 chunks: lower max_tokens and/or raise --cold-bytes",
        "messages.0.content: Input should be a valid string",
        "the schema can't be followed: at /properties/name/items: unknown type",
        "use /v1/chat/completions",
    ],
)
def test_what_a_client_needs_to_know_stays(text: str) -> None:
    assert from_exception(InvalidRequestError(text)).message == mask_places(text) == text


def test_paths_that_a_client_asked_for_are_its_own() -> None:
    assert from_http_status(404, "GET", "/home/page", "Not Found").message == "no such path: /home/page"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"at {URL}.", "at redis://…@10.1.2.3:6379/0."),
        ("rediss://user:a@b@host:1/0 and unix:///run/r.sock", "rediss://…@host:1/0 and unix:///run/r.sock"),
        (f"Authorization: Bearer {KEY}", "Authorization: Bearer …"),
        (f"the key {KEY}", "the key fc-…"),
        ("requirepass abc def", "requirepass … def"),
        ("api_keys_file=PosixPath('/etc/keys.yaml')", "api_keys_file=…)"),
        ("--api-keys-file /etc/keys.yaml next", "--api-keys-file … next"),
        ("read 5 tokens of key 7, http://127.0.0.1:8000/v1", "read 5 tokens of key 7, http://127.0.0.1:8000/v1"),
    ],
    ids=lambda text: text.replace(KEY, "KEY"),  # the same in each process of pytest-xdist
)
def test_logs_keep_all_but_secrets(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
