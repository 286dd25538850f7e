"""Train the Memory Indexer from recorded shards: torch and the shards, no model, no transformers (docs/indexer.md).

Runs in one process or several (`torchrun`). An interrupted training resumes after its last complete epoch.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from forecache.indexer.records.checkpoint import CheckpointManifest, new_indexer, save_checkpoint
from forecache.indexer.records.encoder import EncoderShape, MemoryIndexer
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.shards import RecordedDocument, Recording, ShardError, ShardManifest
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.training.labels import EventSums, LabelRule, WindowLabels, answer_labels, window_labels
from forecache.indexer.training.metrics import coverage, keep_masks, nan_mean, recall
from forecache.indexer.training.train_state import Epoch, resume, save_state
from forecache.indexer.training.training_data import Lesson, predict_rows, usable_rows

FOCAL_GAMMA = 2.0
"""Lin et al., arXiv 1708.02002."""
VALIDATION_EVERY = 8
"""One training document in this many is held out for early stopping."""
VALIDATION_BUDGET = 0.10
VALIDATION_ROW_STRIDE = 4


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training.

    Learning rates fall to zero along a cosine. The exponential moving averages of the weights, over about 1 / (1 -
    ``average_decay``) steps, are evaluated and saved.

    Attributes:
        rows: most predictions of one document in one step.
        leads: each prediction is trained for a lead (steps ahead) drawn from these.
        query_learning_rate: for the queries, which start as the model's own.
        listwise: weight of the ranking loss, added to the focal loss.
        retrieval: part of the ranking loss's target that counts the retrieval heads with any event on a chunk.
        answer: part of that target for the answer's chunks, in windows in which the answer begins.
        patience: training stops after this many epochs without better held-out coverage.
        time_limit_s: training stops after this many seconds; the learning rates reach zero then.
        least_steps: smallest number of recorded steps in a prediction's window.
        bf16: mixed precision.
    """

    epochs: int = 24
    documents_per_step: int = 4
    rows: int = 256
    leads: tuple[int, ...] = (1, 2, 4, 8)
    learning_rate: float = 2e-3
    query_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    clip_norm: float = 1.0
    dropout: float = 0.1
    average_decay: float = 0.99
    listwise: float = 1.0
    retrieval: float = 0.5
    answer: float = 0.5
    patience: int = 5
    time_limit_s: float | None = None
    least_steps: int = 8
    bf16: bool = False
    seed: int = 0


