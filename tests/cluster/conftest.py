"""Starts Ray clusters and `forecache serve` with a small model, for all tests of this folder."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent))  # modules that tests share with the scripts in this folder

from byte_model import write_byte_model
from processes import processes_below, still_running
from ray_nodes import HEAD, NODE

from forecache.cluster.launch.cluster import NAMESPACE

START_S = 180.0
STOP_S = 60.0


@pytest.fixture(scope="module")
def by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pickle the test module's classes by value: Ray's processes run them, but can't import the module."""
    cloudpickle: Any = ray.cloudpickle
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


SHARED = ("one_node", "two_nodes", "cluster", "plain_server")
"""Fixtures of the session that cost seconds to start. Only one of them runs at a time."""
_ends: dict[str, Callable[[], None]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests: those without a shared cluster first, then those of each shared cluster together."""
    items.sort(key=lambda item: [name in _fixtures(item) for name in SHARED])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """End a session fixture once no later test uses it."""
    yield
    for name in _ends.keys() - _fixtures(nextitem):
        _ends.pop(name)()


def pytest_sessionfinish() -> None:
    """End fixtures that an interrupted session left running."""
    while _ends:
        _ends.popitem()[1]()


def _fixtures(item: pytest.Item | None) -> set[str]:
    return set(item.fixturenames) if isinstance(item, pytest.Function) else set()


@pytest.fixture(scope="session")
def one_node() -> None:
    """A Ray cluster of one node."""
    ray.init("local", log_to_driver=False, **{**HEAD, "num_cpus": 2})
    _ends["one_node"] = ray.shutdown


@pytest.fixture(scope="session")
def two_nodes() -> Any:
    """A Ray cluster that this process has not joined. Its second node is too small for a worker."""
    cluster: Any = Cluster(initialize_head=True, head_node_args={**HEAD, "num_cpus": 2})
    _ends["two_nodes"] = cluster.shutdown
    cluster.add_node(**{**NODE, "num_cpus": 0})
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Any:
    """A Ray cluster of three nodes that this process has joined. Tests that remove a node add another."""
    cluster: Any = Cluster(initialize_head=True, head_node_args=HEAD)

    def end() -> None:
        ray.shutdown()
        cluster.shutdown()

    _ends["cluster"] = end
    for _ in range(2):
        cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, namespace=NAMESPACE)
    return cluster


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `bytes` with the small random model."""
    return write_byte_model(tmp_path_factory.mktemp("models") / "bytes")


@dataclass
class Server:
    """A running `forecache serve`; ``url`` without `/v1`."""

    process: "subprocess.Popen[str]"
    url: str
    arena_dir: Path

    def __post_init__(self) -> None:
        # one for all requests: making one reads certificates for 0.1 s of CPU time, seconds on a machine that is busy,
        # in which what a test has running may come to its end. Each request has a connection of its own
        self.http = httpx.Client(
            base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def stream(self, path: str, body: Any, **options: Any) -> AbstractContextManager[httpx.Response]:
        return self.http.stream("POST", path, json=body, **options)

    def stored_session(self, session_id: str, chunks: int, within_s: float = 30) -> dict[str, Any]:
        """Wait until ``chunks`` chunks of the session are stored, which happens in the background.

        Returns the server's description of the session.
        """
        start = time.monotonic()
        while True:
            told = self.get(f"/v1/sessions/{session_id}")
            session: dict[str, Any] = told.json()
            if told.status_code == 200 and session["stored_chunks"] >= chunks:
                return session
            assert time.monotonic() - start < within_s, told.text
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sum of a series over its labels and processes."""
        return sum(self.samples(name))

    def samples(self, name: str) -> list[float]:
        """The current samples of a series, one per label set and process. (`/metrics/cluster` may be a second old.)"""
        pattern = re.compile(rf"^{name}(?:{{[^}}]*}})? (\S+)$", re.MULTILINE)
        found = [float(value) for _, page in self.pages() for value in pattern.findall(page)]
        assert found, f"no series {name}"
        return found

    def pages(self) -> Iterator[tuple[dict[str, str], str]]:
        """The labels and the `/metrics` of every process."""
        for group in self.get("/metrics/targets").json():
            [address] = group["targets"]
            try:
                yield group["labels"], self.get(f"http://{address}/metrics").raise_for_status().text
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                continue  # the list may be a second old too, and name a process that was killed

    def wait_for_metric(self, name: str, value: float, within_s: float) -> float:
        """Wait until the series has the value; returns the seconds it took. Fails after the deadline."""
        start = time.monotonic()
        while (now := self.metric(name)) != value:
            assert time.monotonic() - start < within_s, f"{name} is {now}, not {value}, after {within_s} s"
            time.sleep(0.05)
        return time.monotonic() - start

    def kill_worker(self, *, of: int) -> None:
        """Kill one of ``of`` decode workers with SIGKILL."""
        workers = [pid for pid, name in processes_below(self.process.pid).items() if "DecodeWorker" in name]
        assert len(workers) == of
        os.kill(min(workers), signal.SIGKILL)

    def end(self) -> None:
        """Stop the server with SIGTERM, and check that no process and no arena is left."""
        try:
            processes = processes_below(self.process.pid)
            assert len(processes) >= 5, "Ray's, Redis, the actors"
            assert list(self.arena_dir.glob("forecache-*"))
            self.process.terminate()
            assert self.process.wait(STOP_S) == 0
            assert not still_running(processes)
            assert not list(self.arena_dir.glob("forecache-*"))
        finally:
            if self.process.poll() is None:
                self.process.kill()


Command = Callable[..., list[str]]
Start = Callable[..., Server]


@pytest.fixture(scope="session")
def serve_command() -> Command:
    """The command line of a server of ``model`` with its arenas in ``arena_dir``, and with extra flags."""

    def command(model: Path, arena_dir: Path, *flags: str) -> list[str]:
        return [
            *(sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", str(model), "--port", "0"),
            *("--arena-dir", str(arena_dir), "--cold-bytes", "128MiB", "--hot-bytes", "8MiB"),
            *("--threads", "1", "--chunk-tokens", "16", "--start-deadline-s", str(START_S)),
            *("--min-resident-tokens", "0", *flags),  # prompts are short, and most tests are of partial sets
        ]

    return command


def launch(command: list[str], arena_dir: Path, environment: dict[str, str] | None = None) -> Server:
    """Start a server with extra environment variables, and wait until it is ready."""
    environ = {**os.environ, **(environment or {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := re.search(r"(http://\S+)/v1", line):
                return Server(process, match[1], arena_dir)
    except BaseException:
        process.terminate()
        raise
    raise AssertionError(f"the server ended with status {process.wait()} before it was ready")


@pytest.fixture(scope="module")
def start_server(byte_model: Path, serve_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers of the small model with extra flags and environment variables. They end with the module."""
    started: list[Server] = []

    def start(*flags: str, environment: dict[str, str] | None = None) -> Server:
        arena_dir = tmp_path_factory.mktemp("arena")
        started.append(launch(serve_command(byte_model, arena_dir, *flags), arena_dir, environment))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
    for server in started:
        try:
            server.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.fixture(scope="session")
def plain_server(byte_model: Path, serve_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of the small model with default flags, shared by all modules. Its end is tested too."""
    arena_dir = tmp_path_factory.mktemp("arena")
    server = launch(serve_command(byte_model, arena_dir), arena_dir)
    _ends["plain_server"] = server.end
    return server
