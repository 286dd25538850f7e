"""`forecache indexer record`, `train` and `eval`: train a Memory Indexer on a model's attention, and evaluate it.

For DeepSeek-V4 they record and train FlashMemory's retrievers over compressed entries instead.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from forecache.cluster.cli.command_line import above_zero, output_file, output_folder, positive, ratio
from forecache.workers.errors import ForecacheError

NOT_RECORDED_WITH = ("data", "eval_data", "documents_per_shard", "manifest", "dtype")
NOT_TRAINED_WITH = ("patience", "leads", "query_learning_rate", "label_heads", "retrieval", "answer", "history",
                    "context", "units", "dropout", "reach", "time_limit_s", "bf16")  # fmt: skip
NOT_EVALUATED_WITH = ("lead", "budget")
"""Arguments of the commands that the retrievers of DeepSeek-V4 do not use."""


class IndexerCommandError(ForecacheError):
    """An argument, recorded data or a checkpoint is not what the command needs."""


def register(commands: Any) -> None:
    """Add the commands to the subparsers of `forecache indexer`."""
    record = commands.add_parser("record", help="record what a model attends to, as training data for an indexer")
    record.add_argument("--model", required=True, help="built-in name, directory or hub id")
    record.add_argument(
        "--data",
        default="docstrings,code",
        help="texts: docstrings, topics, packages, code, files or directories (not for DeepSeek-V4, which has its own)",
    )
    record.add_argument("--eval-data", default="docstrings,topics", help="texts of the documents for evaluation")
    record.add_argument(
        "--out",
        required=True,
        type=output_folder,
        help="directory to write; the same command continues a stopped recording",
    )
    record.add_argument("--documents", type=positive, default=384, help="documents to train on (default: 384)")
    record.add_argument("--eval-documents", type=int, default=96, help="documents held out (default: 96)")
    record.add_argument("--min-tokens", type=positive, default=2048, help="shortest prompt (default: 2048)")
    record.add_argument("--max-tokens", type=positive, default=8192, help="longest prompt (default: 8192)")
    record.add_argument(
        "--documents-per-shard", type=positive, default=16, help="documents per file, decoded together (default: 16)"
    )
    record.add_argument("--manifest", default="auto", help="manifest of retrieval heads: auto or a file")
    record.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    record.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    record.add_argument("--threads", type=positive, default=None, help="CPU threads (default: all cores)")
    record.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="this is the K-th of N processes that share --out"
    )
    record.add_argument("--seed", type=int, default=0)
    record.set_defaults(command=_record, parser=record)

    train = commands.add_parser("train", help="train an indexer on recorded data; needs no model")
    train.add_argument("--data", required=True, type=Path, help="directory of recorded data")
    train.add_argument(
        "--out", required=True, type=output_file, help="file to write, *.safetensors; also writes .json and .png"
    )
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    train.add_argument("--threads", type=positive, default=None, help="CPU threads (default: all cores)")
    train.add_argument("--epochs", type=positive, default=None, help="largest number of passes over the documents")
    train.add_argument(
        "--patience", type=positive, default=None, help="epochs without improvement before training stops"
    )
    train.add_argument("--leads", default=None, help="steps ahead to predict, drawn from this list, such as 2,4,8,8")
    train.add_argument("--learning-rate", type=float, default=None, help="learning rate of everything but the queries")
    train.add_argument("--query-learning-rate", type=float, default=None, help="learning rate of the queries")
    train.add_argument(
        "--label-heads",
        choices=("all", "indexed", "retrieval"),
        default="all",
        help="heads whose retrieval events become labels",
    )
    train.add_argument(
        "--retrieval", type=float, default=None, help="weight of the retrieval heads alone in the target"
    )
    train.add_argument("--answer", type=float, default=None, help="weight of the answers' chunks in the target")
    train.add_argument("--history", default=None, help="past steps whose queries are used, such as 0,4,8")
    train.add_argument("--context", type=positive, default=None, help="width of the summary of the hidden states")
    train.add_argument("--units", type=positive, default=None, help="width of the network")
    train.add_argument("--dropout", type=float, default=None, help="dropout rate of the network")
    train.add_argument(
        "--reach", type=int, default=None, help="neighbouring chunks on either side that a score depends on"
    )
    train.add_argument("--rows", type=positive, default=None, help="predictions of one document per step")
    train.add_argument(
        "--time-limit-s", type=above_zero, default=None, help="longest training time in seconds (default: no limit)"
    )
    train.add_argument("--bf16", action="store_true", help="mixed precision")
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(command=_train, parser=train)

    evaluate = commands.add_parser("eval", help="compare an indexer with other ways to choose chunks")
    evaluate.add_argument("--data", required=True, type=Path, help="directory of recorded data")
    evaluate.add_argument("--indexer", required=True, type=Path, help="trained indexer, *.safetensors")
    evaluate.add_argument("--out", type=output_file, default=None, help="JSON file of all figures; also writes a PNG")
    evaluate.add_argument("--lead", type=positive, default=8, help="steps ahead, for the printed table (default: 8)")
    evaluate.add_argument(
        "--budget", type=ratio, default=0.10, help="share of chunks kept, for the printed table (default: 0.10)"
    )
    evaluate.add_argument("--threads", type=positive, default=None, help="CPU threads (default: all cores)")
    evaluate.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    evaluate.set_defaults(command=_evaluate, parser=evaluate)


def _record(args: argparse.Namespace) -> int:
    _use_threads(args.threads)
    from forecache.workers.models.backbone import load_config
    from forecache.workers.models.loader import model_name, resolve_model
    from forecache.workers.models.registry import architecture_of
    from forecache.workers.recording.documents import Recipe
    from forecache.workers.recording.record import record

    if architecture_of(load_config(resolve_model(args.model)).model_type).recording == "entries":
        return _record_entries(args)
    recipe = Recipe(
        texts=tuple(args.data.split(",")),
        eval_texts=tuple(args.eval_data.split(",")),
        **{field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)},
    )
    with _progress("recording") as show, _plain_errors():
        record(
            resolve_model(args.model),
            args.out,
            recipe,
            model_name=model_name(args.model),
            manifest=args.manifest,
            device=args.device,
            dtype=args.dtype,
            part=args.part,
            progress=show,
        )
    print(f"{args.out}: {recipe.documents} documents to train on, {recipe.eval_documents} to evaluate on")
    return 0


def _train(args: argparse.Namespace) -> int:
    _use_threads(args.threads)
    if _are_entries(args.data):
        return _train_retrievers(args)
    from forecache.indexer.records.encoder import EncoderShape
    from forecache.indexer.records.shards import ShardManifest
    from forecache.indexer.training.labels import LabelRule
    from forecache.indexer.training.plots import PlotError, plot_curve
    from forecache.indexer.training.train import TrainConfig, train
    from forecache.indexer.training.train_state import Epoch

    given = {field.name: getattr(args, field.name, None) for field in fields(TrainConfig)}
    given["leads"] = None if args.leads is None else _integers(args.leads)
    config = TrainConfig(**{name: value for name, value in given.items() if value is not None})
    shaped = {"context": args.context, "units": args.units, "reach": args.reach}
    shaped["history"] = None if args.history is None else _integers(args.history)
    shape = EncoderShape(**{name: value for name, value in shaped.items() if value is not None})

    def show(epoch: Epoch) -> None:
        print(
            f"epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, held out {epoch.loss:.3f}, recall {epoch.recall:.3f}, "
            f"coverage {epoch.coverage:.3f}, of retrieval heads {epoch.retrieval_coverage:.3f}, {epoch.seconds:.0f} s",
            flush=True,
        )

    with _plain_errors():
        manifest = ShardManifest.load(args.data)
        heads = {"all": None, "indexed": manifest.query_numbers, "retrieval": manifest.retrieval_numbers}
        rule = LabelRule(heads=heads[args.label_heads])
        curve = train(args.data, args.out, config=config, shape=shape, rule=rule, device=args.device, progress=show)
    try:
        plot_curve(args.out.with_suffix(".png"), curve)
    except PlotError as error:
        print(f"note: {error}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if args.out == args.indexer.with_suffix(".json"):
        raise IndexerCommandError(f"{args.out} is the indexer's manifest: choose another name for the figures")
    _use_threads(args.threads)
    if _are_entries(args.data):
        return _evaluate_retrievers(args)
    from rich.console import Console
    from rich.table import Table

    from forecache.indexer.training.evaluate import LEADS, as_records, evaluate, gap_closed, table
    from forecache.indexer.training.metrics import BUDGETS
    from forecache.indexer.training.plots import PlotError, plot_figures

    with _progress("evaluating") as show, _plain_errors():
        figures = evaluate(
            args.data,
            args.indexer,
            leads=sorted({*LEADS, args.lead}),
            budgets=sorted({*BUDGETS, args.budget}),
            device=args.device,
            progress=show,
        )
    console = Console()
    console.print("coverage / coverage of the retrieval heads / recall / answers kept")
    by: Literal["task", "text"]
    for by in ("task", "text"):
        header, *rows = table(figures, lead=args.lead, budget=args.budget, by=by)
        drawn = Table(*header, title=f"{args.lead} steps ahead, {args.budget:.1%} of the chunks, by {by}")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    for name in ("coverage", "retrieval_coverage", "recall", "answer_kept"):
        closed = gap_closed(figures, task="all", text="all", lead=args.lead, budget=args.budget, name=name)
        if closed is not None:
            console.print(f"{name}: {closed:.0%} of the gap between training-free and oracle closed")
    if args.out is not None:
        args.out.write_text(json.dumps(as_records(figures), indent=1) + "\n", encoding="utf-8")
        try:
            plot_figures(args.out.with_suffix(".png"), figures, lead=args.lead)
        except PlotError as error:
            console.print(f"note: {error}")
    return 0


def _are_entries(data: Path) -> bool:
    """Whether the recorded data are DeepSeek-V4's compressed entries."""
    from forecache.indexer.flashmemory.entry_shards import MANIFEST_FILE

    return (data / MANIFEST_FILE).exists()


