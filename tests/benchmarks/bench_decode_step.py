"""Time of one decode step against its floor, on a GPU: (weights + resident K/V bytes) / copy bandwidth.

The model has random weights of a published shape, and the hot pool is filled with random K/V: what is measured is the
engine's step (batch layout, graph replay, attention over resident chunks), not an answer.

    python tests/benchmarks/bench_decode_step.py --out DIR [--context 131072] [--keep-ratio 0.1] [--batch 1 4 8 16 32]
"""

import argparse
import csv
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from harness import SHAPES, copy_bandwidth, machine_facts, now, percentiles, weight_bytes, write_model

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.manifest import RetrievalManifest
from forecache.workers.core.requests import GenerateRequest
from forecache.workers.core.sequence import Chunk, State, TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.dense.runner import ModelRunner
from forecache.workers.models.step.architecture import Backbone

CHUNK_TOKENS = 64
SHAPE = "llama-3.1-8b"
WARM_UP_STEPS = 5


def random_backbone(shape: str) -> tuple[Backbone, IndexSpec]:
    """The shape with random bfloat16 weights on the GPU, and the index keys it would have."""
    with tempfile.TemporaryDirectory() as directory:
        heads = write_model(Path(directory), SHAPES[shape])
        manifest = RetrievalManifest.load(heads)
        backbone = load_backbone(
            Path(directory), load_format="dummy", dtype="bfloat16", device="cuda", chunk_tokens=CHUNK_TOKENS
        )
    spec = IndexSpec.from_manifest(manifest, chunk_tokens=CHUNK_TOKENS, scale=backbone.geometry.scale)
    return backbone, spec


def decoding(backbone: Backbone, pool: HotPool, name: str, context: int, resident: int) -> TokenSequence:
    """A sequence of ``context`` tokens in the middle of a window, ``resident`` of its chunks in the pool."""
    root = root_key(name)
    tokens = tuple(range(1, context + 1))
    seq = TokenSequence(
        GenerateRequest(name, tuple(t % 1000 for t in tokens)),
        holder=name,
        root=root,
        chunk_tokens=CHUNK_TOKENS,
        keep_ratio=0.1,
        policy="lookahead",
    )
    chunks = (context - 32) // CHUNK_TOKENS
    seq.chunks = [Chunk(i, f"{name}{i}".encode(), None, exact=True) for i in range(chunks)]
    seq.num_computed = context - 1
    seq.state = State.DECODE
    for i in range(chunks - resident, chunks):
        slot = pool.allocate()
        assert slot is not None
        seq.residency.slots[i] = slot
    tail = pool.allocate()
    assert tail is not None
    seq.open_slots[chunks] = tail
    return seq


def step_seconds(runner: ModelRunner, plan: Plan, repeat: int) -> list[float]:
    """Times between the ends of steps, each launched before the tokens of the last are read: as the engine does it."""
    ends = []
    running = runner.launch(plan)
    for _ in range(WARM_UP_STEPS + repeat + 1):
        following = runner.launch(plan)
        running.result()
        ends.append(time.perf_counter())
        running = following
    running.result()
    return [after - before for before, after in itertools.pairwise(ends[WARM_UP_STEPS:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the CSV")
    parser.add_argument("--context", type=int, default=131072, help="tokens of each sequence")
    parser.add_argument("--keep-ratio", type=float, default=0.1, help="resident chunks / all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="sequences decoded together")
    parser.add_argument("--repeat", type=int, default=40, help="timed steps")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of the layers")
    args = parser.parse_args()

    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    backbone, spec = random_backbone(SHAPE)
    resident = -(-int(args.context * args.keep_ratio) // CHUNK_TOKENS)
    largest = max(args.batch)
    pool = HotPool(backbone.layout, largest * (resident + 1), backbone.device)
    pool.view("kv").normal_(std=0.5)
    runner = ModelRunner(backbone, pool, None, spec, max_rows=largest)
    sequences = [decoding(backbone, pool, f"s{i}", args.context, resident) for i in range(largest)]
    start = time.perf_counter()
    runner.warm_up(
        max_batch_size=largest,
        max_step_tokens=largest,
        max_chunks=resident + 3,
        cuda_graphs=True,
        torch_compile=not args.no_compile,
    )
    warm_up_s = time.perf_counter() - start
    weights = weight_bytes(backbone.model)
    rows = []
    for batch in args.batch:
        times = step_seconds(runner, Plan(tuple(sequences[:batch]), ()), args.repeat)
        kv_bytes = batch * resident * backbone.layout.nbytes
        floor_s = (weights + kv_bytes) / bandwidth
        p20, p50, p80 = percentiles(times)
        rows.append(
            {
                "shape": f"{SHAPE}, random weights, random K/V",
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
                "torch_compile": not args.no_compile,
                "warm_up_s": round(warm_up_s, 1),
                "date": now(),
                **machine_facts(device),
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
