"""Runs the cluster in its own session, which signals to the terminal's process group do not reach."""

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
    """Run ``serve`` in a child process with its own session; returns its exit status. Call it before any thread starts.

    Ctrl-C, ``timeout`` and service managers signal every process of a group, so Ray's processes would end before we
    stop them in order. Only this process stays in the group; it forwards SIGINT and SIGTERM to the child. If this
    process is killed, the kernel sends the child SIGTERM. The child leaves no process behind.
    """
    parent = os.getpid()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the handlers are installed
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
    except BaseException:  # noqa: BLE001 - this process ends here, so no caller could print it
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        end_children(_GRACE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        # not sys.exit: the exit handlers that fork copied belong to the parent
        os._exit(status)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_children(grace_s: float) -> None:
    """Wait ``grace_s`` for every child of this process, adopted ones too, then kill the rest."""
    deadline = time.monotonic() + grace_s
    while children := _children():
        for child in children:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)


def _children() -> list[int]:
    """Process ids of the children of all threads, including zombies."""
    lists = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for text in lists for pid in text.split()]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
