"""What other processes see of this one's command line."""

import ctypes
import re
from pathlib import Path

_PASSWORD = re.compile(rb"(?<=://)[^\0]*(?=@)")
_ARG_START, _ARG_END = 45, 46  # fields 48 and 49 of /proc/PID/stat, counted behind the name


def hide_passwords() -> None:
    """Cover the users and passwords of URLs in the command line with stars.

    `ps` shows it to every user of the machine, and Ray keeps it as the entrypoint of its job. Python has its own copy.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    shown = ctypes.string_at(start, end - start)
    hidden = _PASSWORD.sub(lambda found: b"*" * len(found[0]), shown)
    if hidden != shown:
        ctypes.memmove(start, hidden, len(hidden))
