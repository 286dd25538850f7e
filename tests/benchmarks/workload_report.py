"""The file that `bench_workloads.py` resumes, and the table of its rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PEER = "vllm"


class ResumeError(RuntimeError):
    """The file holds results of other settings; the message names the difference."""


@dataclass(frozen=True)
class Rate:
    """Arrivals that an engine sustains. ``of``: the engine; ``how``: the way it was found."""

    per_s: float
    of: str
    how: str


class Results:
    """Figures by row and column, in one JSON file that is complete after every row.

    A column is an engine, or forecache at one keep ratio. ``settings``: what all results have in common.

    Raises :class:`ResumeError` if the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rate: Rate | None = None
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        if path.exists():
            self._read(json.loads(path.read_text(encoding="utf-8")))

    def _read(self, stored: dict[str, Any]) -> None:
        if stored["settings"] != self._settings:
            before = stored["settings"]
            names = [name for name in self._settings | before if before.get(name) != self._settings.get(name)]
            told = ", ".join(f"{name} {before.get(name)}, now {self._settings.get(name)}" for name in names)
            raise ResumeError(f"{self._path} has results of other settings ({told}): give another --out")
        self.rate = None if stored["rate"] is None else Rate(**stored["rate"])
        self._rows = {(result["row"], result["column"]): result for result in stored["results"]}

    def done(self, row: str, column: str, rate_per_s: float | None = None) -> bool:
        """Whether the row was measured without errors, and at this rate."""
        result = self._rows.get((row, column))
        return result is not None and not result["errors"] and result["rate_per_s"] == rate_per_s

    def get(self, row: str, column: str) -> dict[str, Any] | None:
        return self._rows.get((row, column))

    def add(self, result: dict[str, Any]) -> None:
        self._rows[result["row"], result["column"]] = result
        self._save()

    def set_rate(self, rate: Rate) -> None:
        self.rate = rate
        self._save()

    def _save(self) -> None:
        document = {
            "settings": self._settings,
            "rate": None if self.rate is None else asdict(self.rate),
            "results": list(self._rows.values()),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)


FIGURES = (
    ("total, s", lambda result: result["total_s"]),
    ("first token p50, s", lambda result: result["first_token_s"].get("p50")),
    ("first token p99, s", lambda result: result["first_token_s"].get("p99")),
    ("between tokens p50, ms", lambda result: _ms(result["between_tokens_s"].get("p50"))),
    ("between tokens p99, ms", lambda result: _ms(result["between_tokens_s"].get("p99"))),
    ("beside streams: first token, s", lambda result: (result["beside"] or {}).get("document_first_token_s")),
    ("streams before: between tokens p50, ms", lambda result: _beside_ms(result, "gaps_before_s", "p50")),
    ("streams during its prefill: p50, ms", lambda result: _beside_ms(result, "gaps_during_s", "p50")),
    ("streams during its prefill: p99, ms", lambda result: _beside_ms(result, "gaps_during_s", "p99")),
    ("prompt tokens cached", lambda result: _share(result["cached_tokens"], result["prompt_tokens"])),
)


def _beside_ms(result: dict[str, Any], part: str, percentile: str) -> float | None:
    return None if result["beside"] is None else _ms(result["beside"][part].get(percentile))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _share(part: int | None, whole: int) -> str | None:
    return None if part is None or not whole else f"{part / whole:.1%}"


def table(results: Results, rows: Sequence[str], columns: Sequence[str]) -> str:
    """A Markdown table: every figure of every row by column, with its ratio to vLLM's where both were measured."""
    lines = [f"| workload | figure | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for row in rows:
        found = {column: results.get(row, column) for column in columns}
        if not any(found.values()):
            continue
        for name, figure in FIGURES:
            values = {column: None if result is None else figure(result) for column, result in found.items()}
            if not any(value is not None for value in values.values()):
                continue
            cells = [_cell(values[column], None if column == PEER else values.get(PEER)) for column in columns]
            lines.append(f"| {row} | {name} | {' | '.join(cells)} |")
        errors = {column: sum(result["errors"].values()) for column, result in found.items() if result is not None}
        if any(errors.values()):
            lines.append(f"| {row} | **errors** | {' | '.join(str(errors.get(c, '')) for c in columns)} |")
    return "\n".join(lines)


def _cell(value: float | str | None, peer: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    text = f"{value:.3g}" if value < 100 else f"{value:.1f}"
    return f"{text} ({value / peer:.2f} x)" if isinstance(peer, float) and peer else text


def columns_of(engines: Sequence[str], keep_ratios: Sequence[float]) -> Iterator[str]:
    """The columns of each engine: forecache has one for every keep ratio."""
    for engine in engines:
        if engine == PEER:
            yield PEER
        else:
            yield from (forecache_column(keep_ratio) for keep_ratio in keep_ratios)


def forecache_column(keep_ratio: float) -> str:
    return f"forecache, keep ratio {keep_ratio:g}"
