"""Train the small DeepSeek-V4 from scratch on retrieval tasks: one command, one seed, some minutes on one GPU.

``PYTHONPATH=tests/models python -m train_small_deepseek_v4.train --out DIR --minutes 8``.
Three phases share the time, in the order of DeepSeek-V3.2, §2.1: dense, while sequences grow from 128 tokens to 16K as
retrieval is learnt; the Lightning Indexer alone, by the KL divergence from the attention that it should select;
everything, with the indexer's selection.
"""

import argparse
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from train_small_deepseek_v4.model import new_model, save_model, small_config
from train_small_deepseek_v4.tokenizer import build_tokenizer
from train_small_deepseek_v4.trainer import Phase, TrainConfig, Trainer
from transformers import PreTrainedTokenizerFast

from forecache.workers.evaluation import corpus
from forecache.workers.recording.deepseek_v4.documents import KINDS, NUMBER, DocumentMaker, batches
from forecache.workers.recording.deepseek_v4.forward import TrainingForward

LOG_FILE = "training.jsonl"
ACCURACY_FILE = "accuracy.json"
LAST_STEPS = 100
"""Of a phase, over which its losses and accuracy are averaged."""


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


class Progress:
    """Prints a line every ten seconds and one for each phase that is over, and logs every step."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._log = (folder / LOG_FILE).open("w", encoding="utf-8")
        self._device = device
        self._shown = -math.inf
        self._phase: Phase = "dense"
        self._phase_began, self._phase_steps = 0.0, 0
        self._last: deque[dict[str, float]] = deque(maxlen=LAST_STEPS)

    def step(self, number: int, seconds: float, phase: Phase, tokens: int, values: dict[str, float]) -> None:
        if phase != self._phase:
            self._end_phase(seconds)
            self._phase, self._phase_began, self._phase_steps = phase, seconds, 0
        self._phase_steps += 1
        self._last.append(values)
        line = {"step": number, "seconds": round(seconds, 1), "phase": phase, "tokens": tokens} | values
        self._log.write(json.dumps(line) + "\n")
        if seconds - self._shown > 10:
            print(json.dumps(line | self._memory()), flush=True)
            self._log.flush()
            self._shown = seconds

    def close(self, seconds: float) -> None:
        self._end_phase(seconds)
        self._log.close()

    def _end_phase(self, seconds: float) -> None:
        if not self._phase_steps:
            return
        took = seconds - self._phase_began
        names = sorted({name for values in self._last for name in values})
        means = (f"{name} {np.nanmean([v[name] for v in self._last if name in v]):.4f}" for name in names)
        print(
            f"{self._phase}: {self._phase_steps} steps in {took:.0f} s, {took / self._phase_steps * 1e3:.1f} ms each; "
            f"mean of the last {len(self._last)}: {', '.join(means)}",
            flush=True,
        )
        self._last.clear()

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        return {"gpu_gib": round(torch.cuda.max_memory_allocated(self._device) / 2**30, 1)}


@torch.no_grad()
def accuracy(
    forward: TrainingForward,
    maker: DocumentMaker,
    config: TrainConfig,
    device: torch.device,
    *,
    samples: int,
    deadline: float,
) -> dict[str, dict[str, dict[int, float]]]:
    """Share of the numbers asked for that come out right, by "sparse" or "dense", kind and length, over prose not
    trained on; short lengths first, and none that is not begun before ``deadline``, of `time.monotonic`.

    At least ``samples`` documents each. Replies are read along with the right tokens before each: a number is right if
    all its tokens are the likeliest.
    """
    found: dict[str, dict[str, dict[int, float]]] = {"sparse": {}, "dense": {}}
    for tokens in (length for length in config.lengths if length >= 512 or length == max(config.lengths)):
        for kind in KINDS:
            rng = random.Random(f"eval {kind} {tokens}")
            rows = max(1, config.tokens_per_step // tokens)  # as in training: what is compiled is so for one size
            right: dict[str, list[bool]] = {way: [] for way in found}
            while len(right["dense"]) < samples and time.monotonic() < deadline:
                documents = [maker.document(rng, tokens, kind) for _ in range(rows)]
                ids = torch.from_numpy(np.stack([document.ids for document in documents])).to(device)
                roles = torch.from_numpy(np.stack([document.roles for document in documents])).to(device)
                numbers = roles[:, 1:] == NUMBER
                for way, rights in right.items():
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        hidden = forward(ids, sparse=way == "sparse").hidden
                        best = forward.logits(hidden[:, :-1][numbers]).argmax(1)
                    # three tokens a number
                    rights += (best == ids[:, 1:][numbers]).view(-1, 3).all(1).tolist()
            if len(right["dense"]) < samples:
                print(f"time is up: no accuracy of {kind} at {tokens} tokens", flush=True)
                continue
            for way, rights in right.items():
                found[way].setdefault(kind, {})[tokens] = sum(rights) / len(rights)
    return found


def train(
    config: TrainConfig,
    out: Path,
    device: torch.device,
    *,
    workers: int,
    compiled: bool = False,
    graphs: bool = False,
) -> None:
    """Train, report within ``config.minutes`` of now, and write ``out`` every so often and at the end of training."""
    began = time.monotonic()
    deadline = began + 60 * config.minutes
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = new_model(small_config(len(tokenizer)), config.seed)
    torch.nn.Module.to(model, device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights / 1e6:.2f} million weights on {device}", flush=True)
    forward = TrainingForward(model, compiled=compiled)
    trainer, curriculum = Trainer(forward, config, device, graphs=graphs), Curriculum(config)
    loader = DataLoader(
        Batches(tokenizer, curriculum, config),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    progress = Progress(out, device)
    start = saved = time.monotonic()
    available = deadline - start - 60 * config.minutes * config.report_part
    for ids, roles in loader:
        now = time.monotonic()
        share = (now - start) / available if available > 0 else 1.0
        if share >= 1:
            break
        phase = curriculum.phase(share)
        losses = trainer.step(ids, roles, phase, share)
        # read back at once
        values = dict(zip(losses, (round(value, 4) for value in torch.stack([*losses.values()]).tolist()), strict=True))
        if phase != "indexer" and not math.isnan(values["accuracy"]):
            curriculum.observe(ids.shape[1], values["accuracy"], share)
        progress.step(trainer.steps, now - start, phase, ids.shape[1], values)
        if now - saved > config.checkpoint_s:
            save_model(model, tokenizer, out)
            saved = now
    progress.close(time.monotonic() - start)
    del loader
    save_model(model, tokenizer, out)
    _report(forward, tokenizer, config, out, device, trainer.steps, deadline)
    print(f"{trainer.steps} steps, {time.monotonic() - began:.0f} s in all", flush=True)


def _report(
    forward: TrainingForward,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainConfig,
    out: Path,
    device: torch.device,
    steps: int,
    deadline: float,
) -> None:
    """Accuracy with and without selection, printed and written."""
    prose: corpus.Kind = "topics"
    maker = DocumentMaker(tokenizer, prose)
    results: dict[str, Any] = {"steps": steps, "config": asdict(config), "prose": prose}
    results |= accuracy(forward, maker, config, device, samples=32, deadline=deadline)
    for way in ("sparse", "dense"):
        for kind, by_length in results[way].items():
            print(way, kind, " ".join(f"{tokens}: {share:.3f}" for tokens, share in by_length.items()), flush=True)
    (out / ACCURACY_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, as transformers reads it")
    parser.add_argument(
        "--minutes", type=float, default=TrainConfig.minutes, help="from start to end of the report (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-step", type=int, default=TrainConfig.tokens_per_step)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--lengths", type=int, nargs="+", default=TrainConfig.lengths, metavar="TOKENS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="processes that make documents (default: 8)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the pointwise parts")
    parser.add_argument("--cuda-graphs", action="store_true", help="each step as a CUDA graph: launches cost nothing")
    args = parser.parse_args()
    config = TrainConfig(
        minutes=args.minutes,
        tokens_per_step=args.tokens_per_step,
        lengths=tuple(args.lengths),
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    if args.cuda_graphs and device.type != "cuda":
        parser.error(f"--cuda-graphs needs a CUDA device, not {device}")
    train(config, args.out, device, workers=args.workers, compiled=args.compile, graphs=args.cuda_graphs)


if __name__ == "__main__":
    main()
