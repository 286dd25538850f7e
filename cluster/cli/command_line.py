"""The command line: the parser, the types of arguments, and passwords hidden from other processes."""

import argparse
import ctypes
import math
import os
import re
from pathlib import Path
from typing import NoReturn

_PASSWORD = re.compile(rb"(?<=://)[^\0]*(?=@)")
_ARG_START, _ARG_END = 45, 46  # fields 48 and 49 of /proc/PID/stat, counted from the first one after the name


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage, which ``--help`` prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`\n")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def ratio(text: str) -> float:
    """A number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], not {value}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text}")
    return value


def output_file(text: str) -> Path:
    """A file to write; its directory must exist."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory, not a file to write")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{path} can't be written: {path.parent} is not a directory that you may write to"
        )
    return path


def output_folder(text: str) -> Path:
    """A directory to write to, which exists or can be created."""
    path = Path(text)
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{path} can't be written to: {above} is not a directory that you may write to"
        )
    return path


def hide_passwords() -> None:
    """Overwrite the users and passwords of URLs in this process' command line with stars.

    `ps` shows the command line to every user of the machine, and Ray stores it as the entrypoint of its job. Python
    keeps its own copy, which does not change.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    shown = ctypes.string_at(start, end - start)
    hidden = _PASSWORD.sub(lambda found: b"*" * len(found[0]), shown)
    if hidden != shown:
        ctypes.memmove(start, hidden, len(hidden))
