"""A child process that parses request bodies, so that the ingress' event loop and GIL stay free.

The two processes are connected by a pair of sockets. The ingress sends one job at a time, as a frame with the job and
the body, and the child answers with a frame. The child ends when its socket is closed. The kernel kills it when the
parent's thread that started it ends (``PR_SET_PDEATHSIG``), even while it parses a body.
"""

import ctypes
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

from forecache.cluster.errors import PromptProcessError
from forecache.cluster.http.request_reader import Outcome, ReadJob, RequestReader
from forecache.workers.errors import ForecacheError

logger = logging.getLogger(__name__)

JOB_DEADLINE_S = 120.0
"""Longest time for one body, the start of the process included. The largest accepted body takes a fraction of it."""

_PROGRAM = "from forecache.cluster.http.prompt_process import main; main()"
"""Not ``python -m``: its module is named ``__main__``, and pickle needs the same class names in both processes."""
_PR_SET_PDEATHSIG = 1
_LENGTHS = struct.Struct("<QQ")


@dataclass(frozen=True)
class Failed:
    """The job failed with an unexpected error, which is not the client's fault; ``reason`` is the error's type."""

    reason: str


class PromptProcess:
    """The parent's side: starts the child with the first job, or with :meth:`start`, and again after it died.

    All methods but :meth:`close` must be called from one thread. The child ends with that thread.
    """

    def __init__(self, reader: RequestReader) -> None:
        self._reader = pickle.dumps(reader)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process unless it runs. Does not wait until it is ready."""
        if self._process is not None and self._process.poll() is not None:
            logger.warning("the idle process that reads large requests ended (%d)", self._process.returncode)
            self._end()
        if self._process is not None or self._closed:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(JOB_DEADLINE_S)
        self._socket = ours
        send_frame(ours, self._reader, b"")

    def outcome(self, job: ReadJob, body: bytes | bytearray) -> Outcome:
        """:meth:`.RequestReader.outcome` in the child. Blocks, with the GIL released.

        Raises:
            PromptProcessError: the process died, or took longer than ``JOB_DEADLINE_S``.
            ForecacheError: the process met an unexpected error.
        """
        head = pickle.dumps(job)
        try:
            _, answer = receive_frame(self._send(head, body))
        except (OSError, EOFError) as error:
            self._end()
            raise PromptProcessError(
                f"the process that reads large requests ended or took longer than {JOB_DEADLINE_S:g} s; "
                "send the request again, and if that fails too, a smaller one"
            ) from error
        outcome: Outcome | Failed = pickle.loads(answer)
        if isinstance(outcome, Failed):
            raise ForecacheError(f"the request could not be read: {outcome.reason}; the server's log has the details")
        return outcome

    def _send(self, head: bytes, body: bytes | bytearray) -> socket.socket:
        """Send a job; returns the socket that its answer will arrive at.

        If the process ended before it received the whole job, a new one is started, once.
        """
        try:
            self.start()
            send_frame(self._connection(), head, body)
        except (BrokenPipeError, ConnectionResetError):
            self._end()
            self.start()
            send_frame(self._connection(), head, body)
        return self._connection()

    def _connection(self) -> socket.socket:
        connection = self._socket
        if connection is None:
            raise PromptProcessError("the server is being stopped; send the request again")
        return connection

    def close(self) -> None:
        """Kill the process, even while it parses. Any thread may call."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._socket = self._socket, None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()


def send_frame(connection: socket.socket, head: bytes, body: bytes | bytearray) -> None:
    connection.sendall(_LENGTHS.pack(len(head), len(body)) + head)
    if body:
        connection.sendall(body)


def receive_frame(connection: socket.socket) -> tuple[bytes, bytes]:
    """Receive a head and a body. Raises ``EOFError`` if the other process closed its socket."""
    head, body = _LENGTHS.unpack(_receive(connection, _LENGTHS.size))
    return _receive(connection, head), _receive(connection, body)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return bytes(data)


def serve(connection: socket.socket) -> None:
    """Answer jobs until the parent closes its socket. Runs in the child."""
    try:
        head, _ = receive_frame(connection)
        reader: RequestReader = pickle.loads(head)
        while True:
            head, body = receive_frame(connection)
            job: ReadJob = pickle.loads(head)
            answer: Outcome | Failed
            try:
                answer = reader.outcome(job, body)
            except Exception as error:  # any error ends this job only, not the process
                logger.exception("a request could not be read")
                answer = Failed(type(error).__name__)
            send_frame(connection, b"", pickle.dumps(answer))
            del body, answer
    except (EOFError, OSError):
        return


def main() -> None:
    """Entry point of the child; its arguments are the socket's file descriptor and the parent's process id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and this process ends with it
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return  # the parent ended before the call of prctl
    serve(socket.socket(fileno=int(sys.argv[1])))
