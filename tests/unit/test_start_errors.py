"""A command that can't start prints one sentence to stderr and exits with status 2, without a traceback."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forecache.cluster.cli import main as cli
from forecache.cluster.cli.command_line import output_file, output_folder
from forecache.cluster.config import ConfigError, read_yaml
from forecache.cluster.errors import StartError
from forecache.cluster.launch import machine
from forecache.cluster.tenants import Tenants

SOON_S = 60.0
"""Of a machine that is busy; alone, a second or two."""

Serve = Callable[..., str]


def sentence(status: int, stderr: str) -> str:
    """The error that a command printed."""
    [line] = filter(None, stderr.splitlines())  # a progress bar that was cleared leaves an empty one
    assert status == 2 and line.startswith("forecache") and len(line) > 30
    return line


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """The error of `forecache serve` with these flags."""

    def run(*flags: str) -> str:
        command = [sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--arena-dir", str(tmp_path)]
        command += ["--cold-bytes", "1MiB", "--port", "0", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON_S)
        assert not done.stdout
        return sentence(done.returncode, done.stderr)

    return run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: [", "line 1, column 8"),
        ("- a", "must hold a mapping"),
        ("1: 2", "no setting named 1"),
        ("nope: 1", "no setting named nope"),
        ("engine: {nope: 1}", "no setting named engine.nope"),
        ("engine: {1: 1}", "engine"),
        ("engine: 5", "engine"),
        ("memory: {cold_bytes: lots}", "is not a size"),
        ("\x00", "can't be read"),
        ("[" * 100_000, "can't be read"),
    ],
)
def test_a_settings_file_that_is_wrong(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert said in sentence(cli.main(["serve", "--config", str(file)]), capsys.readouterr().err)


def test_a_settings_file_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match="can't be read"):
            read_yaml(path)


@pytest.mark.parametrize(
    "flags", [["--no-such-flag"], ["--cold-bytes", "-5GiB"], ["--port", "x"], ["--policy", "best"]]
)
def test_a_flag_that_is_wrong(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["serve", *flags])
    except SystemExit as end:
        status = int(str(end.code))
    sentence(status, capsys.readouterr().err)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["nope"],
        ["top", "--interval-s", "-1"],
        ["top", "--interval-s", "nan"],
        ["top", "--url", "nonsense", "--once"],
        ["top", "--url", "http://127.0.0.1:1", "--once"],
        ["demo", "--tokens", "0"],
        ["demo", "--keep-ratio", "7"],
        ["keys"],
        ["keys", "new", "--tenant", "a b"],
        ["doctor", "--cluster", "--address", "nonsense"],
        ["doctor", "--cluster", "--address", "127.0.0.1:1"],
        ["bench"],
        ["bench", "decode", "--context", "0"],
        ["bench", "decode", "--out", "/dev/null/x"],
        ["bench", "serve", "--model", "m", "--out", "/dev/null"],
        ["eval"],
        ["eval", "--out", "/dev/null/x"],
        ["indexer"],
        ["indexer", "calibrate", "--model", "m", "--out", "/none/x"],
        ["indexer", "calibrate", "--model", "m", "--out", "/dev"],
        ["indexer", "calibrate", "--model", "m", "--out", "x", "--documents", "0"],
        ["indexer", "record", "--model", "m", "--out", "/dev/null/x"],
        ["indexer", "train", "--data", "d", "--out", "/none/x"],
        ["indexer", "eval", "--data", "d", "--indexer", "i", "--out", "/none/x"],
    ],
    ids=" ".join,
)
def test_other_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before a model is loaded or anything is measured."""
    try:
        status = cli.main(command)
    except SystemExit as end:
        status = int(str(end.code))
    sentence(status, capsys.readouterr().err)


def test_a_ray_that_is_not_there(serve: Serve) -> None:
    assert "no Ray cluster is at --address 127.0.0.1:1 (" in serve("--address", "127.0.0.1:1")
    assert "write HOST:PORT" in serve("--address", "nonsense")
    assert "write HOST:PORT" in serve("--address", "ray://127.0.0.1:10001")


def test_what_listens_may_be_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port accepts connections and stays silent, as a web server that waits for a request."""
    monkeypatch.setattr(machine, "GCS_ANSWER_S", 0.5)
    with socket.create_server(("0.0.0.0", 0)) as silent, pytest.raises(StartError, match="not a Ray head"):
        machine.check_ray(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_port_that_is_taken(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"can't listen on 127.0.0.1:{port} (" in serve("--port", str(port))


def test_folders_that_are_not_there_or_too_small(tmp_path: Path, serve: Serve) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "none", file):
        with pytest.raises(StartError, match=r"--arena-dir .* is not a directory"):
            machine.check_arena_dir(path, 1, 1, None)
        with pytest.raises(StartError, match=r"--disk-dir .* is not a directory"):
            machine.check_disk_dir(path, 1)
    with pytest.raises(StartError, match="lower --cold-bytes"):
        machine.check_arena_dir(tmp_path, 1 << 60, 1, None)
    with pytest.raises(StartError, match="lower --disk-bytes"):
        machine.check_disk_dir(tmp_path, 1 << 60)
    assert "--disk-dir /none is not" in serve("--disk-bytes", "1MiB", "--disk-dir", "/none")


def test_no_redis(serve: Serve) -> None:
    assert "no Redis answers at redis://…@127.0.0.1:1" in serve("--redis-url", "redis://:secret@127.0.0.1:1")


@pytest.mark.parametrize("text", ["[", "- {key_sha256: x}", "a: b", "[" * 100_000])
def test_a_keys_file_that_is_wrong(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(StartError, match="can't be used") as raised:
        Tenants.load(file)
    assert "\n" not in str(raised.value)


def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The built-in model would be converted into that directory."""
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "bench", "decode", "--context", "100"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=2 * SOON_S, env={**os.environ, "HOME": "/dev/null"}
    )
    assert "/dev/null/.cache/forecache/models can't be written to" in done.stderr
    assert "Traceback" not in done.stderr and done.returncode == 2


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_model_without_a_file(
    missing: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / missing).unlink()
    assert str(model) in sentence(cli.main(["bench", "decode", "--model", str(model)]), capsys.readouterr().err)


def test_where_may_be_written(tmp_path: Path) -> None:
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    assert output_folder(str(tmp_path / "a/b/c")) == tmp_path / "a/b/c" and not (tmp_path / "a").exists()
