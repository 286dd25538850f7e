"""Synthetic long prompts (stored chunks of random K/V), and synthetic predictions with a given turnover."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from forecache.indexer.records.index_spec import IndexSpec, encode_chunk
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.indexer.serving.selection import budget_chunks, recency_chunks
from forecache.kernels.chunks import ops
from forecache.workers.llm import LLM
from forecache.workers.memory.format.keys import ChunkKey, prefix_keys, root_key
from forecache.workers.memory.format.layout import ChunkLayout, chunk_fingerprint
from forecache.workers.memory.format.slots import Reservation

BATCH_CHUNKS = 256
KV_STD = 0.5


@dataclass(frozen=True)
class Turn:
    """A prediction: of ``scored`` chunks that scores bring in, ``replaced`` are new (``None``: it was not imposed).

    ``asked_s``, ``at_s``: when it was asked for and answered, by `time.perf_counter`.
    """

    sequence_id: str
    asked_s: float
    at_s: float
    scored: int
    replaced: int | None


@dataclass
class _Chosen:
    """Chunks that one sequence was last told to keep, oldest first, and the chunk to take next."""

    chunks: deque[int] = field(default_factory=deque)
    cursor: int = 0


class SyntheticIndexer:
    """Requests every prediction from ``inner``, at its real cost, and returns another one.

    With ``turnover`` 0.2, a fifth of the chunks chosen by score (the resident set without sinks and recency) is
    new in every set, those absent longest first, so that they are cold. A sequence's first prediction has the true
    scores. With ``turnover`` ``None`` all predictions are those of ``inner``.
    """

    def __init__(self, inner: Indexer, keep_ratio: float, selection: SelectionConfig) -> None:
        self.turnover: float | None = None
        self.turns: list[Turn] = []
        self._inner = inner
        self._keep_ratio = keep_ratio
        self._selection = selection
        self._chosen: dict[str, _Chosen] = {}
        self._lock = threading.Lock()

    def impose(self, turnover: float | None) -> None:
        """Begin anew: sequences seen before are forgotten."""
        with self._lock:
            self.turnover = turnover
            self.turns = []
            self._chosen.clear()

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        answer: Future[Prediction] = Future()
        asked_s = time.perf_counter()
        answer.set_running_or_notify_cancel()

        def settle(asked: Future[Prediction]) -> None:
            error = CancelledError() if asked.cancelled() else asked.exception()
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(self._imposed(asked.result(), asked_s))

        self._inner.predict(request).add_done_callback(settle)
        return answer

    def close(self) -> None:
        self._inner.close()

    def _imposed(self, prediction: Prediction, asked_s: float) -> Prediction:
        """The answer to give for ``prediction``; it is noted in ``turns``."""
        sequence_id = prediction.sequence_id
        chunks = len(prediction.scores)
        scored = scored_chunks(chunks, self._keep_ratio, self._selection)
        recency = recency_chunks(budget_chunks(chunks, self._keep_ratio, self._selection), self._selection)
        candidates = range(self._selection.sink_chunks, chunks - recency)
        with self._lock:
            if self.turnover is None:
                self.turns.append(Turn(sequence_id, asked_s, time.perf_counter(), scored, None))
                return prediction
            chosen = self._chosen.get(sequence_id)
            if chosen is None:
                chosen = self._chosen[sequence_id] = _Chosen(cursor=candidates.start)
                order = np.argsort(prediction.scores[candidates.start : candidates.stop], kind="stable")
                chosen.chunks.extend((order[::-1][:scored] + candidates.start).tolist())
                replaced = 0
            else:
                replaced = _turn(chosen, candidates, scored, self.turnover)
            self.turns.append(Turn(sequence_id, asked_s, time.perf_counter(), scored, replaced))
            scores = np.zeros(chunks, dtype=np.float32)
            scores[list(chosen.chunks)] = len(self.turns)  # above those before: a first window keeps its largest
            return Prediction(sequence_id, scores)


def scored_chunks(chunks: int, keep_ratio: float, selection: SelectionConfig) -> int:
    """How many of a sequence's resident chunks scores bring in: its budget without sinks and recency."""
    budget = budget_chunks(chunks, keep_ratio, selection)
    return budget - selection.sink_chunks - recency_chunks(budget, selection)


