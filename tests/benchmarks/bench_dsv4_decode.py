"""Decode of DeepSeek-V4 on a GPU: a step over all chunks against one over a tenth of them.

The attention has the published dimensions of DeepSeek-V4-Flash; its MoE layers have as many experts as fit
(``--experts`` of 256), all weights are random, and the pool holds random entries: what is measured is the step, not an
answer. A row is one setting: one sequence, or as many as fit the same GPU memory, whose throughput is compared.

    python tests/benchmarks/bench_dsv4_decode.py --out DIR [--contexts 262144 524288 1048576] [--kv-gib 20]
    python tests/benchmarks/bench_dsv4_decode.py --out DIR --tiny      # seconds, on a CPU: does it run at all?
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import append_row, machine_facts, now, percentiles, seconds, weight_bytes
from transformers import DeepseekV4Config

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks
from forecache.workers.core.requests import GenerateRequest
from forecache.workers.core.sequence import Chunk, State, TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.deepseek_v4.runner import DeepseekV4Runner
from forecache.workers.models.deepseek_v4.scorer import entries_spec
from forecache.workers.models.deepseek_v4.shape import CHUNK_TOKENS, DeepseekV4Shape
from forecache.workers.models.step.architecture import Backbone

WARM_UPS = 3
POSITIONS = 1_100_000
WINDOW_STEPS = 64
MOST_ROWS = 96
SHARED = [0, 0, *[4, 128] * 20, 4]
"""Compression of the layers of DeepSeek-V4-Flash: 21 of CSA, 20 of HCA."""


@dataclass(frozen=True)
class Row:
    """One setting. ``kv_gib``: entries, index keys, HCA entries, windows and compressors' inputs on the GPU;
    ``csa_gib``: of them entries and index keys of CSA layers; ``records_gib``: the Memory Indexer's own index keys, if
    they lie there too; ``indexer_ops``: q·k of a token, level 1's share of its window included. ``replay_…``: the
    model's forward as a CUDA graph, 0: none was captured. ``served_p50_ms``: a whole step of the runner with graphs of
    its own, launch to tokens on the host; 0: it could not capture."""

    context: int
    mode: str
    batch: int
    resident_chunks: int
    kv_gib: float
    csa_gib: float
    records_gib: float
    indexer_ops: float
    eager_p50_ms: float
    replay_p20_ms: float
    replay_p50_ms: float
    replay_p80_ms: float
    served_p50_ms: float
    tokens_per_s: float
    note: str
    gpu: str
    torch: str
    transformers: str
    experts: int
    weights_gib: float
    date: str


def config_of(args: argparse.Namespace) -> DeepseekV4Config:
    if args.tiny:
        kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2
        return DeepseekV4Config(
            vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=6, layer_types=kinds,
            num_attention_heads=4, head_dim=32, partial_rotary_factor=0.25, q_lora_rank=32, o_groups=2, o_lora_rank=16,
            num_experts_per_tok=2, n_routed_experts=4, hc_mult=2, sliding_window=64, index_n_heads=16,
            index_head_dim=16, index_topk=24, max_position_embeddings=POSITIONS,
        )  # fmt: skip
    return DeepseekV4Config(
        compress_ratios=SHARED, n_routed_experts=args.experts, num_experts_per_tok=min(6, args.experts),
        max_position_embeddings=POSITIONS,
    )  # fmt: skip


def decoding(runner: DeepseekV4Runner, pool: HotPool, name: str, context: int, resident: int) -> TokenSequence:
    """A sequence of ``context`` tokens in the middle of a window, ``resident`` of its chunks in the pool, the first and
    the last ones."""
    seq = TokenSequence(
        GenerateRequest(name, (1,) * context),
        holder=name,
        root=root_key(name),
        chunk_tokens=CHUNK_TOKENS,
        keep_ratio=0.1,
        policy="lookahead",
    )
    seq.num_computed = context - 2  # completes no entry: three steps of four do not
    chunks = seq.num_computed // CHUNK_TOKENS
    seq.chunks = [Chunk(i, f"{name}-{i}".encode(), None, exact=True) for i in range(chunks)]
    seq.state = State.DECODE
    resident = min(resident, chunks)
    for i in [*range(resident // 2), *range(chunks - (resident - resident // 2), chunks)]:
        slot = pool.allocate()
        assert slot is not None
        seq.residency.slots[i] = slot
    tail = pool.allocate()
    assert tail is not None
    seq.open_slots[chunks] = tail
    states, shape = runner._states, runner._states.shape
    stop, device = chunks * CHUNK_TOKENS, pool.memory.device
    snapshot = torch.zeros(states.snapshot_nbytes, dtype=torch.uint8, device=device)
    entries = stop // shape.hca_rate
    hca = torch.randn(len(shape.hca), entries, shape.head_dim, device=device).to(states.pages.dtype)
    states.restore(seq, stop, snapshot, hca)
    return seq


def graphed(runner: DeepseekV4Runner, plan: Plan) -> tuple[Callable[[], object] | None, str]:
    """The model's forward of ``plan`` and the greedy tokens as a CUDA graph; None and why not."""
    batch, _ = runner._lay_out(plan, lambda: False)

    def forward() -> torch.Tensor:
        output = runner._model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            attention_mask={"none": None},
            use_cache=False,
            logits_to_keep=batch.logits_rows,
            forecache=batch,
        )
        tokens: torch.Tensor = output.logits[0].float().argmax(-1)
        return tokens

    if runner._device.type != "cuda":
        forward()
        return forward, "eager on a CPU"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
    except RuntimeError as error:  # an operator that can't be captured: eager times stand alone, and are marked
        torch.cuda.synchronize()
        return None, f"no graph: {str(error).splitlines()[0][:80]}"
    return graph.replay, "CUDA graph of the forward"


