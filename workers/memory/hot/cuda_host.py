"""Host memory that the GPU may read and write directly."""

from types import TracebackType
from typing import Any, Self

import torch

from forecache.workers.errors import ArenaError

PORTABLE = 1
"""cudaHostRegisterPortable: for every CUDA context of this process."""


class RegisteredMemory:
    """Page-locks ``tensor`` (contiguous, on CPU) for CUDA until :meth:`close`.

    Copies from it then run at link speed and asynchronously, and kernels may read it in place. Raises
    :class:`ArenaError` when the driver refuses, usually because the process may not lock that much memory, or because
    the memory is a file on a disk.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = tensor.data_ptr()
        nbytes = tensor.numel() * tensor.element_size()
        status = _cudart().cudaHostRegister(self._address, nbytes, PORTABLE)
        if int(status) != 0:
            raise ArenaError(
                f"CUDA can't register {nbytes} bytes of the arena (error {int(status)}). Let --arena-dir be in shared "
                "memory like /dev/shm, raise the locked-memory limit (ulimit -l unlimited) or lower --cold-bytes."
            )

    def close(self) -> None:
        """Unregister the pages. No copy may be running."""
        if self._address:
            torch.cuda.synchronize()
            _cudart().cudaHostUnregister(self._address)
            self._address = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
