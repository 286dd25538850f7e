"""Time of one decode step by the tokens that each sequence keeps resident: what `--min-resident-tokens` costs.

The K/V is random; the model's weights are real, or random where `--load-format dummy`. The sizes take turns, a few
steps each, so that other load on the machine affects all of them alike.

    python tests/benchmarks/bench_resident_tokens.py --out DIR [--device cuda --model DIR --load-format dummy]
"""

import argparse
import csv
from pathlib import Path

from bench_decode_step import decoding, step_seconds
from harness import machine_facts, now, percentiles

from forecache.indexer.serving.config import IndexerConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.step_plan import Plan
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.backbone import load_backbone, pick_device, pick_dtype
from forecache.workers.models.dense.runner import ModelRunner
from forecache.workers.models.loader import model_name, resolve_model

CHUNK_TOKENS = EngineConfig().chunk_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the CSV")
    parser.add_argument("--model", default="smollm2-135m", help="built-in name or directory")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--resident-tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="sequences decoded together")
    parser.add_argument("--repeat", type=int, default=10, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=4, help="turns of each size")
    args = parser.parse_args()

    device = pick_device(args.device)
    backbone = load_backbone(
        resolve_model(args.model),
        load_format=args.load_format,
        dtype=args.dtype,
        device=args.device,
        chunk_tokens=CHUNK_TOKENS,
    )
    longest, largest = max(args.resident_tokens) // CHUNK_TOKENS, max(args.batch)
    pool = HotPool(backbone.layout, largest * (longest + 1), backbone.device)
    pool.view("kv").normal_(std=0.5)
    scorer = backbone.architecture.choose_scorer(IndexerConfig(), model_name(args.model), backbone)
    runner = ModelRunner(backbone, pool, None, scorer.spec, max_rows=largest)
    if device.type == "cuda":
        runner.warm_up(max_batch_size=largest, max_chunks=longest + 3, cuda_graphs=True, torch_compile=True)
    context = (longest + 1) * CHUNK_TOKENS
    sequences = [decoding(backbone, pool, f"s{number}", context, longest) for number in range(largest)]
    slots = [dict(seq.residency.slots) for seq in sequences]
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(args.turns):
        for tokens in args.resident_tokens:
            for seq, all_slots in zip(sequences, slots, strict=True):
                seq.residency.slots = dict(list(all_slots.items())[-(tokens // CHUNK_TOKENS) :])
                seq.residency.version += 1
            for batch in args.batch:
                times = step_seconds(runner, Plan(tuple(sequences[:batch]), ()), args.repeat)
                found.setdefault((batch, tokens), []).extend(times)
    rows = []
    for (batch, tokens), times in sorted(found.items()):
        p20, p50, p80 = percentiles(times)
        rows.append(
            {
                "model": model_name(args.model),
                "dtype": str(pick_dtype(args.dtype, device)).removeprefix("torch."),
                "batch": batch,
                "resident_tokens": tokens,
                "p20_ms": round(p20 * 1e3, 2),
                "p50_ms": round(p50 * 1e3, 2),
                "p80_ms": round(p80 * 1e3, 2),
                "steps": len(times),
                "date": now(),
                **machine_facts(device),
            }
        )
        print({name: rows[-1][name] for name in ("batch", "resident_tokens", "p20_ms", "p50_ms")}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "resident-tokens.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
