"""The state of DeepSeek-V4 sequences outside chunks: sliding windows, inputs of the compressors, and all HCA entries.

It lives on the device, one line per sequence, and the layers write it directly. Rings are indexed by position, so a
repeated decode step writes the same values. At the end of a chunk, the state without the HCA entries, which are in the
chunks too, is a *snapshot*: from it and the chunks before it a sequence can be continued exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forecache.workers.core.sequence import TokenSequence
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape

PAGE_ENTRIES = 32
"""HCA entries of one page."""
FIRST_PAGES = 16


@dataclass
class Line:
    """The place of a sequence's state: its line ``number``, and the ``pages`` of its HCA entries in order."""

    number: int
    pages: list[int]


class SequenceStates:
    """States of at most ``sequences`` sequences at a time.

    ``window``: [lines, layers, window, head_dim]; ``csa`` and ``index``: [lines, CSA layers, 2 * csa_rate, 4 * dim],
    (kv, gate) of the last tokens as the compressor and its Lightning Indexer project them; ``hca``: [lines, HCA layers,
    hca_rate, 2 * head_dim], alike; all rings: position p is in place p % length. ``pages``: [pages, HCA layers,
    PAGE_ENTRIES, head_dim].
    """

    def __init__(self, shape: DeepseekV4Shape, sequences: int, dtype: torch.dtype, device: torch.device) -> None:
        csa, hca, dim = len(shape.csa), len(shape.hca), shape.head_dim

        def zeros(*size: int) -> Tensor:
            return torch.zeros(sequences, *size, dtype=dtype, device=device)

        self.shape = shape
        self.window = zeros(len(shape.kinds), shape.window, dim)
        self.csa = zeros(csa, 2 * shape.csa_rate, 4 * dim)
        self.index = zeros(csa, 2 * shape.csa_rate, 4 * shape.index_dim)
        self.hca = zeros(hca, shape.hca_rate, 2 * dim)
        self.pages = torch.zeros(FIRST_PAGES, hca, PAGE_ENTRIES, dim, dtype=dtype, device=device)
        self._lines: dict[str, Line] = {}
        self._free = list(range(sequences - 1, -1, -1))
        self._free_pages = list(range(FIRST_PAGES - 1, -1, -1))

    def line(self, seq: TokenSequence, stop: int) -> Line:
        """The line of ``seq``, whose tokens before ``stop`` are about to be computed. A sequence that is not known yet
        starts from nothing."""
        line = self._lines.get(seq.request_id)
        if line is None:
            assert seq.num_computed == 0, f"{seq.request_id} goes on at {seq.num_computed} without a state"
            line = self._lines[seq.request_id] = Line(self._free.pop(), [])
        if self.shape.hca:
            needed = -(-(stop // self.shape.hca_rate) // PAGE_ENTRIES)
            while len(line.pages) < needed:
                line.pages.append(self._page())
        return line

    def _page(self) -> int:
        if not self._free_pages:
            have = len(self.pages)
            self.pages = torch.cat([self.pages, torch.zeros_like(self.pages)])
            self._free_pages = list(range(2 * have - 1, have - 1, -1))
        return self._free_pages.pop()

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` has left, or starts over; one of its steps may still run."""
        line = self._lines.pop(seq.request_id, None)
        if line is not None:
            # safe while a step runs: the next owner writes to them in a later step
            self._free.append(line.number)
            self._free_pages += line.pages

    def wipe(self, seq: TokenSequence) -> None:
        """Zero the state of ``seq``."""
        line = self._lines.get(seq.request_id)
        if line is not None:
            for ring in (self.window, self.csa, self.index, self.hca):
                ring[line.number].zero_()
            for page in line.pages:
                self.pages[page].zero_()

    def rings(self) -> list[tuple[Tensor, int]]:
        """The rings that a snapshot contains, each with its number of last positions."""
        return [(self.window, self.shape.window), (self.csa, self.shape.csa_rate), (self.index, self.shape.csa_rate)]

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a snapshot."""
        return sum(ring[0, :, 0].nbytes * last for ring, last in self.rings())

    def snapshot(self, line: Line, stop: int) -> Tensor:
        """The state after position ``stop - 1``, the last computed one, which ends a chunk: uint8 [n]."""
        parts = []
        for ring, last in self.rings():
            places = torch.arange(stop - last, stop, device=ring.device) % ring.shape[2]
            parts.append(ring[line.number].index_select(1, places))
        return pack(parts)

    def restore(self, seq: TokenSequence, stop: int, snapshot: Tensor, hca: Tensor | None) -> None:
        """Let ``seq`` continue at ``stop``.

        ``snapshot``: uint8 [at least n], from :meth:`snapshot`. ``hca``: [HCA layers, entries before ``stop``,
        head_dim].
        """
        assert seq.request_id not in self._lines, f"{seq.request_id} has a state already"
        line = self._lines[seq.request_id] = Line(self._free.pop(), [])
        start = 0
        for ring, last in self.rings():
            own = ring[line.number]
            part = torch.empty(own.shape[0], last, own.shape[2], dtype=own.dtype, device=own.device)
            end = start + part.nbytes
            part.copy_(snapshot[start:end].view(own.dtype).view(part.shape))
            own[:, torch.arange(stop - last, stop, device=own.device) % own.shape[1]] = part
            start = end
        if hca is not None:
            entries = hca.shape[1]
            while len(line.pages) * PAGE_ENTRIES < entries:
                line.pages.append(self._page())
            for number, page in enumerate(line.pages):
                piece = hca[:, number * PAGE_ENTRIES : (number + 1) * PAGE_ENTRIES]
                self.pages[page, :, : piece.shape[1]] = piece.to(self.pages.device)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a line or a page is lost, or belongs to two sequences."""
        lines = sorted([*self._free, *(line.number for line in self._lines.values())])
        assert lines == list(range(len(self.window))), f"lines {lines} of {len(self.window)}"
        pages = sorted([*self._free_pages, *(page for line in self._lines.values() for page in line.pages)])
        assert pages == list(range(len(self.pages))), f"pages {pages} of {len(self.pages)}"


def pack(parts: list[Tensor]) -> Tensor:
    """The bytes of ``parts``, one after another: uint8 [n]."""
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
