"""How large the hot pool of a worker is whose settings leave it open (``--hot-bytes auto``)."""

import math
from dataclasses import dataclass

from forecache.workers.errors import MemorySizeError

CPU_SHARE = 0.5
"""Of the memory that is available once weights and cold memory have theirs. The other half is for activations."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU in bytes, once the weights are loaded and before the pool is allocated.

    Attributes:
        total: of the device.
        free: that no process uses.
        own: that this process uses, such as for weights.
        runner: what the runner keeps, such as states of sequences.
        activations: what the largest step takes beyond that.
        graphs: what CUDA graphs will take.
    """

    total: int
    free: int
    own: int
    runner: int
    activations: int
    graphs: int


def gpu_pool_bytes(memory: DeviceMemory, utilization: float, least: int) -> int:
    """Bytes of the pool if this process may use the share ``utilization`` of all memory of the GPU.

    As in vLLM, the share is of the whole device and for this process alone: what is left of it after weights,
    activations and graphs is the pool's, and a start where others already use more of the device is refused.

    Raises :class:`MemorySizeError` if the pool would have less than ``least`` bytes. It names a share that would do, if
    there is one.
    """
    wanted = int(memory.total * utilization)
    free_for_us = memory.free + memory.own
    fitting = math.floor(100 * free_for_us / memory.total) / 100
    taken = memory.own + memory.runner + memory.activations + memory.graphs
    needed = math.ceil(100 * (taken + least + 1) / memory.total) / 100
    if wanted > free_for_us:
        advice = f"Lower it to {fitting:g}, or end" if needed <= fitting else "End"
        raise MemorySizeError(
            f"--gpu-memory-utilization {utilization:g} of the {memory.total} bytes of the GPU is {wanted}, but other "
            f"processes leave only {free_for_us}. {advice} the processes that use the GPU."
        )
    if wanted - taken < least:
        advice = (
            f"Raise it to {needed:g} or more, "
            if needed <= min(fitting, 1.0)
            else f"This needs a GPU with {taken + least} free bytes; or "
        )
        raise MemorySizeError(
            f"--gpu-memory-utilization {utilization:g} leaves {max(wanted - taken, 0)} bytes for the hot pool, which "
            f"needs at least {least}: weights take {memory.own}, states {memory.runner}, the largest step "
            f"{memory.activations} and CUDA graphs {memory.graphs} of {memory.total}. {advice}lower "
            "--max-step-tokens or --max-batch-size, or serve a smaller model."
        )
    return wanted - taken


def cpu_pool_bytes(available: int, least: int, *, sharers: int = 1, claimed_bytes: int = 0) -> int:
    """Bytes of the pool on a CPU where ``available`` bytes are free and ``sharers`` workers take as much each.

    ``claimed_bytes``: what other workers of the node may still load.

    Raises :class:`MemorySizeError` if it would have less than ``least`` bytes. It names the memory that would do.
    """
    share = int(CPU_SHARE * (available - claimed_bytes) / sharers)
    if share < least:
        needed = claimed_bytes + math.ceil(least / CPU_SHARE + 1) * sharers
        raise MemorySizeError(
            f"{available} bytes of memory are available after weights and cold memory, too little for a hot pool of "
            f"at least {least} bytes: {needed} bytes would do. Lower --cold-bytes, run fewer --workers on a machine, "
            "or serve a smaller model."
        )
    return share


def check_pool_fits(wanted: int, available: int) -> None:
    """Raise :class:`MemorySizeError` if ``wanted`` bytes, which the user asks for, are more than ``available``."""
    if wanted > available:
        raise MemorySizeError(
            f"--hot-bytes {wanted} is more than the {available} bytes that are free on the device after the weights: "
            f"lower it to {available} or less, or use auto."
        )
