"""Where the past of prompt tokens is, and how the part outside the hot pool is read: a layer at a time, in pieces.

The attention kernel reads full chunks in the hot pool by their slots. On a GPU the next piece of the others is gathered
on a side stream while the present one is attended to; what lies in the arena comes over PCIe, read where it is by the
gathering kernel, and is verified by its checksum once all layers have been read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forecache.kernels.attention import ops
from forecache.workers.core.sequence import Chunk, TokenSequence
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.dense.remote_past import RemoteChunks, RemotePast, RemoteReads
from forecache.workers.models.step.cold_reads import ColdReads

PIECE_CHUNKS = 256
"""Chunks gathered at once on a CPU."""
CUDA_PIECE_TOKENS = 65536
"""Tokens gathered at once on a GPU. Fewer would merge partial results too often; also, cuDNN prepares itself anew for
every number of keys, so that pieces only have powers of two."""


@dataclass(frozen=True)
class Store:
    """Chunks of one memory. ``kv``: [slots, layers, 2, kv_heads, chunk_tokens, head_dim] of the pool or the arena;
    ``scale``: float32 [slots, layers, 2, kv_heads] where ``kv`` is fp8."""

    kv: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """Full chunks outside the hot pool. ``slots``, ``chunks`` (their numbers): int64 [n]. ``sums``: int64 [n] on the
    GPU, to which reading adds each chunk's checksum, or ``None``. ``remote``: the chunks lie on other nodes, and
    ``slots`` and ``store`` say nothing of them."""

    store: Store
    slots: Tensor
    chunks: Tensor
    sums: Tensor | None = None
    remote: RemoteChunks | None = None


@dataclass(frozen=True)
class StreamedPast:
    """The full chunks before a stream's tokens: ``hot``, chunk number → slot in the pool, and the others in
    ``segments``, of which the arena's are also in ``cold``."""

    hot: dict[int, int]
    segments: tuple[Segment, ...]
    cold: ColdReads

    @classmethod
    def of(
        cls,
        seq: TokenSequence,
        pool: HotPool,
        arena: Arena | None,
        hot: Store,
        cold: Store | None,
        device: torch.device,
        remote: RemotePast | None = None,
    ) -> "StreamedPast":
        """Find where the past of ``seq`` is now; ``remote`` reads chunks of other nodes."""
        hot_slots: dict[int, int] = {}
        in_arena: list[Chunk] = []
        on_others: list[Chunk] = []
        for chunk in seq.chunks:
            slot = seq.hot_slot(chunk.number, pool)
            if slot is not None:
                hot_slots[chunk.number] = slot
            else:
                assert chunk.ref is not None, f"chunk {chunk.number} of {seq.request_id} is neither hot nor cold"
                (on_others if chunk.ref.remote else in_arena).append(chunk)
        segments = []
        sums = None
        if in_arena:
            assert cold is not None and arena is not None, "chunks are cold but there is no arena"
            places = [(chunk.ref.slot, chunk.number) for chunk in in_arena if chunk.ref is not None]
            if device.type == "cuda":
                sums = torch.zeros(len(places), dtype=torch.int64, device=device)
            segments.append(Segment(cold, *_columns(places, device), sums))
        if on_others:
            assert remote is not None, "chunks are on other nodes, and nothing reads them"
            places = [(-1, chunk.number) for chunk in on_others]
            there = remote.chunks(seq, tuple(chunk.key for chunk in on_others))
            segments.append(Segment(hot, *_columns(places, device), remote=there))
        return cls(hot_slots, tuple(segments), ColdReads.of(seq.request_id, in_arena, sums))


