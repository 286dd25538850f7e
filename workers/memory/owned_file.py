"""A file that one living process owns: by its lock, which the kernel lets go when the process dies."""

import fcntl
import os
from pathlib import Path

from forecache.workers.errors import ArenaError, ArenaMissingError


def create_owned(path: Path) -> int:
    """A new, empty file of ours, open. Raises :class:`ArenaError` when it can't be made or the name is taken."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ArenaError(f"can't create the arena {path} ({error.strerror}): see --arena-dir") from error
        # Someone's remove_abandoned may have come before the lock: then the name is free again.
        if own(fd, path):
            return fd
        os.close(fd)


def open_existing(path: Path) -> int:
    """Open, and not owned. Raises :class:`ArenaError` when there is none."""
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise ArenaMissingError(f"can't open the arena {path} ({error.strerror}): is its tier running?") from error


def own(fd: int, path: Path) -> bool:
    """Whether the open file ``fd`` could be made ours, and is still what lies at ``path``."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def disown(fd: int) -> None:
    """Let go of the lock; to close ``fd`` would not do while a mapping has a duplicate of it."""
    fcntl.flock(fd, fcntl.LOCK_UN)
