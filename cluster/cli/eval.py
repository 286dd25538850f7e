"""`forecache eval`: accuracy on long-context tasks, with predicted chunks, full attention and simple baselines."""

import argparse
import csv
import importlib.metadata
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from forecache.cluster.cli.bench import processor
from forecache.cluster.cli.command_line import Parser, above_zero, output_folder, positive
from forecache.cluster.config import ServeConfig, config_from_args
from forecache.cluster.tenants import authorization, read_key
from forecache.workers.errors import ForecacheError, InvalidRequestError
from forecache.workers.evaluation.backend import LATE_POLICY, EngineBackend, open_engine
from forecache.workers.evaluation.corpus import Kind
from forecache.workers.evaluation.evaluate import (
    COLUMNS,
    LEAST_ACCURACY,
    REFERENCE,
    Answer,
    Backend,
    CellResult,
    Clock,
    Column,
    ColumnResult,
    Plan,
    Records,
    Summary,
    evaluate,
    summarize,
)
from forecache.workers.evaluation.ruler import VERSION, Generator, Sample, Task
from forecache.workers.models.backbone import load_config, pick_device, pick_dtype
from forecache.workers.models.loader import model_name, resolve_model
from forecache.workers.models.registry import architecture_of
from forecache.workers.models.tokenizer import load_tokenizer

KI = 1024
NOT_IN_ANSWERS = {
    *("model", "device", "dtype", "keep_ratio", "seed"),  # recorded separately
    *("policy", "min_resident_tokens"),  # part of a column
    *("max_model_len", "hot_bytes", "max_batch_size", "max_step_tokens", "inter_token_target_s", "threads"),
    *("max_long_partial_prefills", "long_prefill_token_threshold"),
    *("gpu_memory_utilization", "cuda_graphs", "torch_compile", "overlap_steps", "early_wait_s"),
}
"""Settings of the engine that do not change answers: a run may continue with other values."""
DEFAULT_COLUMNS = ("full", "lookahead", "training-free", "recency", "random")
LONGEST_WAIT_S = 1800.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies of the environment, as ``top`` and ``bench serve`` do."""
TABLE_FILE, SUMMARY_FILE = "accuracy.csv", "accuracy.json"
FILE_WIDTH = 160
"""Characters per line when the output is not a terminal."""


class HttpBackend:
    """Asks a forecache server. Sends prompts as token ids, so that they equal those of an engine in this process.

    ``url``: with or without `/v1`; ``concurrency``: number of requests at a time.
    """

    def __init__(self, url: str, *, api_key: str | None, keep_ratio: float, concurrency: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **authorization(api_key)}
        self._keep_ratio = keep_ratio
        self._concurrency = concurrency
        self.model = str(self._ask("/v1/models")["data"][0]["id"])

    def group_size(self, tokens: int) -> int:
        """As many as run at once: those fit the server's cold memory, whose size is unknown here."""
        return self._concurrency

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        if column.indexer:
            raise InvalidRequestError(f"the column {column.name} needs its own engine: leave out --url")
        with ThreadPoolExecutor(self._concurrency) as threads:
            return list(threads.map(lambda sample: self._answer(sample, column), samples))

    def _answer(self, sample: Sample, column: Column) -> Answer:
        body = {
            "model": self.model,
            "prompt": sample.prompt_token_ids,
            "max_tokens": sample.max_tokens,
            "temperature": 0,
            "seed": 0,
            "forecache": {
                "policy": column.policy,
                "keep_ratio": self._keep_ratio,
                "min_resident_tokens": column.min_resident_tokens,
            },
        }
        found = self._ask("/v1/completions", body)
        usage = found["usage"]
        return Answer(
            text=found["choices"][0]["text"],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            keep_ratio=usage["forecache"]["keep_ratio"],
            coverage=usage["forecache"]["coverage"],
        )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON response to a GET, or to a POST of ``body``. Raises :class:`ForecacheError` with the server's
        reason."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with _DIRECT.open(request, timeout=LONGEST_WAIT_S) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise ForecacheError(f"{self._url} refused: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            raise ForecacheError(f"no forecache server answers at {self._url}: {error}") from error
        return answer