def _columns(entries: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(entries, dtype=torch.int64).T.contiguous().to(device, non_blocking=True).unbind(0)
    return first, second


@dataclass(frozen=True)
class _Piece:
    segment: Segment
    part: slice

    @property
    def chunks(self) -> Tensor:
        return self.segment.chunks[self.part]

    def gather(self, layer: int, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        segment = self.segment
        sums = None if segment.sums is None else segment.sums[self.part]
        return ops.gather_layer(
            segment.store.kv,
            layer,
            segment.slots[self.part],
            scale=segment.store.scale,
            out=out,
            sums=sums,
            dtype=dtype,
        )


class PieceBuffers:
    """Two buffers on a GPU and the stream that fills them: made once, used by one step at a time."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (2, kv_heads, -1, head_dim)
        self.dtype = dtype
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._flat = [
            torch.empty(2 * kv_heads * CUDA_PIECE_TOKENS * head_dim, dtype=dtype, device=device) for _ in range(2)
        ]
        self.filled = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self.read = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def view(self, index: int, tokens: int) -> Tensor:
        """[2, kv_heads, tokens, head_dim] at the start of buffer ``index``."""
        _, kv_heads, _, head_dim = self.shape
        return self._flat[index][: 2 * kv_heads * tokens * head_dim].view(2, kv_heads, tokens, head_dim)


class PastReader:
    """The pasts of one step's streams, read in the order of layers and, within a layer, of streams."""

    def __init__(
        self, pasts: Sequence[Sequence[Segment]], layers: int, dtype: torch.dtype, buffers: PieceBuffers | None
    ) -> None:
        self._dtype = dtype
        self._buffers = buffers
        self._pasts = [[piece for segment in past for piece in _pieces(segment, buffers)] for past in pasts]
        self._order = iter([(layer, piece) for layer in range(layers) for past in self._pasts for piece in past])
        remote = [
            (piece.segment.remote, piece.part, layer)
            for layer in range(layers)
            for past in self._pasts
            for piece in past
            if piece.segment.remote is not None
        ]
        self._remote = RemoteReads(remote)
        self._next_buffer = 0
        self._ahead: tuple[int, Tensor, Tensor] | None = None
        if buffers is not None:
            # chunks that earlier steps completed are read from the pool
            buffers.stream.wait_stream(torch.cuda.current_stream(buffers.stream.device))
            self._ahead = self._issue(buffers)

    def read(self, stream: int, layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(chunk numbers, k, v) of the past of ``stream``: int64 [n], [kv_heads, n * chunk_tokens, head_dim] each.

        A piece must be done with, in the current stream's order, when the next one is asked for.
        """
        for piece in self._pasts[stream]:
            if self._buffers is None:
                yield piece.chunks, *self._gather(piece, layer)
            else:
                yield from self._take(piece, self._buffers)

    def abandon(self) -> None:
        """The step is not computed to its end: order the piece that is gathered ahead before what comes next, which may
        reuse the memory of its slots."""
        if self._buffers is not None:
            torch.cuda.current_stream(self._buffers.stream.device).wait_stream(self._buffers.stream)

    def _gather(self, piece: _Piece, layer: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if piece.segment.remote is not None:
            return self._remote.take(self._dtype, out, piece.chunks.device)
        return piece.gather(layer, self._dtype, out)

    def _take(self, piece: _Piece, buffers: PieceBuffers) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        assert self._ahead is not None, "more pieces are read than there are"
        index, k, v = self._ahead
        self._ahead = self._issue(buffers)
        current = torch.cuda.current_stream(k.device)
        current.wait_event(buffers.filled[index])
        yield piece.chunks, k, v
        buffers.read[index].record(current)

    def _issue(self, buffers: PieceBuffers) -> tuple[int, Tensor, Tensor] | None:
        """Start to gather the next piece of all, into the buffer that is free next."""
        following = next(self._order, None)
        if following is None:
            return None
        layer, piece = following
        index, self._next_buffer = self._next_buffer, 1 - self._next_buffer
        tokens = len(piece.chunks) * piece.segment.store.kv.shape[4]
        with torch.cuda.stream(buffers.stream):
            buffers.stream.wait_event(buffers.read[index])
            k, v = self._gather(piece, layer, buffers.view(index, tokens))
            buffers.filled[index].record(buffers.stream)
        return index, k, v


def _pieces(segment: Segment, buffers: PieceBuffers | None) -> Iterator[_Piece]:
    """``segment`` cut up: evenly on a CPU; on a GPU into the largest piece and then powers of two."""
    chunks, start = len(segment.slots), 0
    largest = PIECE_CHUNKS if buffers is None else CUDA_PIECE_TOKENS // segment.store.kv.shape[4]
    while start < chunks:
        left = chunks - start
        size = min(largest, left if buffers is None else 1 << (left.bit_length() - 1))
        yield _Piece(segment, slice(start, start + size))
        start += size
