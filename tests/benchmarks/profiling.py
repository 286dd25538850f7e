"""Where the time of steps goes: on the device by kernel, on the host by function."""

import cProfile
import io
import pstats
import re
import time
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOVES_KV = re.compile(r"Memcpy|_gather_kernel|_store_(scaled_)?kernel|_(de)?quantize_kernel|_checksum_kernel")
"""Names of kernels and copies that compute nothing."""


def device_times(step: Callable[[], None], steps: int) -> tuple[profile, float]:
    """Profile ``steps`` calls of ``step``; the wall seconds come along."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=activities, acc_events=True) as profiled:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        duration_s = time.perf_counter() - start
    return profiled, duration_s


def copy_share(step: Callable[[], None], steps: int = 2) -> float:
    """Device time of what only moves K/V, over the wall time of ``steps`` calls of ``step``."""
    profiled, duration_s = device_times(step, steps)
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    moved_us = sum(event.self_device_time_total for event in events if MOVES_KV.search(event.key))
    return float(moved_us) / 1e6 / duration_s


def host_table(step: Callable[[], None], steps: int, rows: int = 60) -> str:
    """Seconds of host time in each function during ``steps`` calls of ``step``, the most expensive first."""
    profiler = cProfile.Profile()
    start = time.perf_counter()
    profiler.enable()
    for _ in range(steps):
        step()
    profiler.disable()
    duration_s = time.perf_counter() - start
    text = io.StringIO()
    for order in ("cumulative", "tottime"):
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats(order).print_stats(rows)
    return f"{steps} steps in {duration_s:.3f} s under cProfile\n{text.getvalue()}"


def device_table(step: Callable[[], None], steps: int, rows: int = 60) -> str:
    """torch.profiler's table of ``steps`` calls of ``step``."""
    profiled, duration_s = device_times(step, steps)
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=90)
    return f"{steps} steps in {duration_s:.3f} s under torch.profiler\n{table}"
