"""Train FlashMemory's retrievers from recorded entries: torch and the recording, no model (docs/indexer.md).

They start as the model's own Lightning Indexers, which predict what the current token attends to, and learn what the
next tokens will attend to. As published: focal loss with γ = 2, AdamW, cosine schedule, gradients clipped at 1.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forecache.indexer.flashmemory.checkpoint import STEPS
from forecache.indexer.flashmemory.entry_shards import (
    OWN_FILE,
    EntryDocument,
    EntryManifest,
    read_document,
    read_retrievers,
)
from forecache.indexer.flashmemory.retrievers import Retrievers, candidates, chunk_recall
from forecache.indexer.records.shards import ShardError
from forecache.indexer.training.train import focal_loss

BUDGETS = (0.05, 0.1, 0.135, 0.2)
VALIDATION_BUDGET = 0.1


@dataclass(frozen=True)
class RetrieverTrainConfig:
    """Settings of training.

    ``rows``: most steps of a document in one training step; ``listwise``: weight of the ranking loss, added to the
    focal loss.
    """

    epochs: int = 16
    rows: int = 48
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    clip_norm: float = 1.0
    listwise: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class RetrieverEpoch:
    """One epoch. ``recall``: share of golden entries of held-out documents found at :data:`VALIDATION_BUDGET`."""

    epoch: int
    loss: float
    recall: float


def train_retrievers(
    data: Path,
    out: Path,
    *,
    config: RetrieverTrainConfig,
    device: str = "cpu",
    progress: Callable[[RetrieverEpoch], None] = lambda epoch: None,
) -> list[RetrieverEpoch]:
    """Train and write the weights with the best held-out recall to ``out``, in the published format.

    Returns the learning curve, whose epoch 0 is the model's own Lightning Indexers. Raises :class:`ShardError` if
    ``data`` contains no recording, or no held-out documents that are long enough.
    """
    manifest = EntryManifest.load(data)
    if not manifest.eval_documents:
        raise ShardError(f"{data} has no held-out documents: record it with --eval-documents")
    torch.manual_seed(config.seed)
    rng, place = random.Random(config.seed), torch.device(device)
    retrievers = Retrievers(manifest, read_retrievers(data / OWN_FILE)).to(place)
    optimizer = torch.optim.AdamW(retrievers.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    documents = [read_document(data, number).to(place) for number in range(manifest.documents)]
    total = config.epochs * len(documents)
    step, best, curve = 0, copy.deepcopy(retrievers.state_dict()), [_held_out(data, retrievers, place, 0, math.nan)]
    if math.isnan(curve[0].recall):
        raise ShardError(f"the held-out documents of {data} are too short to have golden entries: record longer ones")
    progress(curve[0])
    for epoch in range(1, config.epochs + 1):
        losses = []
        for number in rng.sample(range(len(documents)), len(documents)):
            document = documents[number]
            rows = torch.randperm(len(document.positions))[: config.rows].to(place)
            rate = min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            loss = _loss(retrievers, document, rows, config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(retrievers.parameters(), config.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        curve.append(_held_out(data, retrievers, place, epoch, sum(losses) / len(losses)))
        progress(curve[-1])
        if curve[-1].recall >= max(past.recall for past in curve[:-1]):
            best = copy.deepcopy(retrievers.state_dict())
    retrievers.load_state_dict(best)
    save_file(retrievers.export(), out, metadata={STEPS: str(manifest.steps)})
    return curve


def _loss(retrievers: Retrievers, document: EntryDocument, rows: Tensor, config: RetrieverTrainConfig) -> Tensor:
    logits = retrievers.logits(document, rows)
    candidate = candidates(retrievers.manifest, document, rows)
    golden = document.golden(rows.cpu()).to(logits.device) & candidate
    wanted = golden.sum(1)
    focal = (focal_loss(logits, golden.float()) * candidate).sum(1) / wanted.clamp(min=1)
    ranked = logits.masked_fill(~candidate, -1e9).log_softmax(1)
    listwise = -(ranked * golden).sum(1) / wanted.clamp(min=1)
    return (focal + config.listwise * listwise).mean()


def _held_out(data: Path, retrievers: Retrievers, device: torch.device, epoch: int, loss: float) -> RetrieverEpoch:
    found = recall_at(data, {"trained": retrievers}, device=device, budgets=(VALIDATION_BUDGET,))
    return RetrieverEpoch(epoch, loss, found["trained"][0])


@torch.no_grad()
def recall_at(
    data: Path,
    retrievers: dict[str, Retrievers],
    *,
    device: torch.device | None = None,
    budgets: Sequence[float] = BUDGETS,
) -> dict[str, list[float]]:
    """Mean recall of golden entries of the held-out documents at each budget.

    Compares ``retrievers``, by name, with "recency" (the newest chunks), "random", and "oracle" (the chunks with the
    most golden entries).
    """
    manifest, place = EntryManifest.load(data), device or torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    rows_of: dict[str, list[list[Tensor]]] = {}
    for number in range(manifest.documents, manifest.documents + manifest.eval_documents):
        document = read_document(data, number).to(place)
        rows = torch.arange(len(document.positions), device=place)
        candidate = candidates(manifest, document, rows)
        golden = document.golden(rows.cpu()).to(place)
        entries = torch.arange(candidate.shape[1], device=place).float()
        ways = {name: module.logits(document, rows) for name, module in retrievers.items()}
        ways["recency"] = (entries - len(entries)).expand(len(rows), -1)
        ways["random"] = -torch.rand(candidate.shape, generator=generator).to(place) - 1
        ways["oracle"] = golden.float() - 0.5
        for name, logits in ways.items():
            for column, budget in zip(rows_of.setdefault(name, [[] for _ in budgets]), budgets, strict=True):
                column.append(chunk_recall(manifest, logits, golden, candidate, budget).cpu())
    return {name: [float(torch.cat(column).nanmean()) for column in columns] for name, columns in rows_of.items()}
