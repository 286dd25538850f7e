"""The processes that train together: one alone, or those that torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def as_first(self, yes: bool) -> bool:
        """What the first process says: all of them must go on, or end, together."""
        if self.size == 1:
            return yes
        told = torch.tensor(yes, device=self.device)
        torch.distributed.broadcast(told, 0)
        return bool(told)


@contextmanager
def join(device: str) -> Iterator[Group]:
    """``device``: auto, cpu, cuda or cuda:N; with several processes, "auto" and "cuda" give each a GPU of its own."""
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