class IndexerLoss(nn.Module):
    """The loss of an indexer over some documents; a module, so that DDP wraps a single forward.

    It is the sum of the focal loss of the golden chunks (the published recipe) and the cross-entropy of the event mass
    over the candidates, which trains the order of the chunks. ``scale`` and ``offset`` map a score, which is a log
    share, to the logit of being golden.
    """

    def __init__(self, indexer: MemoryIndexer, manifest: ShardManifest, rule: LabelRule, config: TrainConfig) -> None:
        super().__init__()
        self.indexer = indexer
        indexer.dropout.p = config.dropout
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.tensor(1.0))
        self._spec = manifest.index_spec
        self._rule = rule
        self.retrieval_rule = replace(rule, heads=manifest.retrieval_numbers)
        self._config = config

    def forward(self, lessons: Sequence[Lesson], rows: Sequence[Tensor], leads: Sequence[Tensor]) -> Tensor:
        """``rows``, ``leads``: int64 [R] of each document, on the host. Returns the mean loss of a prediction."""
        losses = []
        for lesson, at, lead in zip(lessons, rows, leads, strict=True):
            device = lesson.document.records.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self._config.bf16):
                logits = predict_rows(self.indexer, self._spec, lesson.document, at).logits.float()
            losses.append(self.of_logits(logits, lesson, at.to(device), lead.to(device)))
        return torch.cat(losses).mean()

    def prepare(self, document: RecordedDocument, device: torch.device) -> Lesson:
        """The data for training on ``document``, which is on the host, on ``device``."""
        config = self._config
        rows = usable_rows(
            document,
            max(config.leads),
            self._rule,
            least_steps=config.least_steps,
            chunk_tokens=self._spec.chunk_tokens,
            history_steps=self.indexer.shape.history[-1],
        )
        moved = replace(document.to(device), runs=document.runs)
        return Lesson(moved, EventSums.of(moved, self._rule), EventSums.of(moved, self.retrieval_rule), rows)

    def labels(self, lesson: Lesson, rows: Tensor, lead: int | Tensor) -> tuple[WindowLabels, WindowLabels]:
        """Labels by the events of all heads, and by those of the retrieval heads."""
        size, document = self._spec.chunk_tokens, lesson.document
        return (
            window_labels(document, rows, lead, self._rule, chunk_tokens=size, sums=lesson.sums),
            window_labels(document, rows, lead, self.retrieval_rule, chunk_tokens=size, sums=lesson.retrieval_sums),
        )

    def of_logits(self, logits: Tensor, lesson: Lesson, rows: Tensor, lead: int | Tensor) -> Tensor:
        """Loss of each prediction, [R], from its ``logits`` [R, chunks]."""
        labels, retrieved = self.labels(lesson, rows, lead)
        focal = focal_loss(self.scale * logits + self.offset, labels.golden.float())
        focal = (focal * labels.candidates).sum(1) / labels.golden.sum(1).clamp(min=1)
        part = self._config.retrieval
        wanted = (1 - part) * _normalised(labels.event_mass) + part * _normalised(retrieved.heads)
        answers = answer_labels(lesson.document, rows, lead, self._rule, labels.candidates)
        known = self._config.answer * answers.any(1, keepdim=True)
        wanted = (1 - known) * wanted + known * _normalised(answers.float())
        ranked = logits.masked_fill(~labels.candidates, -torch.inf).log_softmax(1).masked_fill(~labels.candidates, 0)
        return focal - self._config.listwise * (wanted * ranked).sum(1)


def _normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(1, keepdim=True).clamp(min=1e-6)


def focal_loss(logits: Tensor, golden: Tensor) -> Tensor:
    """Binary focal loss with γ = :data:`FOCAL_GAMMA`, elementwise, of ``logits`` and labels ``golden`` in [0, 1]."""
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, golden, reduction="none")
    return entropy * (1 - (-entropy).exp()) ** FOCAL_GAMMA


class CosineSchedule:
    """Share of the learning rate at each of ``steps`` steps: linear warmup, then a cosine to zero.

    ``time_limit_s``: the cosine ends after this many seconds of training if that comes before the last step; what the
    indexer learns then depends on the machine's speed. ``spent_s``: seconds of training before this object was created.
    """

    def __init__(self, steps: int, *, warmup_steps: int, time_limit_s: float | None = None, spent_s: float = 0) -> None:
        self._steps = max(steps, 1)
        self._warmup_steps = max(warmup_steps, 1)
        self._time_limit_s = time_limit_s
        self._began_s = time.monotonic() - spent_s

    def share(self, step: int) -> float:
        """Factor of the learning rate at ``step``, counted from 0."""
        done = min(max(step / self._steps, self._time_share()), 1.0)
        return min((step + 1) / self._warmup_steps, 0.5 * (1 + math.cos(math.pi * done)))

    @property
    def time_is_up(self) -> bool:
        return self._time_share() >= 1

    def _time_share(self) -> float:
        if self._time_limit_s is None:
            return 0.0
        return (time.monotonic() - self._began_s) / self._time_limit_s


@dataclass(frozen=True)
class Group:
    """This process's place among those that train together: one alone, or those that torchrun started."""

    rank: int
    size: int
    device: torch.device

    def as_first(self, yes: bool) -> bool:
        """The first process's value of ``yes``, so that all processes stop or continue together."""
        if self.size == 1:
            return yes
        first = torch.tensor(yes, device=self.device)
        torch.distributed.broadcast(first, 0)
        return bool(first)


