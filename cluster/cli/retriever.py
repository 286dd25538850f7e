"""`forecache indexer record`, `train` and `eval` for DeepSeek-V4: FlashMemory's retrievers over compressed entries."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

from forecache.workers.errors import ForecacheError

NOT_RECORDED_WITH = ("data", "eval_data", "documents_per_shard", "manifest", "dtype")
NOT_TRAINED_WITH = ("patience", "leads", "query_learning_rate", "label_heads", "retrieval", "answer", "history",
                    "context", "units", "dropout", "reach", "time_limit_s", "bf16")  # fmt: skip
NOT_EVALUATED_WITH = ("lead", "budget")
"""Arguments of the commands that mean nothing for retrievers."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
Errors = Callable[[], AbstractContextManager[None]]


def are_entries(data: Path) -> bool:
    """Whether a directory of recorded data is one of compressed entries."""
    from forecache.indexer.flashmemory.entry_shards import MANIFEST_FILE

    return (data / MANIFEST_FILE).exists()


class RetrieverCommandError(ForecacheError):
    """An argument means nothing for the retrievers of DeepSeek-V4."""


def _refuse(args: argparse.Namespace, unused: Sequence[str]) -> None:
    defaults: argparse.ArgumentParser = args.parser
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name) != defaults.get_default(name)]
    if given:
        raise RetrieverCommandError(
            f"{', '.join(given)}: not for the retrievers of DeepSeek-V4, whose recipe has no such setting: leave it out"
        )


def record(args: argparse.Namespace, progress: Progress, plain_errors: Errors) -> int:
    from forecache.workers.models.backbone import pick_device
    from forecache.workers.models.loader import model_name, resolve_model
    from forecache.workers.models.tokenizer import load_tokenizer
    from forecache.workers.recording.deepseek_v4.record import EntryRecipe, record_entries

    _refuse(args, NOT_RECORDED_WITH)
    named = [field.name for field in fields(EntryRecipe) if field.name in args]
    recipe = EntryRecipe(**{name: getattr(args, name) for name in named})
    path = resolve_model(args.model)
    with progress("recording") as show, plain_errors():
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


def train(args: argparse.Namespace, plain_errors: Errors) -> int:
    from forecache.indexer.flashmemory.train import RetrieverEpoch, RetrieverTrainConfig, train_retrievers
    from forecache.workers.models.backbone import pick_device

    _refuse(args, NOT_TRAINED_WITH)
    given = {field.name: getattr(args, field.name, None) for field in fields(RetrieverTrainConfig)}
    config = RetrieverTrainConfig(**{name: value for name, value in given.items() if value is not None})

    def show(epoch: RetrieverEpoch) -> None:
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, held out recall {epoch.recall:.3f}", flush=True)

    with plain_errors():
        train_retrievers(args.data, args.out, config=config, device=str(pick_device(args.device)), progress=show)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def evaluate(args: argparse.Namespace, plain_errors: Errors) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from forecache.indexer.flashmemory.entry_shards import OWN_FILE, EntryManifest, read_retrievers
    from forecache.indexer.flashmemory.retrievers import Retrievers
    from forecache.indexer.flashmemory.train import BUDGETS, recall_at

    _refuse(args, NOT_EVALUATED_WITH)
    with plain_errors():
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
