"""From a plan to a packed DeepSeek-V4 step: where every token, entry and state lies. Host work alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from forecache.workers.core.sequence import Chunk, TokenSequence
from forecache.workers.core.step_plan import StreamPart
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.deepseek_v4.queries import EntryProbe
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape
from forecache.workers.models.deepseek_v4.state import PAGE_ENTRIES, Line, SequenceStates
from forecache.workers.models.deepseek_v4.step import Places, StreamPast, V4Rows, V4Stream
from forecache.workers.models.step.cold_reads import ColdReads
from forecache.workers.models.step.packing import padded, put


@dataclass(frozen=True)
class FixedRow:
    """A decode row of a step of fixed shape, on the host. ``token`` is -1 while the host does not know it: then it is
    the one drawn in row ``source`` of the step before. ``slot``, ``page``: where the entries belong that are being
    filled; ``table``: slots to read, ``entries`` of them in all; ``pages``: of its HCA entries; ``history``: the line
    for its hidden states."""

    token: int
    source: int
    position: int
    line: int
    slot: int
    page: int
    entries: int
    table: npt.NDArray[np.int32]
    pages: Sequence[int]
    history: int


class StepLayout:
    """Lays out steps over ``pool`` and ``states``, of chunks of ``chunk_tokens`` tokens."""

    def __init__(self, shape: DeepseekV4Shape, states: SequenceStates, pool: HotPool, chunk_tokens: int) -> None:
        self._shape = shape
        self._states = states
        self._pool = pool
        self._chunk_tokens = chunk_tokens
        self._device = pool.memory.device

    def rows(self, sequences: Sequence[TokenSequence]) -> V4Rows:
        """The decode rows of ``sequences``, over their resident sets."""
        shape, device = self._shape, self._device
        lines = [self._states.line(seq, seq.num_computed + 1) for seq in sequences]
        positions = [seq.num_computed for seq in sequences]
        tables = [seq.block_row() for seq in sequences]
        lens = [self._entries(table, at) for table, at in zip(tables, positions, strict=True)]
        return V4Rows(
            lines=put([line.number for line in lines], device),
            positions=put(positions, device),
            window_lens=put([min(at + 1, shape.window) for at in positions], device, np.int32),
            table=padded(tables, device),
            lens=put(lens, device, np.int32),
            csa=self._closed_by_rows(sequences, lines, shape.csa_rate),
            hca=self._closed_by_rows(sequences, lines, shape.hca_rate),
            hca_table=padded([line.pages for line in lines], device),
            hca_lens=put([(at + 1) // shape.hca_rate for at in positions], device, np.int32),
        )

    def fixed_row(self, seq: TokenSequence, source: int | None, history: int) -> FixedRow:
        """The decode row of ``seq``. Its token is known, or drawn by row ``source`` of the step before."""
        at, size, shape = seq.num_computed, self._chunk_tokens, self._shape
        # with a page for the HCA entry that is being filled
        line = self._states.line(seq, (at // shape.hca_rate + 1) * shape.hca_rate)
        table = seq.block_row()
        return FixedRow(
            token=seq.token_ids[at] if source is None else -1,
            source=-1 if source is None else source,
            position=at,
            line=line.number,
            slot=seq.open_slots[at // size],
            page=line.pages[at // shape.hca_rate // PAGE_ENTRIES] if shape.hca else 0,
            entries=self._entries(table, at),
            table=table,
            pages=line.pages,
            history=history,
        )

    def _entries(self, table: Sequence[int] | npt.NDArray[np.int32], at: int) -> int:
        """Entries of a CSA layer in the slots ``table``, the last one filled up to position ``at``."""
        return (len(table) - 1) * (self._chunk_tokens // self._shape.csa_rate) + (
            at % self._chunk_tokens + 1
        ) // self._shape.csa_rate

    def _closed_by_rows(self, sequences: Sequence[TokenSequence], lines: Sequence[Line], rate: int) -> Places:
        entries = []
        for row, (seq, line) in enumerate(zip(sequences, lines, strict=True)):
            if (seq.num_computed + 1) % rate == 0:
                entries.append((row, *self._entry(seq, line, seq.num_computed // rate, rate)))
        return self._places(entries)

    def _entry(self, seq: TokenSequence, line: Line, number: int, rate: int) -> tuple[int, int, int, int, int]:
        """First token, slot, place in it, page and place in it, of entry ``number`` of ``seq``, which is new."""
        chunk, place = divmod(number * rate, self._chunk_tokens)
        page = line.pages[number // PAGE_ENTRIES] if rate == self._shape.hca_rate and self._shape.hca else 0
        return number * rate, seq.open_slots[chunk], place // rate, page, number % PAGE_ENTRIES

    def _places(self, entries: Sequence[tuple[int, ...]]) -> Places:
        columns = np.array(entries, dtype=np.int64).reshape(-1, 6).T
        return Places(*put(columns, self._device).unbind(0))

    def stream(self, part: StreamPart, start: int, keep: Sequence[int], probe: EntryProbe | None) -> V4Stream:
        """``part`` as packed tokens, the first at ``start``; snapshots are wanted after the positions ``keep``."""
        seq, first, stop = part.sequence, part.sequence.num_computed, part.sequence.num_computed + part.tokens
        line, shape = self._states.line(seq, stop), self._shape
        return V4Stream(
            start=start,
            stop=start + part.tokens,
            first=first,
            line=line.number,
            past=self.past(seq, stop),
            csa=self._closed_by_stream(seq, line, first, stop, shape.csa_rate),
            hca=self._closed_by_stream(seq, line, first, stop, shape.hca_rate),
            hca_pages=put(line.pages, self._device),
            kept={at: ([], [], []) for at in keep},
            probe=probe,
        )

    def _closed_by_stream(self, seq: TokenSequence, line: Line, first: int, stop: int, rate: int) -> Places:
        numbers = range(first // rate, stop // rate)
        return self._places([(0, *self._entry(seq, line, number, rate)) for number in numbers])

    def past(self, seq: TokenSequence, stop: int) -> StreamPast:
        """Find the chunks of ``seq`` up to the one of token ``stop - 1``: in the pool, or in the arena."""
        hot: list[tuple[int, int]] = []
        cold: list[Chunk] = []
        for chunk in seq.chunks:
            slot = seq.hot_slot(chunk.number, self._pool)
            if slot is not None:
                hot.append((slot, chunk.number))
            else:
                assert chunk.ref is not None, f"chunk {chunk.number} of {seq.request_id} is neither hot nor cold"
                cold.append(chunk)
        opened = range(len(seq.chunks), -(-stop // self._chunk_tokens))
        hot_columns = put(np.array(hot, dtype=np.int64).reshape(-1, 2).T, self._device)
        sums = None
        if cold and self._device.type == "cuda":
            sums = torch.zeros(len(cold), dtype=torch.int64, device=self._device)
        reads = ColdReads.of(seq.request_id, cold, sums)
        return StreamPast(
            hot_columns[0], hot_columns[1],
            torch.tensor([ref.slot for ref in reads.refs], dtype=torch.int64),
            torch.tensor(reads.numbers, dtype=torch.int64),
            put([seq.open_slots[n] for n in opened], self._device),
            reads,
        )  # fmt: skip
