"""The embedded Redis server answers, stores nothing on disk, and ends with the process that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from forecache.cluster.launch import redis_server
from forecache.cluster.launch.redis_server import EmbeddedRedis, RedisStartError

OWNER = """
import time
from forecache.cluster.launch.redis_server import EmbeddedRedis
server = EmbeddedRedis()
print(server.pid, flush=True)
time.sleep(60)
"""


def answers(url: str) -> bool:
    with redis.from_url(url, socket_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_it_answers_and_ends(host: str | None) -> None:
    with EmbeddedRedis(host) as server:
        assert server.url.startswith("unix://" if host is None else "redis://:")
        with redis.from_url(server.url) as client:
            client.set("a", "b")
            assert client.get("a") == b"b"
        assert client.config_get("save")["save"] == ""
        pid, url = server.pid, server.url
    assert not Path(f"/proc/{pid}").exists() and not answers(url)
    server.close()


def test_over_tcp_it_wants_its_password() -> None:
    with EmbeddedRedis("127.0.0.1") as server:
        address = server.url.rsplit("@", 1)[1]
        with redis.from_url(f"redis://{address}") as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        password = server.url.split(":")[2].split("@")[0]
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_two_servers_do_not_meet() -> None:
    with EmbeddedRedis("127.0.0.1") as one, EmbeddedRedis("127.0.0.1") as two:
        with redis.from_url(one.url) as client:
            client.set("a", "b")
        with redis.from_url(two.url) as client:
            assert client.get("a") is None


def test_it_ends_with_its_owner_also_when_that_one_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed owner can't remove its folder
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 10
    while _running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_machine_without_a_server_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "find_redis_server", lambda: None)
    with pytest.raises(RedisStartError, match=r"install redis-server.*--redis-url"):
        EmbeddedRedis()


def test_a_server_that_does_not_start_is_told_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no memory for you\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(redis_server, "find_redis_server", lambda: broken)
    with pytest.raises(RedisStartError, match="no memory for you"):
        EmbeddedRedis()


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
