"""Time of predictions, from the request to the last result, compared with the time of reading their index records.

    python tests/benchmarks/bench_indexer.py --out DIR [--contexts 131072] [--sequences 1 8] [--where cpu hbm host]
    python tests/benchmarks/bench_indexer.py --out DIR --checkpoint indexer/checkpoints/smollm2-135m.safetensors

Records are random keys of the heads that an indexer of the shape reads, in a table as large as all sequences need; each
repetition reads other records of it. ``cpu``: `LocalIndexer`; ``hbm``: `CudaIndexer` whose cache holds all of them;
``host``: `CudaIndexer` without a cache, which reads registered host memory. All sequences ask at once. A checkpoint is
asked with random queries of all steps of its history; what making them from hidden states costs is not in it.
"""

import argparse
import dataclasses
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from harness import SHAPES, append_row, copy_bandwidth, host_bandwidth, machine_facts, now, percentiles, write_model

from forecache.indexer.records.checkpoint import load_checkpoint
from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.records.manifest import RetrievalManifest
from forecache.indexer.records.scores import exact_chunk_lse
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import Indexer, PredictRequest, StepState
from forecache.indexer.serving.scorer import LocalIndexer, Read, score
from forecache.workers.memory.hot.cuda_host import RegisteredMemory

CHUNK_TOKENS = 64
CONTEXTS = [8192, 32768, 131072, 262144, 524288, 1048576]
DIFFERENT_CHUNKS = 64
COPY_BYTES = 8 << 20
MIN_REPEAT = 3
SAID = ("where", "context", "sequences", "floor_ms", "p20_ms", "p50_ms", "p80_ms", "over_floor", "largest_error")
"""Columns that are printed as a row is done; all are in the file."""


@dataclass(frozen=True)
class Row:
    """Of ``sequences`` predictions asked at once. ``floor_ms``: their ``index_bytes`` over ``read_gb_per_s`` of the
    memory that they are read from: copies within it (bytes read and written), from the host's into the GPU's for
    ``host``. ``largest_error``: of one sequence's scores, against the CPU's in float32."""

    where: str
    shape: str
    context: int
    sequences: int
    query_heads: int
    record_bytes: int
    index_bytes: int
    read_gb_per_s: float
    floor_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    over_floor: float
    repetitions: int
    graph_chunks: int
    largest_error: float
    threads: int
    date: str
    gpu: str
    torch: str
    triton: str
    transformers: str


