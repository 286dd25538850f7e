"""A file with one living owner, and the processes that have it open.

The owner has a lock on the file, which the kernel releases when it dies. Every other process shows that it lives by a
lock on one byte, far behind the end of the file.
"""

import fcntl
import os
import secrets
import struct
from collections.abc import Set
from pathlib import Path

from forecache.workers.errors import ArenaError, ArenaMissingError


def create_owned(path: Path) -> int:
    """Create an empty file and own it; returns its descriptor. Raises :class:`ArenaError` when it can't be made or the
    name is taken."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ArenaError(f"can't create the arena {path} ({error.strerror}): see --arena-dir") from error
        # remove_abandoned of another process may have deleted it before the lock: then the name is free again.
        if own(fd, path):
            return fd
        os.close(fd)


def open_existing(path: Path) -> int:
    """Open without owning it. Raises :class:`ArenaMissingError` when there is none."""
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise ArenaMissingError(f"can't open the arena {path} ({error.strerror}): is its tier running?") from error


def own(fd: int, path: Path) -> bool:
    """Try to own the open file ``fd``. Returns whether it did, and the file still lies at ``path``."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def disown(fd: int) -> None:
    """Release the owner's lock. Closing ``fd`` is not enough while a mapping has a duplicate of it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


# struct flock of 64-bit Linux: type, whence, start, length, pid
_LOCK = "hhqqi4x"
_BYTES_START = 1 << 62
_LARGEST_NUMBER = 1 << 61


def lock_own_byte(fd: int, path: Path, *, first: int) -> int:
    """Lock a random byte of the file for the open file ``fd``; returns its number, ``first`` at least.

    No other open file has the same number. The lock lasts as long as ``fd`` or a duplicate of it (a mapping has one) is
    open anywhere, so it also shows whether a process in another container lives. Raises :class:`ArenaError` where the
    file system has no such locks.
    """
    while True:
        number = secrets.randbelow(_LARGEST_NUMBER - first) + first
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, _BYTES_START + number, 1))
        except BlockingIOError:
            continue  # another process has this number
        except OSError as error:
            raise ArenaError(
                f"can't lock a byte of {path} ({error.strerror}): the file system of --arena-dir needs open file "
                "description locks, like /dev/shm"
            ) from error
        return number


def locked_bytes(fd: int) -> Set[int]:
    """Numbers of all bytes that other open files have locked with :func:`lock_own_byte`."""
    found, ranges = set(), [(_BYTES_START, _BYTES_START + _LARGEST_NUMBER)]
    while ranges:
        start, end = ranges.pop()
        byte = _first_locked(fd, start, end - start) if start < end else None
        if byte is not None:
            found.add(byte - _BYTES_START)
            ranges += [(start, byte), (byte + 1, end)]
    return found


def is_byte_locked(fd: int, number: int) -> bool:
    """Whether another open file has locked byte ``number``."""
    return _first_locked(fd, _BYTES_START + number, 1) is not None


def _first_locked(fd: int, start: int, length: int) -> int | None:
    """The first byte of one of the locks in this range."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, start, length))
    kind, _, byte, _, _ = struct.unpack(_LOCK, answer)
    return None if kind == fcntl.F_UNLCK else max(int(byte), start)


def _lock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_LOCK, kind, os.SEEK_SET, start, length, 0)
