"""Inputs of the dual encoder from recorded documents, and its predictions for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forecache.indexer.records.encoder import MemoryIndexer, chunk_log_shares, decode_records, history_rows, run_starts
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.shards import RecordedDocument
from forecache.indexer.training.labels import EventSums, LabelRule, complete_chunks, window_rows


@dataclass(frozen=True)
class Lesson:
    """A document, and the data that every training step derives from it, computed once.

    ``sums``, ``retrieval_sums``: sums of its events, and of the events of the retrieval heads; ``rows``: int64 on the
    host, the rows at which predictions are possible for every lead. The document's ``runs`` are on the host, too.
    """

    document: RecordedDocument
    sums: EventSums
    retrieval_sums: EventSums
    rows: Tensor


@dataclass(frozen=True)
class Predictions:
    """Scores of R predictions over all chunks of one document.

    ``logits``, ``training_free`` (a log share): float32 [R, chunks]; ``complete``: int64 [R].
    """

    logits: Tensor
    training_free: Tensor
    complete: Tensor


def usable_rows(
    document: RecordedDocument, lead: int, rule: LabelRule, *, least_steps: int, chunk_tokens: int, history_steps: int
) -> Tensor:
    """Rows at which a prediction has at least ``least_steps`` recorded steps in its window, at least one candidate, and
    ``history_steps`` recorded steps before it: int64 [rows]."""
    rows = torch.arange(document.steps, device=document.positions.device)
    first, last = window_rows(document, rows, lead, rule.window_steps)
    complete = complete_chunks(document.positions, chunk_tokens)
    behind = rows - run_starts(rows, document.runs)
    judged = (last - first >= least_steps) & (behind >= history_steps)
    return rows[judged & (complete > rule.sink_chunks + rule.recency_chunks)]


def predict_rows(
    indexer: MemoryIndexer, spec: IndexSpec, document: RecordedDocument, rows: Tensor, keys: Tensor | None = None
) -> Predictions:
    """Predictions at ``rows``, int64 [R]. ``keys``: the document's decoded records, decoded here if not given."""
    if keys is None:
        keys = decode_records(spec, document.records)
    device = document.records.device
    # computed where the rows are: on the host this does not wait for the device
    needed, places = torch.unique(history_rows(rows, document.runs, indexer.shape.history), return_inverse=True)
    rows, needed, places = rows.to(device), needed.to(device), places.to(device)
    positions = document.positions[needed]
    queries = indexer.queries(document.hidden[needed], positions)
    log_shares = chunk_log_shares(spec, keys, queries, positions)[places]
    complete = complete_chunks(document.positions[rows], spec.chunk_tokens)
    tail = (document.positions[rows] + 1 - complete * spec.chunk_tokens).float() / spec.chunk_tokens
    logits = indexer(log_shares, document.hidden[rows], complete, tail)
    free = log_shares[:, 0, : indexer.retrieval_heads].detach().amax(1)
    return Predictions(logits, free, complete)