class Table:
    """The index part of an arena in which ``slots`` records never change."""

    def __init__(self, spec: IndexSpec, slots: int, lookahead: LookaheadScorer | None = None) -> None:
        self.spec = spec
        self.lookahead = lookahead
        self.index_fingerprint = spec.fingerprint
        memory = np.ndarray((slots, spec.nbytes), np.uint8, mmap.mmap(-1, slots * spec.nbytes))
        self.index = torch.from_numpy(memory)
        keys = torch.randn(min(DIFFERENT_CHUNKS, slots), len(spec.kv_heads), spec.chunk_tokens, spec.head_dim)
        records = encode_chunks(spec, keys)
        for start in range(0, slots, len(records)):
            part = self.index[start : start + len(records)]
            part.copy_(records[: len(part)])
        self._order = np.random.default_rng(0).permutation(slots)

    def sound_records(self, slots: np.ndarray, generations: np.ndarray) -> np.ndarray:
        return np.ones(len(slots), dtype=np.bool_)

    def generation(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return np.ones(len(slots), dtype=np.uint64)

    def request(self, number: int, chunks: int) -> PredictRequest:
        """For ``chunks`` records; requests of consecutive numbers read different ones, as long as there are any."""
        random = np.random.default_rng(number)
        heads = len((self.spec if self.lookahead is None else self.lookahead.spec).query_heads)
        state = None
        if self.lookahead is not None:
            facts = self.lookahead.manifest
            hidden = random.standard_normal((len(facts.target_layers), facts.hidden_size)).astype(np.float16)
            state = StepState((chunks + 1) * self.spec.chunk_tokens - 2, self.lookahead.steps, hidden)
        slots = np.take(self._order, np.arange(number * chunks, (number + 1) * chunks), mode="wrap")
        return PredictRequest(
            sequence_id=str(number),
            arena_path="",
            index_slots=slots,
            generations=np.ones(chunks, dtype=np.int64),
            queries=random.standard_normal((heads, self.spec.head_dim), dtype=np.float32),
            local_lse=np.zeros(heads, dtype=np.float32),
            local_records=np.zeros((0, self.spec.nbytes), dtype=np.uint8),
            state=state,
        )


@contextmanager
def opened(where: str, table: Table, threads: int, graph_chunks: int = 0) -> Iterator[Indexer]:
    indexer: Indexer
    if where == "cpu":
        indexer = LocalIndexer(table.spec, threads, lambda _path: table, table.lookahead)
    else:
        budget = table.index.nbytes if where == "hbm" else 0
        device = torch.device("cuda")
        indexer = CudaIndexer(
            table.spec, table, device, budget, RegisteredMemory, table.lookahead, graph_chunks=graph_chunks
        )
    try:
        if where == "hbm":
            indexer.predict(table.request(0, len(table.index))).result()
        yield indexer
    finally:
        indexer.close()


def read_bandwidth(where: str, table: Table) -> float:
    """Bytes per second of the memory that holds the records, as an indexer at ``where`` reads them."""
    if where != "host":
        return copy_bandwidth(torch.device("cpu" if where == "cpu" else "cuda"))
    together = min(max(1, COPY_BYTES // table.spec.nbytes), len(table.index))
    rows = table.index[: len(table.index) // together * together].view(-1, together * table.spec.nbytes)
    registered = RegisteredMemory(table.index)
    try:
        return host_bandwidth(rows, torch.device("cuda"))
    finally:
        registered.close()


def prediction_seconds(
    indexer: Indexer, table: Table, chunks: int, sequences: int, repeat: int, limit_s: float
) -> list[float]:
    """Seconds until ``sequences`` predictions asked at once are all answered; fewer times when ``limit_s`` is over."""
    times: list[float] = []
    number, begun = 0, time.perf_counter()
    while len(times) < MIN_REPEAT or (len(times) < repeat and time.perf_counter() - begun < limit_s):
        requests = [table.request(number + i, chunks) for i in range(sequences)]
        number += sequences
        start = time.perf_counter()
        for future in [indexer.predict(request) for request in requests]:
            future.result()
        times.append(time.perf_counter() - start)
    return times[1:]  # the first one finds new sizes


def exact_scores(table: Table, request: PredictRequest) -> npt.NDArray[np.float32]:
    """What ``request`` is to be answered, by the CPU in float32."""
    rows = table.spec if table.lookahead is None else table.lookahead.spec
    lse = exact_chunk_lse(rows, table.index, torch.tensor(request.queries), torch.from_numpy(request.index_slots))
    read = Read(request, torch.arange(lse.shape[1]), lse, torch.tensor(request.local_lse))
    return score(table.spec, table.lookahead, [read])[0][0].numpy()


def index_spec(shape: str) -> IndexSpec:
    with tempfile.TemporaryDirectory() as directory:
        manifest = RetrievalManifest.load(write_model(Path(directory), SHAPES[shape]))
    return IndexSpec.from_manifest(manifest, chunk_tokens=CHUNK_TOKENS)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    lookahead = None if args.checkpoint is None else LookaheadScorer(*load_checkpoint(args.checkpoint))
    spec = index_spec(args.shape) if lookahead is None else lookahead.own
    shape = args.shape if lookahead is None else f"{lookahead.manifest.model_name}, trained"
    query_heads = len((spec if lookahead is None else lookahead.spec).query_heads)
    limit = int(args.limit_gib * (1 << 30))
    sizes = [(context, context // CHUNK_TOKENS, count) for context in args.contexts for count in args.sequences]
    fitting = [size for size in sizes if size[1] * size[2] * spec.nbytes <= limit]
    for context, chunks, count in sizes:
        if (context, chunks, count) not in fitting:
            print(f"{count} x {context}: over --limit-gib, not measured", file=sys.stderr, flush=True)
    if not fitting:
        return
    table = Table(spec, max(chunks * count for _, chunks, count in fitting), lookahead)
    expected = {chunks: table.request(0, chunks) for _, chunks, _ in fitting}
    scores = {chunks: exact_scores(table, request) for chunks, request in expected.items()}
    for where in args.where:
        bandwidth = read_bandwidth(where, table)
        with opened(where, table, args.threads, args.graph_chunks) as indexer:
            for context, chunks, count in fitting:
                times = prediction_seconds(indexer, table, chunks, count, args.repeat, args.seconds)
                answer = indexer.predict(expected[chunks]).result().scores
                p20, p50, p80 = (1e3 * value for value in percentiles(times))
                index_bytes = chunks * count * spec.nbytes
                floor_ms = 1e3 * index_bytes / bandwidth
                yield Row(
                    where=where,
                    shape=shape,
                    context=context,
                    sequences=count,
                    query_heads=query_heads,
                    record_bytes=spec.nbytes,
                    index_bytes=index_bytes,
                    read_gb_per_s=round(bandwidth / 1e9, 1),
                    floor_ms=round(floor_ms, 4),
                    p20_ms=round(p20, 3),
                    p50_ms=round(p50, 3),
                    p80_ms=round(p80, 3),
                    over_floor=round(p50 / floor_ms, 2),
                    repetitions=len(times),
                    graph_chunks=args.graph_chunks,
                    largest_error=float(np.abs(answer - scores[chunks]).max()),
                    threads=args.threads,
                    date=now(),
                    **machine_facts(torch.device("cpu" if where == "cpu" else "cuda")),
                )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="directory for indexer.csv")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--checkpoint", type=Path, help="a trained indexer, instead of the heads of a shape")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of each sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 7], help="how many ask at once")
    parser.add_argument(
        "--where", nargs="+", choices=["cpu", "hbm", "host"], default=["hbm", "host", "cpu"] if on_gpu else ["cpu"]
    )
    parser.add_argument("--graph-chunks", type=int, default=8192, help="chunks of the largest CUDA graph; 0: no graphs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the CPU's predictions")
    parser.add_argument("--repeat", type=int, default=30, help="most timed repetitions of a row")
    parser.add_argument("--seconds", type=float, default=2.0, help="repetitions of a row end after this")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="most memory of all records")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for row in measure(args):
        append_row(args.out / "indexer.csv", row)
        rows.append(dataclasses.asdict(row))
        print("  ".join(f"{name} {rows[-1][name]}" for name in SAID), flush=True)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
