"""Evaluates chunk prediction on held-out documents: the trained indexer compared with all other scorers."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from forecache.indexer.records.checkpoint import CheckpointError, load_checkpoint, new_indexer
from forecache.indexer.records.encoder import MemoryIndexer, decode_records
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.shards import RecordedDocument, Recording, ShardError, ShardManifest
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.training.labels import LabelRule, window_labels
from forecache.indexer.training.metrics import BUDGETS, coverage, keep_masks, nan_mean, recall
from forecache.indexer.training.training_data import predict_rows, usable_rows

SCORERS = ("oracle", "trained", "untrained", "exact now", "training-free", "bounds", "recency", "random")
"""untrained: the indexer before training, with the model's queries; training-free: the current step's queries only."""
LEADS = (1, 2, 4, 8)
ROW_STRIDE = 4
"""One row in this many is evaluated, because predictions of neighbouring steps are nearly equal."""


@dataclass(frozen=True)
class Figure:
    """Means of one scorer at one budget over a group of predictions; None if there are none.

    ``task``, ``text``: the documents in the group, "all" for all; ``recall``: share of golden chunks kept;
    ``coverage``: share of the event mass kept, over all heads, and ``retrieval_coverage``, over the retrieval heads;
    ``answer_kept``: share of answers all of whose chunks the prediction ``lead`` steps before their first token kept;
    ``predictions``, ``answers``: their numbers.
    """

    scorer: str
    task: str
    text: str
    lead: int
    budget: float
    recall: float | None
    coverage: float | None
    retrieval_coverage: float | None
    answer_kept: float | None
    predictions: int
    answers: int


@dataclass
class _Sums:
    recalls: list[float]
    coverages: list[float]
    retrieval: list[float]
    answers: list[float]


def evaluate(
    data: Path,
    indexer: Path,
    *,
    leads: Sequence[int] = LEADS,
    budgets: Sequence[float] = BUDGETS,
    rule: LabelRule | None = None,
    least_steps: int = 8,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, documents: None,
) -> list[Figure]:
    """Figures for every scorer, lead, budget, task and kind of text, and over all of them.

    ``budgets``: shares of the chunks to keep; ``device``: a torch device; ``progress(done, documents)`` is called after
    every document. Raises :class:`ShardError` when ``data`` has no documents for evaluation, :class:`CheckpointError`
    when ``indexer`` was trained for another model.
    """
    rule = rule or LabelRule()
    recording = Recording(data)
    numbers = recording.split("eval")
    if not numbers:
        raise ShardError(f"{data} has no documents for evaluation: record some with --eval-documents")
    loaded, manifest = load_checkpoint(indexer)
    if differences := manifest.differences(recording.manifest):
        raise CheckpointError(f"{indexer} was trained for another model than {data}: {', '.join(differences)} differ")
    place = torch.device(device)
    # the second indexer has the model's own queries, which training has changed in the first
    pair = (loaded.to(place), new_indexer(recording, loaded.shape).to(place))
    sums: dict[tuple[str, str, str, int, float], _Sums] = defaultdict(lambda: _Sums([], [], [], []))
    for done, number in enumerate(numbers, start=1):
        document = recording.document(number).to(place)
        for lead in leads:
            for scorer, budget, kind, values in _judge(
                pair, recording.manifest, document, lead, budgets, rule, least_steps, number
            ):
                for task, text in product((document.task, "all"), (document.text, "all")):
                    getattr(sums[scorer, task, text, lead, budget], kind).extend(values)
        progress(done, len(numbers))
    return [
        Figure(
            *group,
            recall=nan_mean(found.recalls),
            coverage=nan_mean(found.coverages),
            retrieval_coverage=nan_mean(found.retrieval),
            answer_kept=nan_mean(found.answers),
            predictions=sum(value == value for value in found.coverages),
            answers=len(found.answers),
        )
        for group, found in sums.items()
    ]


@torch.no_grad()
def _judge(
    pair: tuple[MemoryIndexer, MemoryIndexer],
    recorded: ShardManifest,
    document: RecordedDocument,
    lead: int,
    budgets: Sequence[float],
    rule: LabelRule,
    least_steps: int,
    seed: int,
) -> Iterator[tuple[str, float, str, list[float]]]:
    """(scorer, budget, figure, values) of one document at one lead."""
    spec = recorded.index_spec
    rows = usable_rows(
        document,
        lead,
        rule,
        least_steps=least_steps,
        chunk_tokens=spec.chunk_tokens,
        history_steps=pair[0].shape.history[-1],
    )[::ROW_STRIDE]
    if len(rows):
        labels = window_labels(document, rows, lead, rule, chunk_tokens=spec.chunk_tokens)
        own = replace(rule, heads=recorded.retrieval_numbers)
        retrieved = window_labels(document, rows, lead, own, chunk_tokens=spec.chunk_tokens)
        scores, complete = _scores(pair, spec, document, rows, labels.event_mass, seed)
        for scorer, table in scores.items():
            for budget in budgets:
                kept = _kept(scorer, table, complete, budget)
                yield scorer, budget, "recalls", recall(kept, labels).tolist()
                yield scorer, budget, "coverages", coverage(kept, labels).tolist()
                yield scorer, budget, "retrieval", coverage(kept, retrieved).tolist()
    row = document.answer_step - lead
    if document.answer_step < 0 or row < int(document.runs[-1, 0]):
        return
    rows = torch.tensor([row], device=document.positions.device)
    labels = window_labels(document, rows, lead, rule, chunk_tokens=spec.chunk_tokens)
    scores, complete = _scores(pair, spec, document, rows, labels.event_mass, seed)
    answer = torch.arange(*document.answer, device=rows.device)
    for scorer, table in scores.items():
        for budget in budgets:
            yield scorer, budget, "answers", [float(_kept(scorer, table, complete, budget)[0, answer].all())]


def _scores(
    pair: tuple[MemoryIndexer, MemoryIndexer],
    spec: IndexSpec,
    document: RecordedDocument,
    rows: Tensor,
    event_mass: Tensor,
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores [rows, chunks] of every scorer, and the complete chunks of every row."""
    keys = decode_records(spec, document.records)
    found, own = (predict_rows(indexer, spec, document, rows, keys) for indexer in pair)
    chunks = found.logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "oracle": event_mass,
        "trained": found.logits,
        "untrained": own.logits,
        "exact now": document.peak_share[rows].float(),
        "training-free": own.training_free,
        "bounds": document.bounds_score[rows].float(),
        "recency": torch.arange(chunks, dtype=torch.float32, device=rows.device).expand(len(rows), -1),
        "random": torch.rand(len(rows), chunks, generator=generator).to(rows.device),
    }
    return scores, found.complete


