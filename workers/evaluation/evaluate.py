"""Accuracy on generated tasks: asks every column the same samples, stores each answer on disk, and sums them up."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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
"""Section of the settings file for all columns."""
REFERENCE = "full"
LEAST_ACCURACY = 0.2
"""If full attention scores less, the model can't do the task, so there is nothing to compare."""
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Column:
    """One way to choose resident sets.

    ``indexer``: fields of :class:`IndexerConfig` that it overrides. ``min_resident_tokens``: of its requests; ``None``
    takes the engine's setting.
    """

    name: str
    policy: Policy
    indexer: Mapping[str, Any] = field(default_factory=dict)
    min_resident_tokens: int | None = None

    def at(self, sizes: Sequence[int]) -> "list[Column]":
        """This column with each of these ``min_resident_tokens``; a name ends in ``@N`` if there are several.

        Full attention keeps all chunks, so it stays one column.
        """
        if self.policy == "full":
            return [self]
        names = [self.name] if len(sizes) == 1 else [f"{self.name}@{size}" for size in sizes]
        return [replace(self, name=name, min_resident_tokens=size) for name, size in zip(names, sizes, strict=True)]


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
    """What to ask. ``lengths``: contexts with their answers, in tokens; ``samples``: samples per task and length;
    ``skip_hopeless``: skip the other columns where full attention fails."""

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
    """A reply and its statistics. ``keep_ratio``: mean of resident / all chunks over its decode steps; ``coverage``:
    share of retrieval-event mass on resident chunks, None if not measured."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    keep_ratio: float
    coverage: float | None


@dataclass(frozen=True)
class Record:
    """One line of the file of answers: the sample, the score of its reply, and the reply."""

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
    """Answers prompts: an engine in this process, or a server."""

    def group_size(self, tokens: int) -> int:
        """Largest number of contexts of ``tokens`` tokens per call that stay cached until the next column asks."""
        ...

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        """The replies to ``samples``, in order."""
        ...


class Records:
    """The answers of a run, on disk, so that a repeated run asks only the missing ones.

    ``identity``: settings that the answers depend on; ``of_columns``: column name → settings that only its answers
    depend on. Refuses a directory with answers of other settings. Processes with different plans may share one.
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
                        f"{path.parent} holds answers of other settings: {name} is {old!r} there and {new!r} here: use "
                        "another --out"
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
            # a run was killed while it wrote this line
            self._file.write_text("".join(lines[:-1]), encoding="utf-8")
            del lines[-1]
        for line in lines:
            values = json.loads(line)
            yield Record(**{**values, "answer": Answer(**values["answer"])})

    def __contains__(self, key: tuple[Task, int, int, str]) -> bool:
        return key in self._records

    def add(self, records: Sequence[Record]) -> None:
        """Store ``records`` on disk."""
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        with self._file.open("ab", buffering=0) as file:
            file.write(lines.encode())  # one write, since other processes may append too
        self._records.update((record.key, record) for record in records)

    def of(self, task: Task, tokens: int, column: str) -> dict[int, Record]:
        """The records of one cell, by sample number."""
        return {
            record.sample: record
            for record in self._records.values()
            if (record.task, record.tokens, record.column) == (task, tokens, column)
        }

    def hopeless(self, plan: Plan, task: Task, tokens: int) -> bool:
        """Whether full attention scores below ``LEAST_ACCURACY``: over all samples, or, while some are missing, by the
        upper end of the 95 % interval."""
        scores = [record.score for number, record in self.of(task, tokens, REFERENCE).items() if number < plan.samples]
        if not scores:
            return False
        interval = wilson_interval(fmean(scores), len(scores))
        return (interval.value if len(scores) == plan.samples else interval.high) < LEAST_ACCURACY

    def missing(self, plan: Plan, columns: Sequence[Column]) -> int:
        """Number of answers of ``plan`` that ``columns`` lack."""
        return sum(
            (task, tokens, number, column.name) not in self._records
            for task, tokens in plan.cells()
            for column in self.needed(plan, task, tokens, columns)
            for number in range(plan.samples)
        )

    def needed(self, plan: Plan, task: Task, tokens: int, columns: Sequence[Column]) -> list[Column]:
        """The ``columns`` that must answer a cell."""
        hopeless = plan.skip_hopeless and self.hopeless(plan, task, tokens)
        return [column for column in columns if column.name == REFERENCE or not hopeless]


class Clock:
    """Says when to stop: before a call that would probably end after ``limit_s`` seconds."""

    def __init__(self, limit_s: float | None) -> None:
        self._start_s = time.monotonic()
        self._limit_s = limit_s
        self._longest_s = 0.0

    def observe(self, duration_s: float) -> None:
        self._longest_s = max(self._longest_s, duration_s)

    @property
    def up(self) -> bool:
        """A call as long as the longest so far would exceed the limit."""
        if self._limit_s is None:
            return False
        return time.monotonic() - self._start_s + self._longest_s > self._limit_s


class Progress(Protocol):
    def __call__(self, text: str, answered: int) -> None:
        """``text``: the current activity; ``answered``: number of new answers."""
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
    """Ask ``backend`` for the answers of ``plan`` that ``columns`` lack. Returns False if time ran out.

    All columns answer a group of samples before the next group starts: the first column pays for prefill, the others
    find the prompts' chunks cached.
    """
    # again if a cell that looked hopeless turns out not to be
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
"""(task, tokens, sample numbers)."""


def _groups(plan: Plan, columns: Sequence[Column], records: Records, backend: Backend) -> list[Group]:
    """Samples that some column has not answered, in groups of the size that ``backend`` prefers."""
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
    """The samples of the groups. A thread makes the next group during a call, since long texts take time."""

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

    ``low``, ``high``: 95 % Wilson interval of the accuracy. ``better``, ``worse``, ``p_value``: compared with full
    attention on the same samples. ``counted``: whether the means include it, which needs full attention to reach
    ``LEAST_ACCURACY``. ``keep_ratio``, ``coverage``: means over the samples. ``cached_share``: cached prompt tokens /
    all prompt tokens.
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
        """Worse than full attention with a p-value below ``SIGNIFICANT``."""
        if self.better is None or self.worse is None or self.p_value is None:
            return False
        return self.worse > self.better and self.p_value < SIGNIFICANT


@dataclass(frozen=True)
class ColumnResult:
    """One column over all counted cells that every column has answered completely, with equal weights.

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
    """The figures of a run, by cell and by column."""

    cells: tuple[CellResult, ...]
    columns: tuple[ColumnResult, ...]

    @property
    def not_counted(self) -> tuple[CellResult, ...]:
        """Results of full attention on the tasks that the model can't do."""
        return tuple(cell for cell in self.cells if cell.column == REFERENCE and not cell.counted)


def summarize(plan: Plan, records: Records) -> Summary:
    """The figures of the answers so far."""
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
