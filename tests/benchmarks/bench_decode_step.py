"""Time of one decode step against its floor, on a GPU: (weights + resident K/V bytes) / copy bandwidth.

The model has random weights of a published shape, and the hot pool is filled with random K/V: what is measured is the
engine's step (batch layout, graph replay, attention over resident chunks), not an answer.

    python tests/benchmarks/bench_decode_step.py --out DIR [--context 131072] [--keep-ratio 0.1] [--batch 1 4 8 16 32]
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

from forecache.indexer.index_keys import IndexSpec
from forecache.workers.decode.attention import ATTENTION_NAME
from forecache.workers.decode.backbone import Backbone
from forecache.workers.decode.messages import GenerateRequest
from forecache.workers.decode.model_runner import ModelRunner, Plan
from forecache.workers.decode.probe import inspect_attention
from forecache.workers.decode.sequence import Chunk, Sequence
from forecache.workers.memory.hot_pool import HotPool
from forecache.workers.memory.keys import root_key
from forecache.workers.memory.layout import attention_layout

CHUNK_TOKENS = 64
RETRIEVAL_HEADS = [(layer, head) for layer in (8, 12, 16, 20) for head in (3, 17)]
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
)


def random_backbone(config: LlamaConfig) -> Backbone:
    """The shape of ``config`` with random bfloat16 weights on the GPU."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    geometry = inspect_attention(model)
    model.set_attn_implementation(ATTENTION_NAME)
    layout = attention_layout(
        "random",
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        chunk_tokens=CHUNK_TOKENS,
        dtype=torch.bfloat16,
    )
    return Backbone(
        model,
        Path("random"),
        "random",
        geometry,
        layout,
        config.max_position_embeddings,
        torch.device("cuda"),
        torch.bfloat16,
    )


def decoding(backbone: Backbone, pool: HotPool, name: str, context: int, resident: int) -> Sequence:
    """A sequence of ``context`` tokens in the middle of a window, ``resident`` of its chunks in the pool."""
    root = root_key(name)
    tokens = tuple(range(1, context + 1))
    seq = Sequence(
        GenerateRequest(name, tuple(t % 1000 for t in tokens)),
        holder=name,
        root=root,
        chunk_tokens=CHUNK_TOKENS,
        keep_ratio=0.1,
        policy="lookahead",
    )
    chunks = (context - 32) // CHUNK_TOKENS
    seq.chunks = [Chunk(f"{name}{i}".encode(), None, exact=True) for i in range(chunks)]
    seq.num_computed = context - 1
    for i in range(chunks - resident, chunks):
        slot = pool.allocate()
        assert slot is not None
        seq.resident[i] = slot
    tail = pool.allocate()
    assert tail is not None
    seq.open_slots[chunks] = tail
    return seq


def seconds(run: Callable[[], object], repeat: int) -> list[float]:
    """p20, p50 and p80 of ``repeat`` runs, each to the end on the device."""
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    deciles = statistics.quantiles(times, n=10)
    return [deciles[1], statistics.median(times), deciles[7]]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 20)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the CSV")
    parser.add_argument("--context", type=int, default=131072, help="tokens of each sequence")
    parser.add_argument("--keep-ratio", type=float, default=0.1, help="resident chunks / all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="sequences decoded together")
    parser.add_argument("--repeat", type=int, default=40, help="timed steps")
    args = parser.parse_args()

    bandwidth = copy_bandwidth()
    backbone = random_backbone(LLAMA_8B)
    geometry = backbone.geometry
    spec = IndexSpec(
        kind="tokens",
        query_heads=tuple(RETRIEVAL_HEADS),
        kv_heads=tuple((layer, head // 4) for layer, head in RETRIEVAL_HEADS),
        query_to_kv=tuple(range(len(RETRIEVAL_HEADS))),
        head_dim=geometry.head_dim,
        chunk_tokens=CHUNK_TOKENS,
        scale=geometry.scale,
        dtype=torch.int8,
    )
    resident = -(-int(args.context * args.keep_ratio) // CHUNK_TOKENS)
    largest = max(args.batch)
    pool = HotPool(backbone.layout, largest * (resident + 1), backbone.device)
    pool.view("kv").normal_(std=0.5)
    runner = ModelRunner(backbone, pool, None, spec)
    sequences = [decoding(backbone, pool, f"s{i}", args.context, resident) for i in range(largest)]
    start = time.perf_counter()
    runner.capture_graphs(max_batch_size=largest, max_chunks=resident + 3)
    capture_s = time.perf_counter() - start
    embedding = backbone.model.get_input_embeddings().weight
    weight_bytes = sum(p.numel() * p.element_size() for p in backbone.model.parameters()) - embedding.nbytes
    rows = []
    for batch in args.batch:
        plan = Plan(tuple(sequences[:batch]), (), tuple(range(batch)))

        def step(plan: Plan = plan) -> None:
            # as the engine does it: the sampled tokens come back to the host
            runner.run(plan, lambda: False).logits.argmax(-1).tolist()

        for _ in range(5):
            step()
        kv_bytes = batch * resident * backbone.layout.nbytes
        floor_s = (weight_bytes + kv_bytes) / bandwidth
        p20, p50, p80 = seconds(step, args.repeat)
        rows.append(
            {
                "shape": "Llama-3.1-8B, random weights, random K/V",
                "context": args.context,
                "resident_chunks": resident,
                "batch": batch,
                "floor_ms": round(floor_s * 1e3, 3),
                "p20_ms": round(p20 * 1e3, 3),
                "p50_ms": round(p50 * 1e3, 3),
                "p80_ms": round(p80 * 1e3, 3),
                "over_floor": round(p50 / floor_s, 3),
                "tokens_per_s": round(batch / p50, 1),
                "copy_gb_per_s": round(bandwidth / 1e9, 1),
                "capture_s": round(capture_s, 1),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "transformers": transformers.__version__,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        print({k: rows[-1][k] for k in ("batch", "floor_ms", "p50_ms", "over_floor", "tokens_per_s")}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "decode-step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