def _reason(error: urllib.error.HTTPError) -> str:
    """The message of an OpenAI error object, or else the status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return str(error)


def main(argv: list[str]) -> int:
    """Ask what has no answer yet, print the table, write the files. Returns 0 if all is answered, 1 if time ran out."""
    args = _parser().parse_args(argv)
    vars(args)["engine.max_batch_size"] = args.batch
    config = config_from_args(args)
    plan = Plan(
        tasks=tuple(args.tasks),
        lengths=tuple(sorted(set(args.lengths))),
        columns=_columns(args, config),
        samples=args.samples,
        skip_hopeless=args.skip_hopeless,
    )
    clock = Clock(args.time_limit_s)
    with _progress() as say:
        done, records, identity = _run(plan, config, args, clock, say)
    summary = summarize(plan, records)
    show(summary, identity)
    machine = "a server" if args.url is not None else processor(pick_device(config.engine.device).type)
    write(summary, identity, args.out, machine=machine, complete=done)
    if not done:
        left = records.missing(plan, plan.columns)
        print(f"time is up with {left} answers left; run the same command again to continue")
    return 0 if done else 1


def _columns(args: argparse.Namespace, config: ServeConfig) -> tuple[Column, ...]:
    """The columns of ``--columns``, at each of ``--min-resident-tokens``.

    By default those of :data:`DEFAULT_COLUMNS`, of which a server answers only some.
    """
    columns = [COLUMNS[name] for name in dict.fromkeys(args.columns or DEFAULT_COLUMNS)]
    if args.columns is None and args.url is not None:
        columns = [column for column in columns if not column.indexer]
    sizes = sorted(set(args.min_resident_tokens or [config.engine.min_resident_tokens]))
    return tuple(same for column in columns for same in column.at(sizes))


def _trained(column: Column) -> bool:
    """Whether the answers of ``column`` depend on the weights of the trained indexer."""
    return column.policy == "lookahead" and not column.indexer


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="forecache eval",
        description="Accuracy on generated long-context tasks like RULER's (arXiv 2404.06654), with every column on "
        "the "
        "same samples. --out keeps the answers: the same command asks only what has no answer yet.",
    )
    parser.add_argument(
        "--out", type=output_folder, required=True, help="directory for answers, table (CSV) and summary (JSON)"
    )
    _setting(parser, "--model", "engine.model", "built-in name, directory or hub id")
    parser.add_argument(
        "--url", help="ask a running server; --model then only names the tokenizer (default: the server's model)"
    )
    parser.add_argument("--api-key-file", type=Path, help="file with the API key, if the server requires one")
    parser.add_argument("--tasks", nargs="+", choices=get_args(Task), default=get_args(Task), metavar="TASK",
                        help=f"tasks: {', '.join(get_args(Task))} (default: all)")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=_length, default=[4 * KI, 8 * KI, 16 * KI, 32 * KI],
                        metavar="TOKENS", help="contexts with their answers (default: 4K 8K 16K 32K)")  # fmt: skip
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), metavar="COLUMN",
                        help=f"chunk choices: {', '.join(COLUMNS)} (default: {' '.join(DEFAULT_COLUMNS)})")  # fmt: skip
    parser.add_argument("--samples", type=positive, default=100, help="samples per task and length (default: 100)")
    parser.add_argument(
        "--prose", choices=get_args(Kind), default="topics", help="text that hides the answers (default: topics)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--skip-hopeless", action="store_true",
                        help="skip other columns where full attention is right in under 20 %% of samples")  # fmt: skip
    parser.add_argument("--time-limit-s", type=above_zero, help="stop within this many seconds (default: no limit)")
    parser.add_argument("--batch", type=positive, default=16, help="concurrent sequences or requests (default: 16)")
    _setting(parser, "--keep-ratio", "engine.keep_ratio", "resident / all chunks (default: 0.135)")
    parser.add_argument(
        "--min-resident-tokens",
        nargs="+",
        type=_tokens,
        metavar="TOKENS",
        help="tokens that stay resident whatever the keep ratio; several: a column for each (default: as served)",
    )
    _setting(parser, "--threads", "engine.threads", "CPU threads of the model (default: all cores)")
    _setting(parser, "--device", "engine.device", "auto, cpu, cuda or cuda:N (default: auto)")
    _setting(parser, "--dtype", "engine.dtype", "auto, float32, bfloat16 or float16 (default: auto)")
    _setting(
        parser,
        "--hot-bytes",
        "engine.hot_bytes",
        "size of the hot pool (default: room for a batch, at most half of the free memory)",
    )
    _setting(
        parser,
        "--cold-bytes",
        "memory.cold_bytes",
        "size of cold memory (default: room for the samples, at most half of the free memory)",
    )
    _setting(parser, "--indexer", "indexer.checkpoint", "trained indexer: auto, a file or none (default: auto)")
    _setting(
        parser,
        "--indexer-manifest",
        "indexer.manifest",
        "manifest of retrieval heads: auto, a file or none (default: auto)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings, as for `forecache serve`; flags win over it"
    )
    return parser


def _setting(parser: argparse.ArgumentParser, flag: str, path: str, text: str) -> None:
    """Add the flag of `forecache serve` for the setting at ``path`` of :class:`ServeConfig`."""
    parser.add_argument(flag, dest=path, default=argparse.SUPPRESS, metavar=flag.rsplit("-", 1)[-1].upper(), help=text)


def _length(text: str) -> int:
    """A number of tokens: ``4096`` or ``4K``."""
    return positive(text[:-1]) * KI if text[-1:] in ("k", "K") else positive(text)


def _tokens(text: str) -> int:
    """A number of tokens, or 0."""
    return 0 if text == "0" else _length(text)


Say = Callable[[str, int, int], None]
"""Called with the current activity, the number of new answers, and the number of answers in total."""


@contextmanager
def _progress() -> Iterator[Say]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def say(text: str, answered: int, total: int) -> None:
            bar.update(task, description=text, advance=answered, total=total or None)

        yield say


def _run(
    plan: Plan, config: ServeConfig, args: argparse.Namespace, clock: Clock, say: Say
) -> tuple[bool, Records, dict[str, Any]]:
    """Ask everything without an answer, one engine after another. Returns (all answered, answers, identity)."""
    server = None
    if args.url is not None:
        key = read_key(args.api_key_file)
        server = HttpBackend(args.url, api_key=key, keep_ratio=config.engine.keep_ratio, concurrency=args.batch)
    model = config.engine.model
    if server is not None and "model" not in config.engine.model_fields_set:
        model = server.model
    say(f"preparing {model}", 0, 0)
    path = resolve_model(model, lambda text: say(text, 0, 0))
    generator = Generator(load_tokenizer(path), prose=args.prose, seed=args.seed)
    identity = _identity(args, config, generator, server, model, path)
    weights: dict[str, Any] = {}
    if server is None and any(_trained(column) for column in plan.columns):
        weights = {"trained_indexer": _trained_digest(config, path)}
    of_columns: dict[str, dict[str, Any]] = {
        column.name: {"min_resident_tokens": column.min_resident_tokens} | (weights if _trained(column) else {})
        for column in plan.columns
    }
    records = Records(args.out, identity, of_columns)
    sizes = {column.name: column.min_resident_tokens for column in plan.columns if column.policy != REFERENCE}
    identity |= weights | {"min_resident_tokens": sizes}
    total = records.missing(plan, plan.columns)

    def ask(columns: Sequence[Column], backend: Backend) -> bool:
        return evaluate(plan, columns, backend, generator, records, clock, lambda text, n: say(text, n, total))

    if server is not None:
        return ask(plan.columns, server), records, identity
    for columns in _by_engine(plan.columns):
        missing = records.missing(plan, columns)
        if not missing:
            continue
        if clock.up:
            return False, records, identity
        say(f"loading {model}", 0, total)
        with open_engine(
            config.engine,
            config.memory,
            config.selection,
            config.indexer.model_copy(update=dict(columns[0].indexer)),
            longest=max(plan.lengths),
            samples=plan.samples,
        ) as llm:
            if max(plan.lengths) > llm.engine.max_model_len:
                raise InvalidRequestError(
                    f"{model} has a context of {llm.engine.max_model_len} tokens, less than --lengths "
                    f"{max(plan.lengths)}: choose shorter ones"
                )
            if not ask(columns, EngineBackend(llm, len(columns))):
                return False, records, identity
    return True, records, identity


def _by_engine(columns: Sequence[Column]) -> list[list[Column]]:
    """Groups of columns that one engine can answer."""
    groups: list[list[Column]] = []
    for column in columns:
        for group in groups:
            if group[0].indexer == column.indexer:
                group.append(column)
                break
        else:
            groups.append([column])
    return groups


def _identity(
    args: argparse.Namespace,
    config: ServeConfig,
    generator: Generator,
    server: HttpBackend | None,
    model: str,
    path: Path,
) -> dict[str, Any]:
    """The settings that the answers depend on."""
    engine = config.engine
    device = pick_device(engine.device)
    local: dict[str, Any] = {
        "device": device.type,
        "dtype": str(pick_dtype(engine.dtype, device)).removeprefix("torch."),
        **engine.model_dump(exclude=NOT_IN_ANSWERS),
        "late_policy": engine.late_policy if "late_policy" in engine.model_fields_set else LATE_POLICY,
        "memory": config.memory.model_dump(include={"cold_dtype"}),
        "selection": config.selection.model_dump(),
        "indexer": config.indexer.model_dump(include={"manifest"}),
        "torch": importlib.metadata.version("torch"),
    }
    return {
        "tasks_version": VERSION,
        "model": model_name(model),
        "prose": args.prose,
        "texts": generator.fingerprint,
        "seed": args.seed,
        "keep_ratio": engine.keep_ratio,
        "over": "engine" if server is None else "http",
        **(local if server is None else {"served": server.model}),
        "transformers": importlib.metadata.version("transformers"),
    }


def _trained_digest(config: ServeConfig, path: Path) -> str | None:
    """Digest of the trained indexer that the column `lookahead` uses; None without one."""
    name, chunk_tokens, model_config = model_name(config.engine.model), config.engine.chunk_tokens, load_config(path)
    architecture = architecture_of(model_config.model_type)
    return architecture.trained_digest(config.indexer, name, model_config, chunk_tokens=chunk_tokens)


def write(summary: Summary, identity: dict[str, Any], out: Path, *, machine: str, complete: bool) -> None:
    """Write one CSV line per cell, and all figures as JSON. ``complete``: no answer is missing."""
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
    """Print the table, the tasks that the model can't do, and each column against full attention."""
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
        f"{column.cells} cells (where it reaches {LEAST_ACCURACY:.0%}); significantly worse: {worse}"
    )
