"""State from which an interrupted training resumes: weights, optimiser and learning curve in one safetensors file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forecache.indexer.records.shards import ShardError


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve; held-out figures at a 10 % budget.

    ``coverage`` counts events of all heads, ``retrieval_coverage`` those of the retrieval heads. ``seconds``: time
    that this epoch took.
    """

    epoch: int
    train_loss: float
    loss: float
    recall: float
    coverage: float
    retrieval_coverage: float
    seconds: float

    @property
    def merit(self) -> float:
        """The best epoch is the one with the largest merit."""
        return (self.coverage + self.retrieval_coverage) / 2


def save_state(
    path: Path,
    settings: dict[str, Any],
    loss: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.AdamW,
    curve: list[Epoch],
    best: int,
) -> None:
    """Write weights, their averages and the optimiser as safetensors, the rest as JSON in its metadata. Atomic."""
    tensors = {f"model/{name}": tensor for name, tensor in loss.state_dict().items()}
    tensors |= {f"averaged/{name}": tensor for name, tensor in averaged.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    metadata = {"settings": json.dumps(settings), "curve": json.dumps([asdict(e) for e in curve]), "best": str(best)}
    partial = path.with_suffix(".state-partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.rename(path)


def resume(
    path: Path, settings: dict[str, Any], loss: nn.Module, averaged: nn.Module, optimizer: torch.optim.AdamW
) -> tuple[list[Epoch], int]:
    """Load weights and optimiser; return the learning curve and its best epoch, ([], 0) for a new training.

    Raises :class:`ShardError` if the state is from a training with other settings or data.
    """
    if not path.exists():
        return [], 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if metadata.get("settings") != json.dumps(settings):
        raise ShardError(f"{path} is of a training with other settings or data: delete it, or choose another output")
    for prefix, module in (("model/", loss), ("averaged/", averaged)):
        module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, moment = name.split("/")
            state.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return [Epoch(**entry) for entry in json.loads(metadata["curve"])], int(metadata["best"])