@contextmanager
def join(device: str) -> Iterator[Group]:
    """Join the processes that torchrun started, if it started this one.

    ``device``: auto, cpu, cuda or cuda:N. With several processes "auto" and "cuda" assign one GPU to each.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not torch.distributed.is_torchelastic_launched():
        yield Group(0, 1, torch.device(kind))
        return
    torch.distributed.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    rank = torch.distributed.get_rank()
    if kind == "cuda":
        kind = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(kind)
    try:
        yield Group(rank, torch.distributed.get_world_size(), torch.device(kind))
    finally:
        torch.distributed.destroy_process_group()


def train(
    data: Path,
    out: Path,
    *,
    config: TrainConfig | None = None,
    shape: EncoderShape | None = None,
    rule: LabelRule | None = None,
    device: str = "auto",
    progress: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train on the recording ``data``, write the best indexer and its manifest to ``out``, return the learning curve.

    After each epoch the state of training is written to ``out`` with the suffix ``.state``. A call with the same
    settings and data resumes from it. ``progress`` is called after every epoch. Raises :class:`ShardError` if ``data``
    has too few documents or too short ones, or if the state is from another training.
    """
    config, shape, rule = config or TrainConfig(), shape or EncoderShape(), rule or LabelRule()
    with join(device) as group:
        return _train(data, out, config, shape, rule, group, progress)


