"""How large cold memory is on a node whose settings leave it open (``--cold-bytes auto``)."""

import math
from pathlib import Path

from forecache.workers.errors import MemorySizeError
from forecache.workers.free_memory import available_bytes, room_bytes

CPU_SHARE, GPU_SHARE = 0.5, 0.7
"""Share of the available memory. Models on a CPU also keep their hot pool and activations in it."""
ROOM_SHARE = 0.9
"""Share of the free room of the arena's file system; other programs write there too."""
LEAST_BYTES, MOST_BYTES = 64 << 20, 256 << 30
"""The least is room for a few chunks. More than the most is taken only where the user asks for it, since all pages of
the arena are reserved at the start, and on a GPU node locked too, which takes seconds for each ten GiB."""


def cold_share(device_type: str) -> float:
    """The share of available memory on a node whose models run on ``device_type``."""
    return GPU_SHARE if device_type == "cuda" else CPU_SHARE


def auto_cold_bytes(
    directory: Path, *, share: float, claimed_bytes: int = 0, claimed_room: int = 0, most_bytes: int = MOST_BYTES
) -> int:
    """:func:`cold_bytes_within` of this machine and the file system of ``directory``."""
    return cold_bytes_within(
        available_bytes(), room_bytes(directory), directory, share=share, claimed_bytes=claimed_bytes,
        claimed_room=claimed_room, most_bytes=most_bytes,
    )  # fmt: skip


def cold_bytes_within(
    available: int,
    room: int,
    directory: Path,
    *,
    share: float,
    claimed_bytes: int = 0,
    claimed_room: int = 0,
    most_bytes: int = MOST_BYTES,
) -> int:
    """Bytes of cold memory where ``available`` bytes of memory and ``room`` bytes of the file system are free.

    Args:
        share: of the available memory.
        claimed_bytes, claimed_room: of both, what others will take yet, such as weights and Ray's object store.
        most_bytes: more would not be used.

    Raises :class:`MemorySizeError` if less than ``LEAST_BYTES`` is left. It names the sizes that would do.
    """
    of_room = int(ROOM_SHARE * (room - claimed_room))
    if of_room < LEAST_BYTES:
        needed = claimed_room + math.ceil(LEAST_BYTES / ROOM_SHARE)
        raise MemorySizeError(
            f"{directory} has {room} bytes free, too little for cold memory: at least {needed} bytes are needed. "
            f"Enlarge it (docker run --shm-size={math.ceil(needed / 2**20)}m or more, or a memory-backed emptyDir "
            "with a larger sizeLimit), or name another memory-backed --arena-dir."
        )
    of_memory = int(share * (available - claimed_bytes))
    if of_memory < LEAST_BYTES:
        needed = claimed_bytes + math.ceil(LEAST_BYTES / share)
        raise MemorySizeError(
            f"{available} bytes of memory are available, too little for cold memory: at least {needed} bytes are "
            f"needed, of which models and server take {claimed_bytes}. Free memory, raise the container's limit, or "
            "serve a smaller model."
        )
    return max(min(of_room, of_memory, most_bytes, MOST_BYTES), LEAST_BYTES)
