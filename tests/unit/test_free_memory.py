"""What a process may still take: of the machine, of its control groups, and of a file system."""

import os
from pathlib import Path

import pytest

from forecache.workers.free_memory import available_bytes, room_bytes

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")
    write(tmp_path / "proc/self/cgroup", "")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def group_v2(place: Path, limit: int | str, used: int, cached: int = 0) -> None:
    write(place / "memory.max", f"{limit}\n")
    write(place / "memory.current", f"{used}\n")
    write(place / "memory.stat", f"anon {used - cached}\ninactive_file {cached}\nactive_file 0\n")


def group_v1(place: Path, limit: int, used: int, cached: int = 0) -> None:
    write(place / "memory.limit_in_bytes", f"{limit}\n")
    write(place / "memory.usage_in_bytes", f"{used}\n")
    write(place / "memory.stat", f"inactive_file 7\ntotal_inactive_file {cached}\n")


def test_without_groups_it_is_the_machines(root: Path) -> None:
    assert available_bytes(root) == 1000 * MIB


def test_the_group_of_a_container(root: Path) -> None:
    """Its page cache does not count: the kernel frees it first."""
    write(root / "proc/self/cgroup", "0::/\n")
    group_v2(root / "sys/fs/cgroup", 600 * MIB, 300 * MIB, cached=100 * MIB)
    assert available_bytes(root) == 400 * MIB


def test_the_tightest_of_the_groups_around_it(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/kubepods/pod/box\n")
    cgroup = root / "sys/fs/cgroup"
    group_v2(cgroup / "kubepods/pod/box", "max", 50 * MIB)
    group_v2(cgroup / "kubepods/pod", 500 * MIB, 450 * MIB)
    group_v2(cgroup / "kubepods", 5000 * MIB, 100 * MIB)
    assert available_bytes(root) == 50 * MIB
    group_v2(cgroup / "kubepods/pod", 500 * MIB, 600 * MIB)
    assert available_bytes(root) == 0


def test_version_1_and_a_path_of_the_host(root: Path) -> None:
    """A container sees its own group as the root of the mount, under the path of the host."""
    write(root / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    group_v1(root / "sys/fs/cgroup/memory", 700 * MIB, 300 * MIB, cached=50 * MIB)
    assert available_bytes(root) == 450 * MIB
    group_v1(root / "sys/fs/cgroup/memory", (1 << 63) - 4096, 300 * MIB)
    assert available_bytes(root) == 1000 * MIB


def test_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes() <= total


def test_the_room_of_a_directory(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert 0 < room_bytes(tmp_path) <= stat.f_blocks * stat.f_frsize
