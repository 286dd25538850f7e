"""A process that reads request bodies for an ingress, whose event loop and interpreter lock stay free meanwhile.

It is a child of the ingress' process and talks to it through a pair of sockets: one job at a time, each a frame with
its settings and its body, each answered by a frame. It ends when the other end of its socket is closed, and the kernel
ends it with the parent's thread that started it, also while it reads a body.
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
from forecache.cluster.http.request_reader import Outcome, RequestReader, Wanted
from forecache.workers.errors import ForecacheError

logger = logging.getLogger(__name__)

JOB_DEADLINE_S = 120.0
"""Longest time for one body, with the start of the process. The largest that is let in takes a fraction of it."""

_PROGRAM = "from forecache.cluster.http.prompt_process import main; main()"
"""Not `-m`: what this module's classes are called must be the same at both ends."""
_PR_SET_PDEATHSIG = 1
_LENGTHS = struct.Struct("<QQ")


@dataclass(frozen=True)
class ReadJob:
    """What is to be made of a body; see :meth:`.RequestReader.read`."""

    wanted: Wanted
    served: str | None


@dataclass(frozen=True)
class Failed:
    """The job met an error that is none of the client's; ``reason`` names it."""

    reason: str


class PromptProcess:
    """The parent's end. All methods but :meth:`close` belong to one thread, which the process ends with; it starts with
    its first job, or with :meth:`start`, and anew after it has died."""

    def __init__(self, reader: RequestReader) -> None:
        self._reader = pickle.dumps(reader)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin to start the process, if none lives; does not wait until it is up."""
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

    def run(self, job: ReadJob, body: bytes | bytearray) -> Outcome:
        """What the process makes of ``body``. Blocks, without the interpreter's lock.

        Raises:
            PromptProcessError: it died, or took too long.
            ForecacheError: it met an error that is none of the client's.
        """
        head = pickle.dumps(job)
        try:
            _, answer = receive_frame(self._sent(head, body))
        except (OSError, EOFError) as error:
            self._end()
            raise PromptProcessError(
                f"the process that reads large requests ended or took longer than {JOB_DEADLINE_S:g} s; "
                "send the request again, and if that fails too, a smaller one"
            ) from error
        said: Outcome | Failed = pickle.loads(answer)
        if isinstance(said, Failed):
            raise ForecacheError(f"the request could not be read: {said.reason}; the server's log has the details")
        return said

    def _sent(self, head: bytes, body: bytes | bytearray) -> socket.socket:
        """Where the answer to a job will come. A process that ended before it had the whole job is replaced once."""
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
        """End the process, whatever it does. Any thread may call."""
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
    """The head and the body that the other end sent. Raises ``EOFError`` when it is closed."""
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
    """Answer jobs until the other end is closed."""
    try:
        head, _ = receive_frame(connection)
        reader: RequestReader = pickle.loads(head)
        while True:
            head, body = receive_frame(connection)
            job: ReadJob = pickle.loads(head)
            answer: Outcome | Failed
            try:
                answer = reader.outcome(job.wanted, body, job.served)
            except Exception as error:  # whatever it is ends this job, not the process
                logger.exception("a request could not be read")
                answer = Failed(type(error).__name__)
            send_frame(connection, b"", pickle.dumps(answer))
            del body, answer
    except (EOFError, OSError):
        return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return  # it ended before
    serve(socket.socket(fileno=int(sys.argv[1])))