def _turn(chosen: _Chosen, candidates: range, scored: int, turnover: float) -> int:
    """Replace a share of ``chosen`` by the ``candidates`` that come next, round and round. Returns how many."""
    before = set(chosen.chunks)
    replaced = min(round(turnover * len(before)), len(candidates) - len(before))
    for _ in range(replaced):
        chosen.chunks.popleft()
    while len(chosen.chunks) < scored and len(before) < len(candidates):
        if chosen.cursor >= candidates.stop:
            chosen.cursor = candidates.start
        if chosen.cursor not in before:
            before.add(chosen.cursor)
            chosen.chunks.append(chosen.cursor)
        chosen.cursor += 1
    return replaced


@dataclass(frozen=True)
class Template:
    """A chunk of random K/V as cold memory has it, its index record, and its checksum by `ops.slot_checksums`."""

    chunk: npt.NDArray[np.uint8]
    record: npt.NDArray[np.uint8]
    device_checksum: int


def make_template(layout: ChunkLayout, spec: IndexSpec, seed: int = 0) -> Template:
    """Normal K/V of standard deviation 0.5 in the cold ``layout``, its record by ``spec``."""
    memory = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    kv = layout.view(memory, "kv")
    values = torch.randn(kv.shape, generator=torch.Generator().manual_seed(seed)) * KV_STD
    if kv.dtype.itemsize == 1:
        scale = layout.view(memory, "scale")
        scale.copy_(values.abs().amax(dim=(-1, -2)) / torch.finfo(kv.dtype).max)
        values /= scale[..., None, None]
    kv.copy_(values)
    layers, heads = (torch.tensor(column) for column in zip(*spec.kv_heads, strict=True))
    record = encode_chunk(spec, values[0][layers, 0, heads])
    checksum = int(ops.slot_checksums(memory, torch.zeros(1, dtype=torch.int64))[0]) % 2**64
    return Template(memory[0].numpy(), record.numpy(), checksum)


def stored_keys(llm: LLM, prompt: Sequence[int]) -> list[ChunkKey]:
    """Keys of the chunks of ``prompt`` that a request with it finds stored: all full ones before its last token."""
    root = root_key(chunk_fingerprint(llm.backbone.layout, llm.cold_layout))
    return list(prefix_keys(root, prompt[:-1], llm.config.chunk_tokens))


def store_prompts(llm: LLM, prompts: Sequence[Sequence[int]], template: Template, threads: int) -> float:
    """Put ``template`` into cold memory as every full chunk of every prompt; returns the seconds it took.

    It goes the way a worker's write-back goes: reserve, write, seal, commit. Chunks that are stored already stay.
    Raises :class:`forecache.workers.errors.OverloadedError` when they don't fit.
    """
    start = time.perf_counter()
    store, arena = llm.memory, llm.memory.arena
    chunks, index = arena.chunks.numpy(), arena.index.numpy()

    def write(place: Reservation) -> None:
        np.copyto(chunks[place.ref.slot], template.chunk)
        np.copyto(index[place.ref.slot], template.record)
        arena.seal(place.ref, place.key, arena.digests(place.ref.slot), template.device_checksum)

    holders = [f"synthetic/{number}" for number in range(len(prompts))]
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="fill") as pool:
            for holder, prompt in zip(holders, prompts, strict=True):
                keys = stored_keys(llm, prompt)
                for first in range(0, len(keys), BATCH_CHUNKS):
                    places = store.reserve_slots(holder, keys[first : first + BATCH_CHUNKS])
                    fresh = [place for place in places if not place.stored]
                    for _ in pool.map(write, fresh):
                        pass
                    store.commit(holder, [(place.key, place.ref) for place in fresh])
    finally:
        for holder in holders:
            store.release(holder)
    return time.perf_counter() - start
