"""One packed step of a DeepSeek-V4 model, as its attention layers read it: decode rows, then streams."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forecache.kernels.chunks import ops
from forecache.workers.models.deepseek_v4.queries import EntryProbe
from forecache.workers.models.deepseek_v4.state import SequenceStates, pack
from forecache.workers.models.step.cold_reads import ColdReads
from forecache.workers.models.step.hidden_history import HiddenRows


@dataclass(frozen=True)
class Places:
    """Entries that are completed, int64 [n] each: they belong into ``slots`` of the pool at ``places``, and where they
    are of an HCA layer also into ``pages`` at ``page_places``. ``firsts``: position of the first token each stands for.
    ``rows``: the decode rows that complete them; empty in a stream, which completes them in order. ``closing``: bool
    [n], which of them are complete after this step, where not all are: the others are made of places that hold nothing
    yet, and nothing reads them."""

    rows: Tensor
    firsts: Tensor
    slots: Tensor
    places: Tensor
    pages: Tensor
    page_places: Tensor
    closing: Tensor | None = None


@dataclass(frozen=True)
class V4Rows:
    """Decode rows. ``table``: int32 [rows, max chunks], slots whose entries may be selected, ``lens``: int32 [rows],
    how many there are; ``lines``, ``positions``: int64 [rows]; ``window_lens``: int32 [rows], tokens in the window,
    this one included; ``hca_table``: int32 [rows, max pages], ``hca_lens``: int32 [rows]."""

    lines: Tensor
    positions: Tensor
    window_lens: Tensor
    table: Tensor
    lens: Tensor
    csa: Places
    hca: Places
    hca_table: Tensor
    hca_lens: Tensor

    def __len__(self) -> int:
        return len(self.lines)


@dataclass
class StreamPast:
    """Full chunks before a stream's tokens, ``hot`` ones in the pool, ``cold`` ones where they lie in the arena: slots
    and chunk numbers, int64 [n] each; and the slots of the chunks that are being filled. ``reads``: the cold ones, with
    the checksums, on a GPU, of what was copied there."""

    hot_slots: Tensor
    hot_chunks: Tensor
    cold_slots: Tensor
    cold_chunks: Tensor
    open_slots: Tensor
    reads: ColdReads

    def gather(self, hot: Tensor, cold: Tensor | None, number: int | slice) -> Tensor:
        """Entries of layer ``number`` of a field, in order: [entries, dim], those of the chunks that are being filled
        last; of several layers [layers, entries, dim]. ``hot``, ``cold``: [slots, layers, entries per chunk, dim]."""
        full = len(self.hot_chunks) + len(self.cold_chunks)
        one = hot[:1, number]
        found = hot.new_empty(full + len(self.open_slots), *one.shape[1:])
        found[self.hot_chunks] = hot[self.hot_slots, number]
        if len(self.cold_chunks):
            assert cold is not None, "chunks are cold but there is no arena"
            found[self.cold_chunks.to(found.device)] = self._read(cold, number, found.device)
        found[full:] = hot[self.open_slots, number]
        return found.flatten(0, 1) if found.dim() == 3 else found.transpose(0, 1).flatten(1, 2)

    def read_to_verify(self, cold: Tensor | None) -> None:
        """Read a field of the cold chunks that the layers do not read: only of a whole chunk the checksum is known."""
        if cold is not None and self.reads.sums is not None and len(self.cold_chunks):
            self._read(cold, slice(None), self.reads.sums.device)

    def _read(self, cold: Tensor, number: int | slice, device: torch.device) -> Tensor:
        """Entries of layer ``number`` of all cold chunks, or of several, on ``device``."""
        part = cold[self.cold_slots, number].to(device)
        if self.reads.sums is not None:
            rows = part.flatten(1).view(torch.uint8)
            first = cold[:, number].storage_offset() * cold.element_size() // 4
            self.reads.sums.add_(ops.slot_checksums(rows, torch.arange(len(rows), device=device), first))
        return part


@dataclass
class V4Stream:
    """Packed tokens ``start:stop`` of one sequence, the first at position ``first``.

    ``pending`` is what its state becomes, once all layers are through: a step that is aborted leaves the state as it
    was. ``kept``: for each position behind which a snapshot is wanted, its parts; see :meth:`snapshots`.
    """

    start: int
    stop: int
    first: int
    line: int
    past: StreamPast
    csa: Places
    hca: Places
    hca_pages: Tensor
    kept: dict[int, tuple[list[Tensor], ...]]
    probe: EntryProbe | None = None
    pending: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def extend(self, ring: Tensor, new: Tensor, last: int, kind: int | None) -> Tensor:
        """``new`` [tokens, width] behind what ``ring`` [length, width], of one layer, holds of the positions before:
        [past + tokens, width]. The ring is to hold them too, in the end; a snapshot the ``last`` ones before it, as its
        part number ``kind`` (None: in none)."""
        length, tokens, device = len(ring), len(new), ring.device
        past = min(self.first, length)
        before = torch.arange(self.first - past, self.first, device=device) % length
        rows = torch.cat([ring[before], new])
        left = min(tokens, length)
        after = torch.arange(self.first + tokens - left, self.first + tokens, device=device) % length
        self.pending.append((ring, after, new[-left:].clone()))
        for boundary, parts in self.kept.items() if kind is not None else ():
            end = boundary - self.first + past
            kept = rows[max(end - last, 0) : end]
            # of a window longer than all there is, what lies before the first token is never read
            parts[kind or 0].append(torch.nn.functional.pad(kept, (0, 0, last - len(kept), 0)))
        return rows

    def commit(self) -> None:
        """All layers are through."""
        for ring, places, rows in self.pending:
            ring[places] = rows
        self.pending.clear()

    def snapshots(self) -> dict[int, Tensor]:
        """Position → snapshot behind it, as of :meth:`.state.SequenceStates.snapshot`."""
        return {at: pack([row for part in parts for row in part]) for at, parts in self.kept.items()}


@dataclass
class V4Batch:
    """One forward pass over packed tokens: ``rows`` first, then ``streams``. ``entries``, ``index`` and ``hca`` are
    fields of the pool, [slots, layers, entries, dim]; the ``cold_…`` ones those of the arena. ``non_finite``: uint8
    [tokens], where the step marks tokens of which it keeps something that is not finite."""

    token_ids: Tensor
    positions: Tensor
    logits_rows: Tensor
    states: SequenceStates
    entries: Tensor
    index: Tensor
    hca: Tensor | None
    cold_entries: Tensor | None
    cold_index: Tensor | None
    non_finite: Tensor
    rows: V4Rows | None = None
    streams: tuple[V4Stream, ...] = ()
    hidden: HiddenRows | None = None
    aborted: Callable[[], bool] = lambda: False
