"""Train the small DeepSeek-V4 from scratch on retrieval tasks: one command, one seed, some minutes on one GPU.

``python -m forecache.workers.dsv4_train --out DIR --minutes 8``. Three phases share the time, in the order of
DeepSeek-V3.2, §2.1: dense, while sequences grow from 256 tokens to 16K as retrieval is learnt; the Lightning Indexer
alone, by the KL divergence from the attention that it should select; everything, with the indexer's selection.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from forecache.workers import corpus
from forecache.workers.dsv4_documents import KINDS, NUMBER, TEXT, DocumentMaker, batches
from forecache.workers.dsv4_forward import TrainingForward
from forecache.workers.dsv4_model import new_model, save_model, small_config
from forecache.workers.dsv4_tokenizer import build_tokenizer

Phase = Literal["dense", "indexer", "sparse"]
LOG_FILE = "training.jsonl"
ACCURACY_FILE = "accuracy.json"


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``lengths``: of the sequences, one after the other: the next one comes when ``goal`` of the numbers' tokens are
    right, or when the length's part of the dense phase is used up and ``passable`` are. The first may take
    ``first_part`` of that phase. ``dense_part``, ``indexer_part``: of the time; the rest is sparse. ``text_share``: how
    many of the tokens that are no reply count, by ``text_weight``. ``index_queries``: one in so many trains the
    indexer. ``bias_step``: by how much experts' biases move against their load (DeepSeek-V3, §2.1.2).
    """

    minutes: float = 8.0
    tokens_per_step: int = 32_768
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16_384)
    goal: float = 0.85
    passable: float = 0.5
    first_part: float = 0.5
    dense_part: float = 0.65
    indexer_part: float = 0.08
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    warmup_steps: int = 200
    decay_part: float = 0.3
    clip_norm: float = 1.0
    text_share: float = 0.125
    text_weight: float = 0.1
    index_queries: int = 8
    bias_step: float = 1e-3
    checkpoint_s: float = 60.0
    seed: int = 0


