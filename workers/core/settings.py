"""What a decode worker is told, and the names of the actors of its node."""

from dataclasses import dataclass, field

import torch

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.telemetry import SILENCE, Telemetry
from forecache.workers.core.config import EngineConfig
from forecache.workers.memory.config import MemoryConfig


@dataclass(frozen=True)
class WorkerSettings:
    """All a worker is told. ``run`` names this start of the cluster: its actors and arenas carry it."""

    engine: EngineConfig
    memory: MemoryConfig
    selection: SelectionConfig
    indexer: IndexerConfig
    namespace: str
    run: str
    redis_url: str | None = field(default=None, repr=False)
    telemetry: Telemetry = SILENCE

    def actor_name(self, kind: str, node_id: str) -> str:
        """Name of the ``kind`` ("tier", "indexer0", …) actor of a node, also of the tier's arena."""
        return actor_name(self.run, kind, node_id)

    @property
    def num_gpus(self) -> int:
        """GPUs that Ray should give each worker."""
        return gpus_of_worker(self.engine.device)


def gpus_of_worker(device: str) -> int:
    """GPUs that a worker with this setting of ``device`` takes, on a machine like this one."""
    return int(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def actor_name(run: str, kind: str, node_id: str) -> str:
    return f"{run}-{kind}-{node_id[:16]}"
