"""One training step of the small DeepSeek-V4, also as a CUDA graph.

Eager, a step is some thousand small kernels, and a GPU waits for their launches. The step has fixed shapes and no host
syncs, so forward, backward and optimizer are captured together, once for each phase and length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forecache.workers.recording.deepseek_v4.documents import NUMBER, REPLY
from forecache.workers.recording.deepseek_v4.forward import TrainingForward

Phase = Literal["dense", "indexer", "sparse"]
Losses = dict[str, Tensor]
EAGER_STEPS = 3
"""Of each phase and length before its graph: they make the optimizer's state and let libraries choose kernels."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``minutes``: from the start to the end of the report, which has ``report_part`` of them. ``lengths``: of the
    sequences, one after the other: the next one comes when ``goal`` of the numbers' tokens are right, or when the
    length's part of the dense phase is used up and ``passable`` are. The first may take ``first_part`` of that phase.
    ``dense_part``, ``indexer_part``: of the time; the rest is sparse. ``index_queries``: one in so many trains the
    indexer. ``bias_step``: by how much experts' biases move against their load (DeepSeek-V3, §2.1.2).
    """

    minutes: float = 8.0
    report_part: float = 0.08
    tokens_per_step: int = 32_768
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
    goal: float = 0.85
    passable: float = 0.5
    first_part: float = 0.5
    dense_part: float = 0.65
    indexer_part: float = 0.08
    learning_rate: float = 4e-4
    weight_decay: float = 0.02
    warmup_steps: int = 200
    decay_part: float = 0.3
    clip_norm: float = 1.0
    index_queries: int = 8
    bias_step: float = 1e-3
    checkpoint_s: float = 30.0
    seed: int = 0


class Trainer:
    """Weights, optimizer and one step. ``graphs``: CUDA only."""

    def __init__(
        self, forward: TrainingForward, config: TrainConfig, device: torch.device, *, graphs: bool = False
    ) -> None:
        self.forward, self._config, self._device = forward, config, device
        on_gpu = device.type == "cuda"
        parameters = list(forward.model.parameters())
        # a graph reads the rate where it was when captured
        self._rate = torch.tensor(config.learning_rate, device=device) if on_gpu else None
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate if self._rate is None else self._rate,
            betas=(0.9, 0.95),
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._generator = torch.Generator(device).manual_seed(config.seed)
        self._graphs = StepGraphs(self.compute, device) if graphs else None
        self.steps = 0

    @property
    def captured_steps(self) -> int:
        """Graphs that there are."""
        return 0 if self._graphs is None else self._graphs.count

    def step(self, ids: Tensor, roles: Tensor, phase: Phase, share: float) -> Losses:
        """Returns, until the next step, its losses, the ``accuracy`` of numbers' tokens, and ``found``, that of
        their first tokens alone: those need the right fact, while the others may go on by what precedes them.

        ``ids``, ``roles``: int64 and uint8 [batch, tokens]. ``share``: of the time that is over.
        """
        self._set_rate(share)
        ids, roles = ids.to(self._device), roles.to(self._device)
        drawn = torch.rand((len(ids), ids.shape[1] - 1), device=self._device, generator=self._generator)
        run = self.compute if self._graphs is None else self._graphs.run
        losses = run(ids, roles, drawn, phase)
        self.steps += 1
        return losses

    def compute(self, ids: Tensor, roles: Tensor, drawn: Tensor, phase: Phase) -> Losses:
        """A step on the device alone: no shape follows from data, nothing is read back.

        ``drawn``: float32 [batch, tokens - 1] in [0, 1), by which queries are chosen that train the indexer.
        """
        config = self._config
        following, targets = roles[:, 1:], ids[:, 1:]
        positions = None
        if phase != "dense":
            wanted = (following >= REPLY) + drawn
            positions = wanted.topk(max(1, ids.shape[1] // config.index_queries), 1).indices
        losses: Losses = {}
        loss = torch.zeros((), device=ids.device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            output = self.forward(
                ids, sparse=phase == "sparse", index_positions=positions, train_model=phase != "indexer"
            )
            if phase != "indexer":
                logits = self.forward.logits(output.hidden[:, :-1]).float()
                entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                entropy = entropy.view(targets.shape)
                # prose has no part: it would cost a model of two million weights its capacity
                loss = losses["reply"] = _mean(entropy, following >= REPLY, least=1)
                right = (logits.argmax(2) == targets).float()
                losses["accuracy"] = _mean(right, following == NUMBER)
                losses["found"] = _mean(right, (following == NUMBER) & (roles[:, :-1] != NUMBER))
        if output.index_loss is not None:
            losses["index"] = output.index_loss
            loss = loss + output.index_loss
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.forward.parameters(), config.clip_norm)
        self._optimizer.step()
        if phase != "indexer":
            for bias, load in output.expert_loads:
                bias.add_(torch.sign(1 / len(load) - load), alpha=config.bias_step)
        return {name: value.detach() for name, value in losses.items()}

    def _set_rate(self, share: float) -> None:
        config = self._config
        rate = config.learning_rate * min(1.0, (self.steps + 1) / config.warmup_steps)
        rate *= min(1.0, max(0.02, (1 - share) / config.decay_part))
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def _mean(x: Tensor, where: Tensor, least: int = 0) -> Tensor:
    """Over the places in ``where``; of none, NaN, or 0 with ``least`` = 1."""
    return (x * where).sum() / where.sum().clamp(min=least)


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Losses


class StepGraphs:
    """Runs a training step as a CUDA graph: one for each phase and length, in one pool of memory, as no two run at a
    time and what one leaves is read before the next."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor, Phase], Losses], device: torch.device) -> None:
        self._compute = compute
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._eager: dict[tuple[Phase, torch.Size], int] = {}
        self._captured: dict[tuple[Phase, torch.Size], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.refused = ""
        """Why no more graphs are captured: capturing failed, and steps without one are eager."""

    @property
    def count(self) -> int:
        return len(self._captured)

    def run(self, ids: Tensor, roles: Tensor, drawn: Tensor, phase: Phase) -> Losses:
        # eager steps as well: gradients are accumulated on the stream that they were first made on
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._run((ids, roles, drawn), phase)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _run(self, inputs: tuple[Tensor, Tensor, Tensor], phase: Phase) -> Losses:
        kind = phase, inputs[0].shape
        captured = self._captured.get(kind)
        if captured is None and not self.refused and self._eager.get(kind, 0) >= EAGER_STEPS:
            captured = self._capture(inputs, phase)
        if captured is None:
            self._eager[kind] = self._eager.get(kind, 0) + 1
            return self._compute(*inputs, phase)
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor], phase: Phase) -> _Captured | None:
        """Nothing is computed by a capture. None: it can't be done, which is printed once; training goes on without."""
        graph = torch.cuda.CUDAGraph()
        ids, roles, drawn = (tensor.clone() for tensor in inputs)
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = self._compute(ids, roles, drawn, phase)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            self.refused = str(error)
            print(f"no CUDA graph of {phase} steps of {ids.shape[1]} tokens, go on without: {error}", flush=True)
            return None
        captured = _Captured(graph, (ids, roles, drawn), outputs)
        self._captured[phase, ids.shape] = captured
        return captured
