"""Finds and kills child processes and Ray actors."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray

END_S = 30.0


def process_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60))


def kill_for_good(actor: Any) -> None:
    """Kill an actor and wait for its end. `ray.kill` alone does not wait: the actor may still answer a call."""
    pid = process_of(actor)
    ray.kill(actor)
    end_s = time.monotonic() + END_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end_s, f"the process of an actor that was killed still runs after {END_S:g} s"
        time.sleep(0.05)


def processes_below(pid: int) -> dict[int, str]:
    """Process id → command line, of all living descendants of the process ``pid``."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            names[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found |= {child: names[child] for child in frontier}
    return found


def still_running(pids: Iterable[int]) -> set[int]:
    """The ``pids`` that have not ended; zombies have."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.add(pid)
    return running
