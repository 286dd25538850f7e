"""`forecache doctor` on this machine, and on machines that lack something."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from forecache.cluster.cli import doctor, integrity
from forecache.cluster.config import ServeConfig
from forecache.cluster.launch import redis_server
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.config import MemoryConfig


def test_this_machine_is_looked_at_whole() -> None:
    found = {finding.subject: finding for finding in doctor.findings(ServeConfig())}
    assert set(found) == {
        *("python", "torch", "transformers", "ray", "triton", "redis"),
        *("GPU", "CPU", "memory", "/dev/shm", "Redis server", "model"),
    }
    assert found["torch"].verdict == "ok" and found["torch"].found == importlib.metadata.version("torch")
    assert all(finding.remedy for finding in found.values() if finding.verdict == "will not work")


def test_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    small = doctor.check_shared_memory(tmp_path, 1 << 60)
    assert small.verdict == "will not work" and f"need {2**30:.2f} GiB" in small.remedy
    assert doctor.check_shared_memory(tmp_path, 1).verdict == "ok"
    assert doctor.check_shared_memory(tmp_path / "none", 1).found == "missing"


def test_memory_that_is_short_is_a_note() -> None:
    config = ServeConfig(memory=MemoryConfig(cold_bytes=1 << 60))
    finding = doctor.check_memory(config)
    assert finding.verdict == "note" and "--cold-bytes" in finding.remedy


def test_memory_says_what_a_server_would_take() -> None:
    finding = doctor.check_memory(ServeConfig())
    if finding.verdict == "ok":
        assert "GiB for cold memory" in finding.found
    else:
        assert "free memory" in finding.remedy


@pytest.mark.parametrize(("version", "pair"), [("2.13.0+cpu", (2, 13)), ("5.17", (5, 17)), ("2.dev", (2, 0))])
def test_version_pairs(version: str, pair: tuple[int, int]) -> None:
    assert doctor.version_pair(version) == pair


def test_versions_are_those_that_the_package_asks_for() -> None:
    asked = " ".join(importlib.metadata.requires("forecache") or ())
    for name, (major, minor) in doctor.MIN_VERSIONS.items():
        found = re.search(rf"\b{name}(?:\[\w+\])?>=(\d+)(?:\.(\d+))?", asked)
        assert found is not None, name
        assert (int(found[1]), int(found[2] or 0)) == (major, minor), name


def test_a_package_that_is_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.MIN_VERSIONS, "numpy", (999, 0))
    monkeypatch.setitem(doctor.MIN_VERSIONS, "surely-not-installed", (1, 0))
    old, missing = doctor.check_package("numpy"), doctor.check_package("surely-not-installed")
    assert old.verdict == "will not work" and old.remedy == "pip install 'numpy>=999.0'"
    assert missing.verdict == "will not work" and missing.found == "not installed"


def test_a_model_that_is_not_built_in() -> None:
    assert doctor.check_model("org/other").verdict == "note"


def test_redis_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "valkey-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_server.find_redis_server() == server
    assert doctor.check_redis_server().found == str(server)


def test_bad_memory_is_named_with_its_tier() -> None:
    good, bad = TierStats(9, 0, 0, 0, 0, 0), TierStats(9, 0, 0, 0, 0, 0, bad_slots=2, disk_bad_slots=1)
    memory, disk = integrity.bad_memory({"tier-a": good, "tier-b": bad})
    assert memory.startswith("bad memory on the node of tier-b: 2 slots")
    assert disk.startswith("bad disk on the node of tier-b: 1 slots")
