"""Accuracy on generated tasks, column by column on the same samples; every answer is kept as it comes."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from forecache.workers.core.requests import Policy
from forecache.workers.errors import ForecacheError
from forecache.workers.evaluation.ruler import Generator, Sample, Task, score
from forecache.workers.evaluation.statistics import Interval, mean_difference, paired_test, wilson_interval

ANSWERS_FILE = "answers.jsonl"
SETTINGS_FILE = "settings.json"
COMMON = "all columns"
"""Part of the settings' file."""
REFERENCE = "full"
LEAST_ACCURACY = 0.2
"""Where full attention is right less often, the model can't do the task: there is nothing to lose."""
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Column:
    """One way to choose resident sets. ``indexer``: fields of :class:`IndexerConfig` that it needs set otherwise."""

    name: str
    policy: Policy
    indexer: Mapping[str, Any] = field(default_factory=dict)


COLUMNS = {
    column.name: column
    for column in (
        Column("full", "full"),
        Column("lookahead", "lookahead"),
        Column("training-free", "lookahead", {"checkpoint": "none"}),
        Column("bounds", "lookahead", {"checkpoint": "none", "manifest": "none"}),
        Column("recency", "recency"),
        Column("random", "random"),
    )
}


@dataclass(frozen=True)
class Plan:
    """What to ask. ``lengths``: contexts in tokens, answers included; ``samples``: of every task at every length.
    ``skip_hopeless``: where full attention fails, the other columns are not asked."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    columns: tuple[Column, ...]
    samples: int
    skip_hopeless: bool = False

    def cells(self) -> Iterator[tuple[Task, int]]:
        """Every task at every length, short contexts first."""
        return ((task, tokens) for tokens in self.lengths for task in self.tasks)


@dataclass(frozen=True)
class Answer:
    """A reply and its account: ``keep_ratio`` is the mean of resident / all chunks over its decode steps, ``coverage``
    the share of retrieval-event mass on resident chunks, None where nobody measured it."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    keep_ratio: float
    coverage: float | None


@dataclass(frozen=True)
class Record:
    """One line of the answers' file: which sample, what its reply was worth, and the reply."""

    task: Task
    tokens: int
    sample: int
    column: str
    score: float
    answer: Answer

    @property
    def key(self) -> tuple[Task, int, int, str]:
        return self.task, self.tokens, self.sample, self.column


class Backend(Protocol):
    """Something that answers prompts: an engine in this process, or a server."""

    def group_size(self, tokens: int) -> int:
        """How many contexts of ``tokens`` tokens one call should hold, so that the next column finds them stored."""
        ...

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        """Replies to all ``samples``, in their order."""
        ...


