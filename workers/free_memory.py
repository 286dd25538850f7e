"""How much memory this process may still take: of the machine, within the limits of its control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""Control groups of version 1 write a number as large as this when they have no limit."""


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that a new allocation finds without swapping: those of Linux (``MemAvailable``), or less where a control
    group limits this process, as in a container.

    ``root`` holds the ``proc`` and ``sys`` that are read.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(min([machine, *_left_in_groups(root)]), 0)


def room_bytes(directory: Path) -> int:
    """Bytes that files in ``directory`` may still take of its file system."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process, and each group around it, has left."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, used, unused = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, unused = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container may see its own group as the root of the mount, although the path is that of the host.
        group = mount / path.strip("/")
        for place in [group, *group.parents[: len(group.relative_to(mount).parts)]]:
            if (place / limit).is_file():
                left = _left(place, limit, used, unused)
                if left is not None:
                    yield left


def _left(group: Path, limit_file: str, used_file: str, unused_field: str) -> int | None:
    """The group's limit less its usage; files that it has not read lately are not counted, since the kernel frees
    them first. ``None``: it has no limit."""
    limit = (group / limit_file).read_text().strip()
    if limit == "max" or int(limit) >= UNLIMITED_BYTES:
        return None
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / used_file).read_text()) - int(fields.get(unused_field, 0))
    return int(limit) - max(used, 0)
