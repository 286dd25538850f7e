"""The figures of `forecache eval`: a table on the terminal, CSV and JSON."""

import csv
import json
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forecache.workers.evaluation.eval_summary import CellResult, ColumnResult, Summary
from forecache.workers.evaluation.evaluate import LEAST_ACCURACY

TABLE_FILE, SUMMARY_FILE = "accuracy.csv", "accuracy.json"
FILE_WIDTH = 160
"""Characters of a line where the output is no terminal."""


def write(summary: Summary, identity: dict[str, Any], out: Path, *, machine: str, complete: bool) -> None:
    """A CSV line for every cell, and all figures as JSON. ``complete``: nothing is left to be asked."""
    with (out / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
        common = {name: identity[name] for name in ("model", "prose", "over", "transformers")}
        names = [field.name for field in fields(CellResult)]
        writer = csv.DictWriter(file, [*names, *common], extrasaction="raise")
        writer.writeheader()
        writer.writerows({**asdict(cell), **common} for cell in summary.cells)
    found = {
        "complete": complete,
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": identity,
        "cells": [asdict(cell) for cell in summary.cells],
        "columns": [asdict(column) for column in summary.columns],
        "model_cannot": [f"{cell.task} at {cell.tokens}" for cell in summary.not_counted],
    }
    (out / SUMMARY_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def show(summary: Summary, identity: dict[str, Any]) -> None:
    """The table on the terminal, what the model can't do, and each column against full attention."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(_table(summary, f"{identity['model']}, keep ratio {identity['keep_ratio']:g}, {identity['prose']}"))
    for cell in summary.not_counted:
        console.print(f"model can't: {cell.task} at {cell.tokens} (full attention {cell.accuracy:.0%})")
    for column in summary.columns:
        if column.difference is not None:
            console.print(_verdict(column), highlight=False)


def _table(summary: Summary, title: str) -> Table:
    table = Table(
        title=title,
        caption="accuracy in % [95 % interval]; keep ratio, coverage; samples better (+) and worse (-) than with full "
        "attention, p of McNemar's test",
    )
    names = list(dict.fromkeys(cell.column for cell in summary.cells))
    table.add_column("task")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    places = dict.fromkeys((cell.task, cell.tokens) for cell in summary.cells)
    by_place = {(cell.task, cell.tokens, cell.column): cell for cell in summary.cells}
    for task, tokens in places:
        cells = [by_place.get((task, tokens, name)) for name in names]
        note = "" if all(cell is None or cell.counted for cell in cells) else "\nmodel can't"
        table.add_row(f"{task}{note}", f"{tokens}", *("" if cell is None else _cell(cell) for cell in cells))
    if summary.columns:
        table.add_section()
        by_name = {column.column: column for column in summary.columns}
        table.add_row("mean", f"{summary.columns[0].cells} cells", *(_mean(by_name[name]) for name in names))
    return table


def _cell(cell: CellResult) -> str:
    first = f"{cell.accuracy:.1%} [{cell.low:.0%}, {cell.high:.0%}]".replace("%", "")
    second = f"{cell.keep_ratio:.3f} {_coverage(cell.coverage)}"
    if cell.p_value is not None:
        second += f"\n+{cell.better} -{cell.worse} p={cell.p_value:.2g}"
    return f"{first}\n{second}"


def _mean(column: ColumnResult) -> str:
    return f"{100 * column.accuracy:.1f}\n{column.keep_ratio:.3f} {_coverage(column.coverage)}"


def _coverage(coverage: float | None) -> str:
    return "-" if coverage is None else f"{coverage:.2f}"


def _verdict(column: ColumnResult) -> str:
    assert column.difference is not None
    points = [100 * value for value in (column.difference.value, column.difference.low, column.difference.high)]
    worse = ", ".join(column.significantly_worse) or "nowhere"
    return (
        f"{column.column}: {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}] against full attention over "
        f"{column.cells} cells (those of {LEAST_ACCURACY:.0%} and more); significantly worse: {worse}"
    )