def _train(
    data: Path,
    out: Path,
    config: TrainConfig,
    shape: EncoderShape,
    rule: LabelRule,
    group: Group,
    progress: Callable[[Epoch], None],
) -> list[Epoch]:
    recording = Recording(data)
    numbers = recording.split("train")
    held_out = numbers[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    learned = [number for number in numbers if number not in set(held_out)]
    if not held_out:
        raise ShardError(f"{data} has {len(numbers)} training documents; training needs at least {VALIDATION_EVERY}")
    torch.manual_seed(config.seed)
    loss = IndexerLoss(new_indexer(recording, shape), recording.manifest, rule, config).to(group.device)
    lessons = {number: loss.prepare(recording.document(number), group.device) for number in [*learned, *held_out]}
    for number, lesson in lessons.items():
        if not len(lesson.rows):
            raise ShardError(
                f"document {number} has no step to predict at: none has {shape.history[-1]} recorded steps before it, "
                f"{max(config.leads) + config.least_steps} after it, and enough chunks. Choose a shorter history, or "
                "record longer runs."
            )
    optimizer = _optimizer(loss, config)
    averaged = copy.deepcopy(loss)
    model: nn.Module = loss if group.size == 1 else DistributedDataParallel(loss)
    settings = {"config": asdict(config), "shape": asdict(shape), "rule": asdict(rule)}
    manifest = CheckpointManifest.of(recording.manifest, shape, settings | {"documents": len(learned)})
    state = out.with_suffix(".state")
    # the state of a training on another recording must not be resumed
    identity = settings | {"recording": recording.digest}
    curve, best = resume(state, identity, loss, averaged, optimizer)
    if curve and not out.exists():
        raise ShardError(f"{state} is of a training whose indexer {out} is missing: delete it to start again")
    share = math.ceil(len(learned) / (config.documents_per_step * group.size))
    schedule = CosineSchedule(
        config.epochs * share,
        warmup_steps=config.warmup_steps,
        time_limit_s=config.time_limit_s,
        spent_s=sum(epoch.seconds for epoch in curve),
    )
    for epoch in range(len(curve), config.epochs):
        if curve and (len(curve) - 1 - best >= config.patience or group.as_first(schedule.time_is_up)):
            break
        start = time.monotonic()
        losses = _epoch(model, averaged, optimizer, schedule, share, lessons, learned, config, group, epoch)
        figures = validate(averaged, [lessons[number] for number in held_out], recording.manifest.index_spec, config)
        curve.append(Epoch(epoch, losses, *figures, time.monotonic() - start))
        if len(curve) == 1 or curve[-1].merit > curve[best].merit:
            best = epoch
            if group.rank == 0:
                done = {"epochs": epoch + 1, "held_out": asdict(curve[-1])}
                save_checkpoint(
                    out, averaged.indexer, manifest.model_copy(update={"training": manifest.training | done})
                )
        if group.rank == 0:
            save_state(state, identity, loss, averaged, optimizer, curve, best)
            progress(curve[-1])
    return curve


def _optimizer(loss: IndexerLoss, config: TrainConfig) -> torch.optim.AdamW:
    queries = list(loss.indexer.projection.parameters())
    others = [parameter for name, parameter in loss.named_parameters() if not name.startswith("indexer.projection.")]
    return torch.optim.AdamW(
        [
            # decay would pull the queries towards zero, away from the model's own
            {"params": queries, "lr": config.query_learning_rate, "weight_decay": 0.0},
            {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        ]
    )


def _epoch(
    model: nn.Module,
    averaged: IndexerLoss,
    optimizer: torch.optim.AdamW,
    schedule: CosineSchedule,
    steps: int,
    lessons: dict[int, Lesson],
    learned: list[int],
    config: TrainConfig,
    group: Group,
    epoch: int,
) -> float:
    """One pass over ``learned``; returns the mean loss. Order and draws depend only on the seed and the epoch."""
    model.train()
    torch.manual_seed(hash((config.seed, epoch, group.rank)))  # dropout, independent of where training was interrupted
    rates = [config.query_learning_rate, config.learning_rate]
    order = random.Random(f"{config.seed} {epoch}").sample(learned, len(learned))
    size = config.documents_per_step * group.size
    total = torch.zeros((), device=group.device)
    for step in range(steps):
        # the last step is filled with documents from the beginning, so that every process has the same number
        batch = [order[place % len(order)] for place in range(step * size, (step + 1) * size)][group.rank :: group.size]
        draw = random.Random(f"{config.seed} {epoch} {step} {group.rank}")
        chosen = [lessons[number] for number in batch]
        drawn = [_draw_rows(lesson, config, draw) for lesson in chosen]
        share = schedule.share(epoch * steps + step)
        for settings, rate in zip(optimizer.param_groups, rates, strict=True):
            settings["lr"] = rate * share
        optimizer.zero_grad()
        loss = model(chosen, [rows for rows, _ in drawn], [leads for _, leads in drawn])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        # weights change much in the first steps, so their average forgets faster
        newest = max(1 - config.average_decay, 9 / (10 + epoch * steps + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), newest)
        total += loss.detach()
    return float(total) / steps


def _draw_rows(lesson: Lesson, config: TrainConfig, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Rows to predict at, and the lead of each."""
    picked = sorted(draw.sample(lesson.rows.tolist(), min(config.rows, len(lesson.rows))))
    leads = draw.choices(config.leads, k=len(picked))
    return torch.tensor(picked, dtype=torch.int64), torch.tensor(leads)


@torch.no_grad()
def validate(
    loss: IndexerLoss, lessons: Sequence[Lesson], spec: IndexSpec, config: TrainConfig
) -> tuple[float, float, float, float]:
    """(loss, recall, coverage, retrieval coverage) over held-out documents, at the longest lead and a 10 % budget."""
    loss.eval()
    lead = max(config.leads)
    selection = SelectionConfig()
    losses: list[float] = []
    recalls: list[float] = []
    coverages: list[float] = []
    retrieval: list[float] = []
    for lesson in lessons:
        rows = lesson.rows[::VALIDATION_ROW_STRIDE]
        found = predict_rows(loss.indexer, spec, lesson.document, rows)
        kept = keep_masks(found.logits, found.complete, VALIDATION_BUDGET, selection)
        rows = rows.to(kept.device)
        losses += loss.of_logits(found.logits, lesson, rows, lead).tolist()
        labels, retrieved = loss.labels(lesson, rows, lead)
        recalls += recall(kept, labels).tolist()
        coverages += coverage(kept, labels).tolist()
        retrieval += coverage(kept, retrieved).tolist()
    means = [nan_mean(values) for values in (losses, recalls, coverages, retrieval)]
    loss_mean, recall_mean, coverage_mean, retrieval_mean = (math.nan if mean is None else mean for mean in means)
    return loss_mean, recall_mean, coverage_mean, retrieval_mean