class Curriculum:
    """Phase and length by time and accuracy. ``share``: of the time that is over."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._length = torch.zeros((), dtype=torch.int64)
        self._length.share_memory_()  # type: ignore[no-untyped-call]  # loading processes read it
        self._accuracy = 0.0
        self._since_share = 0.0
        self._steps = 0

    @property
    def level(self) -> int:
        return int(self._length)

    def phase(self, share: float) -> Phase:
        if share < self._config.dense_part:
            return "dense"
        return "indexer" if share < self._config.dense_part + self._config.indexer_part else "sparse"

    def draw(self, rng: random.Random) -> int:
        """The length of a batch: mostly the one that is being learnt, sometimes one of before."""
        lengths, level = self._config.lengths, self.level
        return lengths[level if rng.random() < 0.7 else rng.randint(0, level)]

    def observe(self, tokens: int, accuracy: float, share: float) -> None:
        """``accuracy`` of a step of ``tokens`` tokens per sequence."""
        config = self._config
        last = len(config.lengths) - 1
        if tokens != config.lengths[self.level] or self.level == last:
            return
        self._steps += 1
        self._accuracy += (accuracy - self._accuracy) * max(0.05, 1 / self._steps)
        first = config.dense_part * config.first_part
        allotted = first if self.level == 0 else (config.dense_part - first) / last
        overdue = share - self._since_share > allotted and self._accuracy >= config.passable
        if self._steps >= 20 and (self._accuracy >= config.goal or overdue):
            self._length += 1
            self._accuracy, self._steps, self._since_share = 0.0, 0, share


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches, different ones from each loading process."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, curriculum: Curriculum, config: TrainConfig) -> None:
        super().__init__()
        self._maker = DocumentMaker(tokenizer, "docstrings")
        self._curriculum, self._config = curriculum, config

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        rng = random.Random(f"{self._config.seed} {0 if info is None else info.id}")
        made = batches(self._maker, rng, lambda: self._curriculum.draw(rng), self._config.tokens_per_step)
        for ids, roles in made:
            yield torch.from_numpy(ids), torch.from_numpy(roles)


class Trainer:
    """Weights, optimizer and one step."""

    def __init__(self, forward: TrainingForward, config: TrainConfig, device: torch.device) -> None:
        self.forward, self._config, self._device = forward, config, device
        named = list(forward.model.named_parameters())
        self._indexer = [parameter for name, parameter in named if ".indexer." in name]
        matrices = [parameter for _, parameter in named if parameter.dim() > 1]
        vectors = [parameter for _, parameter in named if parameter.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self._generator = torch.Generator(device).manual_seed(config.seed)
        self.steps = 0

    def step(self, ids: Tensor, roles: Tensor, phase: Phase, share: float) -> dict[str, Tensor]:
        """One step; returns its losses and the share of numbers' tokens that were right."""
        ids, roles = ids.to(self._device), roles.to(self._device)
        config = self._config
        rate = config.learning_rate * min(1.0, (self.steps + 1) / config.warmup_steps)
        rate *= min(1.0, max(0.02, (1 - share) / config.decay_part))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        following, targets = roles[:, 1:], ids[:, 1:]
        drawn = torch.rand(following.shape, device=self._device, generator=self._generator)
        positions = None
        if phase != "dense":
            wanted = (following > 1) + drawn
            positions = wanted.topk(max(1, ids.shape[1] // config.index_queries), 1).indices
        losses: dict[str, Tensor] = {}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            output = self.forward(
                ids, sparse=phase == "sparse", index_positions=positions, train_model=phase != "indexer"
            )
            if phase != "indexer":
                chosen = (following > 1) | ((following == TEXT) & (drawn < config.text_share))
                logits = self.forward.logits(output.hidden[:, :-1][chosen]).float()
                target, role = targets[chosen], following[chosen]
                entropy = torch.nn.functional.cross_entropy(logits, target, reduction="none")
                replies = role > 1
                losses["reply"] = entropy[replies].mean()
                losses["text"] = entropy[~replies].mean()
        loss = losses["reply"] + config.text_weight * losses["text"] if losses else torch.zeros((), device=ids.device)
        if output.index_loss is not None:
            losses["index"] = output.index_loss
            loss = loss + output.index_loss
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.forward.parameters(), config.clip_norm)
        self._optimizer.step()
        if phase != "indexer":
            losses["accuracy"] = (logits.argmax(1) == target)[role == NUMBER].float().mean()
            for bias, load in output.expert_loads:
                bias.add_(torch.sign(1 / len(load) - load), alpha=config.bias_step)
        self.steps += 1
        return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def accuracy(
    forward: TrainingForward,
    maker: DocumentMaker,
    config: TrainConfig,
    device: torch.device,
    *,
    samples: int,
    sparse: bool,
) -> dict[str, dict[int, float]]:
    """Share of the numbers asked for that come out right, by kind and length, over prose not trained on.

    Replies are read along with the right tokens before each: a number is right if all its tokens are the likeliest.
    """
    found: dict[str, dict[int, float]] = {}
    for kind in KINDS:
        for tokens in (length for length in config.lengths if length >= 512 or length == max(config.lengths)):
            rng = random.Random(f"eval {kind} {tokens}")
            rows = max(1, config.tokens_per_step // tokens)
            right: list[bool] = []
            while len(right) < samples:
                documents = [maker.document(rng, tokens, kind) for _ in range(min(rows, samples))]
                ids = torch.from_numpy(np.stack([document.ids for document in documents])).to(device)
                roles = torch.from_numpy(np.stack([document.roles for document in documents])).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    hidden = forward(ids, sparse=sparse).hidden
                    numbers = roles[:, 1:] == NUMBER
                    best = forward.logits(hidden[:, :-1][numbers]).argmax(1)
                # three tokens a number
                right += (best == ids[:, 1:][numbers]).view(-1, 3).all(1).tolist()
            found.setdefault(kind, {})[tokens] = sum(right) / len(right)
    return found


def train(config: TrainConfig, out: Path, device: torch.device, *, workers: int, compiled: bool) -> None:
    """Train for ``config.minutes``, write ``out`` every so often and at the end, and print what became of it."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = new_model(small_config(len(tokenizer)), config.seed)
    torch.nn.Module.to(model, device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights / 1e6:.2f} million weights on {device}", flush=True)
    forward = TrainingForward(model, compiled=compiled)
    trainer, curriculum = Trainer(forward, config, device), Curriculum(config)
    loader = DataLoader(
        Batches(tokenizer, curriculum, config),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
    )
    log = (out / LOG_FILE).open("w", encoding="utf-8")
    start = saved = shown = time.monotonic()
    for ids, roles in loader:
        now = time.monotonic()
        share = (now - start) / (60 * config.minutes)
        if share >= 1:
            break
        phase = curriculum.phase(share)
        losses = trainer.step(ids, roles, phase, share)
        values = {name: round(value.item(), 4) for name, value in losses.items()}
        if phase != "indexer" and not math.isnan(values["accuracy"]):
            curriculum.observe(ids.shape[1], values["accuracy"], share)
        line = {
            "step": trainer.steps,
            "seconds": round(now - start, 1),
            "phase": phase,
            "tokens": ids.shape[1],
        } | values
        log.write(json.dumps(line) + "\n")
        if now - shown > 10 or trainer.steps == 1:
            print(json.dumps(line | _memory(device)), flush=True)
            log.flush()
            shown = now
        if now - saved > config.checkpoint_s:
            save_model(model, tokenizer, out)
            saved = now
    log.close()
    del loader
    save_model(model, tokenizer, out)
    _report(forward, tokenizer, config, out, device, trainer.steps)


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"gpu_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1)}


def _report(
    forward: TrainingForward,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainConfig,
    out: Path,
    device: torch.device,
    steps: int,
) -> None:
    """Accuracy with and without selection, printed and written."""
    prose: corpus.Kind = "topics"
    maker = DocumentMaker(tokenizer, prose)
    results: dict[str, Any] = {"steps": steps, "config": asdict(config), "prose": prose}
    for name, sparse in (("sparse", True), ("dense", False)):
        results[name] = accuracy(forward, maker, config, device, samples=64, sparse=sparse)
        for kind, by_length in results[name].items():
            print(name, kind, " ".join(f"{tokens}: {share:.3f}" for tokens, share in by_length.items()), flush=True)
    (out / ACCURACY_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, as transformers reads it")
    parser.add_argument("--minutes", type=float, default=TrainConfig.minutes, help="of training (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-step", type=int, default=TrainConfig.tokens_per_step)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--lengths", type=int, nargs="+", default=TrainConfig.lengths, metavar="TOKENS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="processes that make documents (default: 8)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the pointwise parts")
    args = parser.parse_args()
    config = TrainConfig(
        minutes=args.minutes,
        tokens_per_step=args.tokens_per_step,
        lengths=tuple(args.lengths),
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    torch.set_float32_matmul_precision("high")
    train(config, args.out, torch.device(args.device), workers=args.workers, compiled=args.compile)


if __name__ == "__main__":
    main()