def _refuse(args: argparse.Namespace, unused: Sequence[str]) -> None:
    defaults: argparse.ArgumentParser = args.parser
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name) != defaults.get_default(name)]
    if given:
        raise IndexerCommandError(f"the retrievers of DeepSeek-V4 have no setting {', '.join(given)}: leave it out")


def _record_entries(args: argparse.Namespace) -> int:
    from forecache.workers.models.backbone import pick_device
    from forecache.workers.models.loader import model_name, resolve_model
    from forecache.workers.models.tokenizer import load_tokenizer
    from forecache.workers.recording.deepseek_v4.record import EntryRecipe, record_entries

    _refuse(args, NOT_RECORDED_WITH)
    named = [field.name for field in fields(EntryRecipe) if field.name in args]
    recipe = EntryRecipe(**{name: getattr(args, name) for name in named})
    path = resolve_model(args.model)
    with _progress("recording") as show, _plain_errors():
        manifest = record_entries(
            path,
            args.out,
            recipe,
            load_tokenizer(path),
            model_name=model_name(args.model),
            device=str(pick_device(args.device)),
            part=args.part,
            progress=show,
        )
    print(f"{args.out}: {manifest.documents} documents to train on, {manifest.eval_documents} to evaluate on")
    return 0


def _train_retrievers(args: argparse.Namespace) -> int:
    from forecache.indexer.flashmemory.train import RetrieverEpoch, RetrieverTrainConfig, train_retrievers
    from forecache.workers.models.backbone import pick_device

    _refuse(args, NOT_TRAINED_WITH)
    given = {field.name: getattr(args, field.name, None) for field in fields(RetrieverTrainConfig)}
    config = RetrieverTrainConfig(**{name: value for name, value in given.items() if value is not None})

    def show(epoch: RetrieverEpoch) -> None:
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, held out recall {epoch.recall:.3f}", flush=True)

    with _plain_errors():
        train_retrievers(args.data, args.out, config=config, device=str(pick_device(args.device)), progress=show)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _evaluate_retrievers(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from forecache.indexer.flashmemory.entry_shards import OWN_FILE, EntryManifest, read_retrievers
    from forecache.indexer.flashmemory.retrievers import Retrievers
    from forecache.indexer.flashmemory.train import BUDGETS, recall_at

    _refuse(args, NOT_EVALUATED_WITH)
    with _plain_errors():
        manifest = EntryManifest.load(args.data)
        files = {"trained": args.indexer, "training-free": args.data / OWN_FILE}
        device = torch.device(args.device)
        retrievers = {name: Retrievers(manifest, read_retrievers(at)).to(device) for name, at in files.items()}
        found = recall_at(args.data, retrievers, device=device)
    drawn = Table("", *(f"{budget:.1%}" for budget in BUDGETS), title="recall of golden entries by share of the chunks")
    for name, recalls in found.items():
        drawn.add_row(name, *(f"{recall:.3f}" for recall in recalls))
    Console().print(drawn)
    if args.out is not None:
        args.out.write_text(json.dumps({"budgets": BUDGETS, "recall": found}, indent=1) + "\n", encoding="utf-8")
    return 0


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _part(text: str) -> tuple[int, int]:
    """``2/4`` → (2, 4): the second of four."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form K/N, such as 2/4")
    return part


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise IndexerCommandError(f"'{text}' is not a list of whole numbers, such as 0,4,8") from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the indexer's errors into errors of a command, which are printed as one line."""
    from forecache.indexer.records.checkpoint import CheckpointError
    from forecache.indexer.records.shards import ShardError

    try:
        yield
    except (CheckpointError, ShardError) as error:
        raise IndexerCommandError(str(error)) from error


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over documents."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, documents: int) -> None:
            progress.update(task, completed=done, total=documents)

        yield show
