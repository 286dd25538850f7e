"""Answers to figures: accuracy of every task, length and column, and of all together."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from forecache.workers.evaluation.evaluate import LEAST_ACCURACY, REFERENCE, Plan, Record, Records
from forecache.workers.evaluation.ruler import Task
from forecache.workers.evaluation.statistics import Interval, mean_difference, paired_test, wilson_interval

SIGNIFICANT = 0.01


@dataclass(frozen=True)
class CellResult:
    """One column on one task at one length.

    ``low``, ``high``: Wilson interval of the accuracy, 95 %. ``better``, ``worse``, ``p_value``: against full attention
    on the same samples. ``counted``: in the means; not so where full attention is below ``LEAST_ACCURACY``.
    ``keep_ratio``, ``coverage``: means over the samples. ``cached_share``: prompt tokens found stored.
    """

    task: Task
    tokens: int
    column: str
    samples: int
    accuracy: float
    low: float
    high: float
    keep_ratio: float
    coverage: float | None
    counted: bool
    better: int | None
    worse: int | None
    p_value: float | None
    cached_share: float

    @property
    def significantly_worse(self) -> bool:
        """Than full attention, at ``SIGNIFICANT``."""
        if self.better is None or self.worse is None or self.p_value is None:
            return False
        return self.worse > self.better and self.p_value < SIGNIFICANT


@dataclass(frozen=True)
class ColumnResult:
    """One column over all counted cells that every column has answered in full, each weighing the same.

    ``difference``: mean accuracy minus that of full attention, with its 95 % interval; both in [-1, 1].
    """

    column: str
    cells: int
    accuracy: float
    keep_ratio: float
    coverage: float | None
    difference: Interval | None
    significantly_worse: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    cells: tuple[CellResult, ...]
    columns: tuple[ColumnResult, ...]

    @property
    def not_counted(self) -> tuple[CellResult, ...]:
        """What the model can't do: full attention's results there."""
        return tuple(cell for cell in self.cells if cell.column == REFERENCE and not cell.counted)


def summarize(plan: Plan, records: Records) -> Summary:
    """The figures of what has been answered so far."""
    cells: list[CellResult] = []
    complete: list[dict[str, list[Record]]] = []
    for task, tokens in plan.cells():
        answered = {column.name: records.of(task, tokens, column.name) for column in plan.columns}
        answered = {
            name: {number: record for number, record in found.items() if number < plan.samples}
            for name, found in answered.items()
            if found
        }
        reference = answered.get(REFERENCE)
        counted = reference is None or _accuracy(list(reference.values())) >= LEAST_ACCURACY
        cells += [_cell(name, found, reference, counted) for name, found in answered.items()]
        numbers = range(plan.samples)
        if counted and all(len(answered.get(column.name, ())) == plan.samples for column in plan.columns):
            complete.append({name: [found[number] for number in numbers] for name, found in answered.items()})
    if not complete:
        return Summary(tuple(cells), ())
    return Summary(tuple(cells), tuple(_column(column.name, complete, cells) for column in plan.columns))


def _accuracy(records: Sequence[Record]) -> float:
    return fmean(record.score for record in records)


def _coverage(records: Sequence[Record]) -> float | None:
    measured = [record.answer.coverage for record in records if record.answer.coverage is not None]
    return fmean(measured) if measured else None


def _cell(column: str, found: dict[int, Record], reference: dict[int, Record] | None, counted: bool) -> CellResult:
    records = [found[number] for number in sorted(found)]
    interval = wilson_interval(_accuracy(records), len(records))
    test = None
    if reference is not None and column != REFERENCE:
        both = sorted(found.keys() & reference.keys())
        test = paired_test([found[n].score for n in both], [reference[n].score for n in both])
    return CellResult(
        task=records[0].task,
        tokens=records[0].tokens,
        column=column,
        samples=len(records),
        accuracy=interval.value,
        low=interval.low,
        high=interval.high,
        keep_ratio=fmean(record.answer.keep_ratio for record in records),
        coverage=_coverage(records),
        counted=counted,
        better=None if test is None else test.better,
        worse=None if test is None else test.worse,
        p_value=None if test is None else test.p_value,
        cached_share=sum(r.answer.cached_tokens for r in records) / sum(r.answer.prompt_tokens for r in records),
    )


def _column(column: str, complete: Sequence[dict[str, list[Record]]], cells: Sequence[CellResult]) -> ColumnResult:
    mine = [found[column] for found in complete]
    difference = None
    if column != REFERENCE and REFERENCE in complete[0]:
        difference = mean_difference(
            [([r.score for r in found[column]], [r.score for r in found[REFERENCE]]) for found in complete]
        )
    coverages = [coverage for records in mine if (coverage := _coverage(records)) is not None]
    return ColumnResult(
        column=column,
        cells=len(mine),
        accuracy=fmean(_accuracy(records) for records in mine),
        keep_ratio=fmean(fmean(record.answer.keep_ratio for record in records) for records in mine),
        coverage=fmean(coverages) if coverages else None,
        difference=difference,
        significantly_worse=tuple(
            f"{cell.task} at {cell.tokens}"
            for cell in cells
            if cell.column == column and cell.counted and cell.significantly_worse
        ),
    )
