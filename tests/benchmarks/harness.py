"""Shared by the benchmarks: shapes of models, facts about the machine, timing, and files of rows."""

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RETRIEVAL_LAYERS = (8, 12, 16, 20)
POSITIONS = 1_100_000
"""Every shape is given this many, so that one model serves all lengths: RoPE costs the same at any of them."""

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen2.5-7b-1m": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        tie_word_embeddings=False,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
    ),
}


def retrieval_heads(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Eight (layer, query head) pairs, all of different KV heads where the shape has as many: those an indexer reads.

    Random weights have no retrieval heads; these stand for them, with the same bytes and the same work.
    """
    layers = [layer for layer in RETRIEVAL_LAYERS if layer < config.num_hidden_layers]
    layers = layers or list(range(config.num_hidden_layers))
    group = config.num_attention_heads // config.num_key_value_heads
    last = config.num_key_value_heads - 1
    return [(layer, head) for layer in layers for head in (0, last * group)]


def write_model(directory: Path, config: PreTrainedConfig) -> Path:
    """A directory to load with ``load_format="dummy"``; returns the path of a retrieval-head manifest in it."""
    config.save_pretrained(directory)
    manifest = directory / "heads.json"
    RetrievalManifest(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        heads=tuple(RetrievalHead(layer=layer, head=head, score=0.0) for layer, head in retrieval_heads(config)),
        calibration=CalibrationRecord(
            documents=0,
            tasks=(),
            min_tokens=0,
            max_tokens=0,
            chunk_tokens=0,
            seed=0,
            events=0.0,
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
            date=now(),
        ),
    ).save(manifest)
    return manifest


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all, but of the input embedding only as much as nothing."""
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = sum(weight.nbytes for weight in model.parameters())
    return weights if output.weight is embedding.weight else weights - int(embedding.weight.nbytes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """Seconds of each of ``repeat`` runs, to the end on the device."""
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(values) < 2:
        return (values[0],) * 3 if len(values) == 1 else (0.0, 0.0, 0.0)
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy within ``device``."""
    nbytes = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / statistics.median(seconds(lambda: target.copy_(source), 20, device))


def host_bandwidth(chunks: torch.Tensor, device: torch.device) -> float:
    """Bytes per second from ``chunks`` (uint8 [slots, nbytes], registered host memory) to ``device``, row by row."""
    count = max(1, min(len(chunks), (1 << 30) // chunks.shape[1]))
    target = torch.empty(count, chunks.shape[1], dtype=torch.uint8, device=device)

    def copy() -> None:
        for row in range(count):
            target[row].copy_(chunks[row], non_blocking=True)

    copy()
    return target.nbytes / statistics.median(seconds(copy, 5, device))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What every row says of where it was measured."""
    triton = "not used"
    if device.type == "cuda":
        import triton as package  # takes a second, and CPU rows do without

        triton = package.__version__
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)",
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
    }


def append_row(path: Path, row: "DataclassInstance") -> None:
    """Add ``row`` to a CSV file at once, so that a crash later loses nothing; the first one brings the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))