@torch.inference_mode()
def measure(backbone: Backbone, context: int, mode: str, batch: int, args: argparse.Namespace) -> Row:
    """Times of a decode step of ``batch`` sequences of ``context`` tokens."""
    device, shape = backbone.device, DeepseekV4Shape.of(backbone.config)
    spec = entries_spec(backbone.config, CHUNK_TOKENS)
    assert spec is not None
    chunks = context // CHUNK_TOKENS
    resident = chunks if mode == "full" else budget_chunks(chunks, args.keep_ratio, SelectionConfig())
    pool = HotPool(backbone.layout, batch * (resident + 1), device)
    for field in backbone.layout.fields:
        for slots in pool.view(field.name).split(256):
            slots.normal_()
    runner = DeepseekV4Runner(backbone, pool, None, spec, max_rows=batch)
    fixed = runner.fixed_steps([batch], resident + 1)
    sequences = [decoding(runner, pool, f"s{i}", context, resident) for i in range(batch)]
    plan = Plan(tuple(sequences), ())
    for _ in range(WARM_UPS):
        runner.launch(plan).result()
    eager = seconds(lambda: runner.launch(plan).result(), args.repeat, device)
    runner._fixed = fixed
    for _ in range(WARM_UPS):
        runner.launch(plan).result()
    served = seconds(lambda: runner.launch(plan).result(), args.repeat, device) if fixed.count else []
    runner._fixed = None
    replay, note = graphed(runner, plan)
    replays = [] if replay is None else seconds(replay, args.repeat, device)
    p20, p50, p80 = percentiles(replays)
    states = runner._states
    pages = sum(len(line.pages) for line in states._lines.values())
    page = states.pages[0].nbytes
    rings = sum(ring.nbytes for ring in (states.window, states.csa, states.index, states.hca))
    csa = sum(backbone.layout.field(name).nbytes for name in ("entries", "index")) * pool.num_slots
    per_chunk = CHUNK_TOKENS // shape.csa_rate
    entries = (len(sequences[0].block_row())) * per_chunk
    level2 = entries * len(shape.csa) * shape.index_heads
    level1 = 0.0 if mode == "full" else chunks * per_chunk * len(spec.kv_heads) * shape.index_heads / WINDOW_STEPS
    step = p50 or percentiles(eager)[1]
    facts = machine_facts(device)
    gib = float(1 << 30)
    return Row(
        context=context,
        mode=mode,
        batch=batch,
        resident_chunks=resident,
        kv_gib=(pool.memory.nbytes + pages * page + rings) / gib,
        csa_gib=csa / gib,
        records_gib=0.0 if mode == "full" else batch * chunks * spec.nbytes / gib,
        indexer_ops=(level2 + level1),
        eager_p50_ms=percentiles(eager)[1] * 1e3,
        replay_p20_ms=p20 * 1e3,
        replay_p50_ms=p50 * 1e3,
        replay_p80_ms=p80 * 1e3,
        served_p50_ms=percentiles(served)[1] * 1e3,
        tokens_per_s=batch / step,
        note=note,
        gpu=facts["gpu"],
        torch=facts["torch"],
        transformers=facts["transformers"],
        experts=int(backbone.config.n_routed_experts),
        weights_gib=weight_bytes(backbone.model) / gib,
        date=now(),
    )


