"""A process of its own for the cluster, out of reach of signals that are meant for a whole process group."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0


def run_in_own_session(serve: Callable[[], int]) -> int:
    """Run ``serve`` in a child in a session of its own; returns its exit status. Call before any thread exists.

    Ctrl-C, ``timeout`` and service managers signal every process of a group: Ray's would end before their owner could
    stop them in order. Here only this process is in that group; it hands SIGINT and SIGTERM on. When it is
    killed, the child gets SIGTERM from the kernel. When the child is done, nothing it started is left.
    """
    parent = os.getpid()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may come before there is somebody to take it
    child = os.fork()
    if child == 0:
        _serve_and_exit(serve, parent, signals)

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGTERM)

    for number in signals:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    _, status = os.waitpid(child, 0)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    return os.waitstatus_to_exitcode(status)


def _serve_and_exit(serve: Callable[[], int], parent: int, signals: set[signal.Signals]) -> None:
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    status = 1
    try:
        if os.getppid() == parent:
            signal.signal(signal.SIGTERM, _end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            status = serve()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - nobody above could print it: this process ends here
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        end_children(_GRACE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        # not sys.exit: the caller's stack and exit handlers are the parent's
        os._exit(status)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_children(grace_s: float) -> None:
    """Wait ``grace_s`` for every child of this process, adopted ones too, then kill those that are left."""
    deadline = time.monotonic() + grace_s
    while children := _children():
        for child in children:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)


def _children() -> list[int]:
    """Process ids of the children, zombies included, whichever thread started them."""
    lists = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for text in lists for pid in text.split()]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