class Records:
    """The answers of a run, on disk: what is there is never asked again.

    ``identity``: the settings that decide the answers; ``of_columns``: those that decide the answers of one column
    alone, by its name. A folder that holds answers of others is refused. Processes that ask different things may share
    a folder.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], of_columns: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / ANSWERS_FILE
        ours: dict[str, dict[str, Any]] = json.loads(json.dumps({COMMON: identity, **(of_columns or {})}))
        self._check(folder / SETTINGS_FILE, ours)
        self._records: dict[tuple[Task, int, int, str], Record] = {}
        for record in self._read():
            self._records[record.key] = record

    def _check(self, path: Path, ours: Mapping[str, Mapping[str, Any]]) -> None:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for part in sorted({*there} & {*ours}):
            for name in sorted({*there[part], *ours[part]}):
                old, new = there[part].get(name), ours[part].get(name)
                if old != new:
                    raise ForecacheError(
                        f"{path.parent} holds answers of other settings: {name} is {old!r} there and {new!r} here. Use "
                        "another --out."
                    )
        if not {*ours} <= {*there}:
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps({**there, **ours}, indent=2) + "\n", encoding="utf-8")
            partial.rename(path)

    def _read(self) -> Iterator[Record]:
        if not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            # the last run was killed while it wrote
            self._file.write_text("".join(lines[:-1]), encoding="utf-8")
            del lines[-1]
        for line in lines:
            values = json.loads(line)
            yield Record(**{**values, "answer": Answer(**values["answer"])})

    def __contains__(self, key: tuple[Task, int, int, str]) -> bool:
        return key in self._records

    def add(self, records: Sequence[Record]) -> None:
        """Keep them, on disk before this returns."""
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        with self._file.open("ab", buffering=0) as file:
            file.write(lines.encode())  # at once: others may be writing too
        self._records.update((record.key, record) for record in records)

    def of(self, task: Task, tokens: int, column: str) -> dict[int, Record]:
        """Sample number → record of one cell."""
        return {
            record.sample: record
            for record in self._records.values()
            if (record.task, record.tokens, record.column) == (task, tokens, column)
        }

    def hopeless(self, plan: Plan, task: Task, tokens: int) -> bool:
        """Full attention is right so seldom here that there is nothing to compare: over all samples, or, while some are
        open, as far as the 95 % interval of those answered tells."""
        scores = [record.score for number, record in self.of(task, tokens, REFERENCE).items() if number < plan.samples]
        if not scores:
            return False
        interval = wilson_interval(fmean(scores), len(scores))
        return (interval.value if len(scores) == plan.samples else interval.high) < LEAST_ACCURACY

    def missing(self, plan: Plan, columns: Sequence[Column]) -> int:
        """Answers of ``plan`` that ``columns`` still lack."""
        return sum(
            (task, tokens, number, column.name) not in self._records
            for task, tokens in plan.cells()
            for column in self.needed(plan, task, tokens, columns)
            for number in range(plan.samples)
        )

    def needed(self, plan: Plan, task: Task, tokens: int, columns: Sequence[Column]) -> list[Column]:
        """Of ``columns``, those that a cell needs."""
        hopeless = plan.skip_hopeless and self.hopeless(plan, task, tokens)
        return [column for column in columns if column.name == REFERENCE or not hopeless]


class Clock:
    """Tells when to stop: before a call that would probably end after ``limit_s`` seconds."""

    def __init__(self, limit_s: float | None) -> None:
        self._start_s = time.monotonic()
        self._limit_s = limit_s
        self._longest_s = 0.0

    def observe(self, duration_s: float) -> None:
        self._longest_s = max(self._longest_s, duration_s)

    @property
    def up(self) -> bool:
        """The longest call so far would not fit any more."""
        if self._limit_s is None:
            return False
        return time.monotonic() - self._start_s + self._longest_s > self._limit_s


class Progress(Protocol):
    def __call__(self, text: str, answered: int) -> None:
        """``text`` is being asked; ``answered`` more answers are there."""
        ...


def evaluate(
    plan: Plan,
    columns: Sequence[Column],
    backend: Backend,
    generator: Generator,
    records: Records,
    clock: Clock,
    progress: Progress,
) -> bool:
    """Ask ``backend`` for what ``columns`` of ``plan`` lack. False when time was up before all was there.

    All columns answer a group of samples before the next group comes: the first one pays for prefill, the others find
    the prompts' chunks stored.
    """
    # once is enough, unless a cell that looked hopeless is not in the end
    while groups := _groups(plan, columns, records, backend):
        for task, tokens, group in _made(groups, generator):
            for column in columns:
                asked = [sample for sample in group if (task, tokens, sample.number, column.name) not in records]
                if not asked or column not in records.needed(plan, task, tokens, columns):
                    continue
                if clock.up:
                    return False
                progress(f"{task} at {tokens}: {column.name}", 0)
                began_s = time.monotonic()
                answers = backend.answer(asked, column)
                clock.observe(time.monotonic() - began_s)
                records.add(
                    [
                        Record(task, tokens, sample.number, column.name, score(sample, answer.text), answer)
                        for sample, answer in zip(asked, answers, strict=True)
                    ]
                )
                progress(f"{task} at {tokens}: {column.name}", len(asked))
    return True


Group = tuple[Task, int, list[int]]
"""Task, tokens, and numbers of samples."""


def _groups(plan: Plan, columns: Sequence[Column], records: Records, backend: Backend) -> list[Group]:
    """Samples that a column has not answered yet, as many of a cell at a time as ``backend`` likes."""
    groups: list[Group] = []
    for task, tokens in plan.cells():
        needed = records.needed(plan, task, tokens, columns)
        waiting = [
            number
            for number in range(plan.samples)
            if any((task, tokens, number, column.name) not in records for column in needed)
        ]
        size = max(1, backend.group_size(tokens))
        groups += [(task, tokens, waiting[start : start + size]) for start in range(0, len(waiting), size)]
    return groups


def _made(groups: Sequence[Group], generator: Generator) -> Iterator[tuple[Task, int, list[Sample]]]:
    """The groups' samples. The next ones are made while these are asked: texts of 32K tokens take a while."""

    def make(group: Group) -> list[Sample]:
        task, tokens, numbers = group
        return [generator.sample(task, tokens, number) for number in numbers]

    with ThreadPoolExecutor(1, thread_name_prefix="samples") as maker:
        coming = maker.submit(make, groups[0])
        for place, (task, tokens, _) in enumerate(groups):
            samples = coming.result()
            if place + 1 < len(groups):
                coming = maker.submit(make, groups[place + 1])
            yield task, tokens, samples


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