def fitting(backbone: Backbone, context: int, resident: int, kv_bytes: float) -> int:
    """Sequences of ``context`` tokens, ``resident`` chunks each, that fit ``kv_bytes``, :data:`MOST_ROWS` at most."""
    shape, number = DeepseekV4Shape.of(backbone.config), backbone.dtype.itemsize
    hca = len(shape.hca) * (context // shape.hca_rate) * shape.head_dim * number
    window = len(shape.kinds) * shape.window * shape.head_dim * number
    return max(1, min(MOST_ROWS, int(kv_bytes // ((resident + 1) * backbone.layout.nbytes + hca + window))))


def table(rows: list[Row]) -> list[dict[str, float]]:
    """Of each context LSA against full attention: KV and its CSA part of one sequence, indexer work, throughput."""
    found = []
    for context in sorted({row.context for row in rows}):
        of = {(row.mode, row.batch > 1): row for row in rows if row.context == context}
        full, lsa = of[("full", False)], of[("lsa", False)]
        many, many_lsa = of.get(("full", True), full), of.get(("lsa", True), lsa)
        found.append(
            {
                "context": context,
                "kv_ratio": lsa.kv_gib / full.kv_gib,
                "csa_ratio": lsa.csa_gib / full.csa_gib,
                "indexer_ratio": lsa.indexer_ops / full.indexer_ops,
                "step_full_ms": full.replay_p50_ms or full.eager_p50_ms,
                "step_lsa_ms": lsa.replay_p50_ms or lsa.eager_p50_ms,
                "batch_full": many.batch,
                "batch_lsa": many_lsa.batch,
                "throughput_ratio": many_lsa.tokens_per_s / many.tokens_per_s,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1 << 18, 1 << 19, 1 << 20])
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--kv-gib", type=float, default=20.0, help="GPU memory for KV at which throughput is compared")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--deadline-s", type=float, default=270.0, help="begin no further row after so long")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, on whatever there is")
    args = parser.parse_args()
    start = time.perf_counter()
    kv_bytes = args.kv_gib * (1 << 30)
    if args.tiny:
        args.contexts, args.repeat, kv_bytes = [8192, 16384], 2, 4 << 20
    with tempfile.TemporaryDirectory() as directory:
        config_of(args).save_pretrained(directory)
        backbone = load_backbone(
            Path(directory),
            load_format="dummy",
            dtype="float32" if args.tiny else "bfloat16",
            device="auto" if args.tiny else "cuda",
            chunk_tokens=CHUNK_TOKENS,
        )
    print(f"model after {time.perf_counter() - start:.0f} s", flush=True)
    rows: list[Row] = []
    for context in args.contexts:
        chunks = context // CHUNK_TOKENS
        kept = budget_chunks(chunks, args.keep_ratio, SelectionConfig())
        for mode, batch in (
            ("full", 1),
            ("lsa", 1),
            ("full", fitting(backbone, context, chunks, kv_bytes)),
            ("lsa", fitting(backbone, context, kept, kv_bytes)),
        ):
            if time.perf_counter() - start > args.deadline_s:
                print(f"out of time before {mode} x {batch} at {context}", file=sys.stderr)
                continue
            if any((row.context, row.mode, row.batch) == (context, mode, batch) for row in rows):
                continue
            row = measure(backbone, context, mode, batch, args)
            rows.append(row)
            append_row(args.out / "dsv4-decode.csv", row)
            print(
                f"{context:8} {mode:4} x {batch:2}: {row.replay_p50_ms or row.eager_p50_ms:8.1f} ms "
                f"(eager {row.eager_p50_ms:.1f}, served {row.served_p50_ms:.1f}), "
                f"{row.tokens_per_s:8.1f} tokens/s, KV {row.kv_gib:.3f} GiB, "
                f"CSA {row.csa_gib:.3f} GiB; {row.note}",
                flush=True,
            )
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
    measured = {row.context for row in rows if row.mode == "full"} & {row.context for row in rows if row.mode == "lsa"}
    summary = table([row for row in rows if row.context in measured])
    (args.out / "dsv4-decode.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "lsa_over_full": summary}, indent=1) + "\n"
    )
    for line in summary:
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()))


if __name__ == "__main__":
    main()
