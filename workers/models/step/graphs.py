"""Steps of fixed shapes as CUDA graphs: one launch a step instead of some hundreds.

What every architecture shares: which batch sizes or token counts are captured, the capture, and the host memory that
inputs come from.
Decisions stay outside a graph: it reads its inputs from buffers that are filled before each replay, and leaves what it
computes in buffers that stand until the next replay.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WARM_UPS = 2
"""Eager runs before a capture: lazy initialisation (cuBLAS handles, Triton compilation) must be over by then."""

Output = TypeVar("Output")


def token_buckets(max_tokens: int) -> list[int]:
    """Token counts to capture: 128 to 1024 with one size between two powers of two, every 512 to 4096, then every
    1024, up to ``max_tokens``."""
    sizes = [128, 192, 256, 384, 512, 768, *range(1024, 4096, 512), *range(4096, max_tokens, 1024)]
    return [*(size for size in sizes if size < max_tokens), max_tokens]


def batch_buckets(max_batch_size: int) -> list[int]:
    """Batch sizes to capture: 2, 4, every 8 to 64, every 16 to 128, then every 32, up to the first that is at least
    ``max_batch_size``."""
    sizes = [2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch_size + 32, 32)]
    return [size for size, before in zip(sizes, [0, *sizes], strict=False) if before < max_batch_size]


@dataclass(frozen=True)
class CapturedGraph(Generic[Output]):
    """``output``: the buffers that a replay of ``graph`` fills."""

    graph: torch.cuda.CUDAGraph
    output: Output


class HostInputs:
    """Host memory for one step's inputs, page-locked on request; fill it through numpy.

    ``inputs``: int64 [fields, rows]; ``tables``: int32 [table rows, width], one for each of ``widths``.
    """

    def __init__(self, fields: int, rows: int, table_rows: int, widths: Sequence[int], *, pinned: bool) -> None:
        self.inputs = torch.zeros(fields, rows, dtype=torch.int64, pin_memory=pinned)
        self.tables = [torch.zeros(table_rows, width, dtype=torch.int32, pin_memory=pinned) for width in widths]


class StepGraphs(ABC, Generic[Output]):
    """Steps of ``buckets`` rows, ascending: on CUDA as graphs, elsewhere eagerly over the same fixed shapes.

    ``inputs``: int64 [fields, largest bucket], and ``tables``: int32 [table rows, width], on the device. ``table_rows``
    is the largest bucket where it is not given.
    """

    capture_error_mode: ClassVar[Literal["global", "thread_local"]] = "global"
    """Which CUDA calls of other threads break a capture; see ``torch.cuda.graph``."""

    def __init__(
        self,
        buckets: Sequence[int],
        fields: int,
        widths: Sequence[int],
        device: torch.device,
        *,
        table_rows: int | None = None,
    ) -> None:
        self._buckets = buckets
        rows = buckets[-1] if table_rows is None else table_rows
        self._device = device
        self._captures = device.type == "cuda"
        # two host copies in turn: while one is on its way to the device, the next step fills the other
        self._host = [HostInputs(fields, buckets[-1], rows, widths, pinned=self._captures) for _ in range(2)]
        self._turn = 0
        self._inputs = torch.zeros(fields, buckets[-1], dtype=torch.int64, device=device)
        self._tables = [torch.zeros(rows, width, dtype=torch.int32, device=device) for width in widths]
        self._graphs: dict[int, CapturedGraph[Output]] = {}

    @abstractmethod
    def _forward(self, bucket: int) -> Output:
        """Compute a step over the first ``bucket`` rows of the inputs, without any decision that depends on them."""

    def _bucket(self, count: int) -> int:
        """The smallest bucket for ``count`` rows."""
        return next(size for size in self._buckets if size >= count)

    def _next_host(self) -> HostInputs:
        host, self._turn = self._host[self._turn], 1 - self._turn
        return host

    def _run(self, bucket: int) -> Output:
        """Enqueue the step of ``bucket`` rows, captured before where there are graphs."""
        if not self._captures:
            return self._forward(bucket)
        captured = self._graphs[bucket]
        captured.graph.replay()
        return captured.output

    def _capture(self, bucket: int) -> None:
        """Capture the step of ``bucket`` rows. Start with the largest: the others then fit the memory that it took."""
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(bucket)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        memory = next((other.graph.pool() for other in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode=self.capture_error_mode):
            output = self._forward(bucket)
        self._graphs[bucket] = CapturedGraph(graph, output)


class OutputBuffers:
    """Device memory that all graphs leave their outputs in. Else every graph would keep outputs of its own."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def keep(self, name: object, output: Tensor) -> Tensor:
        """Copy ``output`` into the first rows of the buffer ``name``, and return these.

        The largest output comes first where graphs are captured: a captured buffer can't be replaced by a larger one.
        """
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(output):
            buffer = self._buffers[name] = torch.empty_like(output)
        return buffer[: len(output)].copy_(output)

    def keep_all(self, name: str, outputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """:meth:`keep` the outputs of several layers."""
        return {layer: self.keep((name, layer), output) for layer, output in outputs.items()}


class BlockTables:
    """A table of chunk slots on the device, int32 [rows, width], whose rows are copied only when they have changed."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self._versions: list[object] = [None] * len(table)

    def update(self, host: Tensor, rows: Sequence[tuple[object, npt.NDArray[np.int32]]]) -> None:
        """Enqueue the copies that make row *i* the slots of ``rows[i]``, each with a version that changes with its
        slots. ``host``: int32 [rows, width], page-locked, unchanged until the copies are done."""
        for index, (version, slots) in enumerate(rows):
            if self._versions[index] != version:
                self._versions[index] = version
                host.numpy()[index, : len(slots)] = slots
                self.table[index, : len(slots)].copy_(host[index, : len(slots)], non_blocking=True)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def input_tokens(tokens: Tensor, source: Tensor, last_tokens: Tensor) -> Tensor:
    """The tokens of a step's rows: ``tokens``, or where ``source`` is not -1 the one that row of the step before drew.

    All int64; the host need not know a token that is taken from ``last_tokens``.
    """
    return torch.where(source < 0, tokens, last_tokens[source.clamp(min=0)])