def _kept(scorer: str, scores: Tensor, complete: Tensor, budget: float) -> Tensor:
    return keep_masks(scores, complete, budget, SelectionConfig())


def gap_closed(figures: Sequence[Figure], *, task: str, text: str, lead: int, budget: float, name: str) -> float | None:
    """Share of the gap between the training-free scorer and the oracle that the trained indexer closes.

    ``name``: the figure to compare. None if a value is missing or there is no gap.
    """
    values = {
        figure.scorer: getattr(figure, name)
        for figure in figures
        if (figure.task, figure.text, figure.lead, figure.budget) == (task, text, lead, budget)
    }
    free, trained, best = (values.get(scorer) for scorer in ("training-free", "trained", "oracle"))
    if free is None or trained is None or best is None or best - free < 1e-9:
        return None
    return float((trained - free) / (best - free))


def table(
    figures: Sequence[Figure], *, lead: int, budget: float, by: Literal["task", "text"] = "task"
) -> list[list[str]]:
    """A table with one row per scorer and one column per task or kind of text, and for all, at one lead and budget.

    Cells are "coverage / retrieval coverage / recall / answers kept".
    """
    other = "text" if by == "task" else "task"
    chosen = [f for f in figures if f.lead == lead and f.budget == budget and getattr(f, other) == "all"]
    groups = [*sorted({getattr(f, by) for f in chosen} - {"all"}), "all"]
    rows = [["scorer", *groups]]
    for scorer in SCORERS:
        cells = {getattr(f, by): f for f in chosen if f.scorer == scorer}
        rows.append([scorer, *(_cell(cells[group]) if group in cells else "" for group in groups)])
    return rows


def _cell(figure: Figure) -> str:
    values = (figure.coverage, figure.retrieval_coverage, figure.recall, figure.answer_kept)
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def as_records(figures: Sequence[Figure]) -> list[dict[str, object]]:
    """The figures as dicts for JSON, in a fixed order."""
    order = {scorer: place for place, scorer in enumerate(SCORERS)}
    ranked = sorted(figures, key=lambda f: (f.task, f.text, f.lead, f.budget, order.get(f.scorer, math.inf)))
    return [asdict(figure) for figure in ranked]
