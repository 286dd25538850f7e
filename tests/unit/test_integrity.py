"""One flipped bit on each path that reads cold memory: no wrong token results, and nothing wrong is stored.

`docs/integrity.md` lists the paths, the function that verifies each, and the test of each.
"""

import ast
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_llm import checked_llm
from torch import Tensor

from forecache.indexer.serving.config import IndexerConfig
from forecache.kernels.chunks import ops
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.core.sequence import Chunk, TokenSequence
from forecache.workers.engine.chunk_lifecycle import ChunkLifecycle
from forecache.workers.errors import ChunkLostError
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.records import RecordSlots
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.chunk_batch import ChunkBatch, LayerBatch, RecordBatch
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout, Field, attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.completions import PrefixHeld, WrittenBack
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.memory.hot.snapshot_store import SnapshotStore
from forecache.workers.memory.tier.spread import HostedSequences
from forecache.workers.memory.tier.transfer import read, store_batch
from forecache.workers.models.backbone import expected_layout, load_config
from forecache.workers.models.deepseek_v4.step import StreamPast
from forecache.workers.models.step.cold_reads import ColdReads

ROOT = Path(__file__).resolve().parents[2]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]
MOST_STEPS = 3000


@pytest.fixture(scope="module")
def tiny_dsv4(tmp_path_factory: pytest.TempPathFactory, make_deepseek_v4: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("tiny-deepseek-v4")
    make_deepseek_v4(path)
    return path


@dataclass(frozen=True)
class Architecture:
    """A model, with settings by which the past of a prompt of ``tokens`` tokens is read from cold memory."""

    path: Path
    chunk_tokens: int
    tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> list[int]:
        return torch.randint(3, 256, (self.tokens,), generator=torch.Generator().manual_seed(7)).tolist()

    def open(self, device: str = "cpu", *, hot_chunks: int = 4, **settings: Any) -> AbstractContextManager[LLM]:
        config = load_config(self.path)
        nbytes = expected_layout(config, chunk_tokens=self.chunk_tokens, dtype=torch.float32).nbytes
        defaults: dict[str, Any] = {
            "keep_ratio": 1.0,
            "min_resident_tokens": 0,
            "dtype": "float32",
            "chunk_tokens": self.chunk_tokens,
            "max_step_tokens": self.chunk_tokens,
            "cold_bytes": 16 << 20,
            "hot_bytes": hot_chunks * nbytes,
            "threads": 1,
            "device": device,
            "cuda_graphs": False,
        }
        return checked_llm(self.path, **(defaults | self.settings | settings))


@pytest.fixture(params=["dense", "dsv4"])
def architecture(request: pytest.FixtureRequest, tiny_model: Path, tiny_dsv4: Path) -> Architecture:
    if request.param == "dense":
        return Architecture(tiny_model, 16, 600)
    return Architecture(tiny_dsv4, 128, 1300, {"snapshot_tokens": 512})


@dataclass
class Answer:
    """An answer's tokens, their log-probabilities, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    last: TokenEvent | None = None

    def add(self, event: TokenEvent) -> None:
        self.tokens += event.token_ids
        self.logprobs += [told.logprob for told in event.logprobs]
        self.last = event

    def is_that_of(self, other: "Answer") -> bool:
        assert self.last is not None and self.last.finish_reason == "length", self.last
        return self.tokens == other.tokens and self.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def answer(
    llm: LLM, prompt: list[int], meddle: Callable[[LLM], bool] = lambda _: True, *, tokens: int = 10, **cache: Any
) -> Answer:
    """The answer to ``prompt``.

    ``meddle`` is called between steps until it returns true, which must happen.
    """
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0)
    llm.engine.add_request(GenerateRequest("a", tuple(prompt), sampling, CacheOptions(**cache)))
    found, done = Answer(), False
    for _ in range(MOST_STEPS):
        for event in llm.engine.step():
            found.add(event)
        done = done or meddle(llm)
        if found.last is not None and found.last.finish_reason is not None:
            assert done, "the answer was over before anything was damaged"
            llm.engine.flush()
            return found
    raise AssertionError("no progress")


def chunks_of(llm: LLM) -> dict[ChunkKey, Tensor]:
    """The bytes of all stored chunks."""
    llm.engine.flush()
    keys = llm.memory.keys()
    refs = [ref for ref in llm.memory.find(keys) if ref is not None]
    assert len(refs) == len(keys) and all(map(llm.memory.arena.check, refs, keys)), "something stored is damaged"
    return {key: llm.memory.arena.chunks[ref.slot].clone() for key, ref in zip(keys, refs, strict=True)}


def assert_nothing_wrong_is_stored(llm: LLM, clean: dict[ChunkKey, Tensor]) -> None:
    """Check all stored chunks, recomputed ones too, against the expected ones, up to rounding."""
    stored = chunks_of(llm)
    assert stored.keys() == clean.keys()
    for key, chunk in stored.items():
        torch.testing.assert_close(chunk.view(torch.float32), clean[key].view(torch.float32), rtol=1e-3, atol=1e-3)


def cold_chunks(llm: LLM, first: int = 0) -> list[SlotRef]:
    """Slots of request ``a``'s chunks from number ``first`` on that are only in cold memory."""
    seq = llm.engine._sequences["a"]
    cold = [
        c for c in seq.chunks[first:] if llm.engine.pool.lookup(c.key) is None and c.number not in seq.residency.slots
    ]
    return [chunk.ref for chunk in cold if chunk.ref is not None]


def flip(llm: LLM, refs: list[SlotRef]) -> None:
    """Flip one exponent bit of each chunk, at different places."""
    for number, ref in enumerate(refs):
        words = llm.memory.arena.chunks.shape[1] // 4
        llm.memory.arena.chunks[ref.slot, 4 * (number * 97 % (words // 2)) + 3] ^= 0x02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_streamed_past(architecture: Architecture, device: str, phase: str) -> None:
    """Damaged chunks that the sequence wrote itself and streams from the arena: all are dropped, and the answer is
    right."""
    prompt = architecture.prompt
    with architecture.open(device) as llm:
        expected = answer(llm, prompt, policy="full")
        clean = chunks_of(llm)
    flipped: list[SlotRef] = []

    def meddle(llm: LLM) -> bool:
        seq = llm.engine._sequences.get("a")
        if seq is None or seq.num_computed < (len(prompt) * 4 // 5 if phase == "prefill" else len(prompt)):
            return False
        llm.engine.flush()
        flipped.extend(cold_chunks(llm, 1)[:4])
        flip(llm, flipped)
        return True

    with architecture.open(device) as llm:
        assert answer(llm, prompt, meddle, policy="full").is_that_of(expected)
        assert len(flipped) > 1
        assert llm.engine.stats().counters.lost_chunks == llm.memory.stats().dropped_chunks == len(flipped)
        assert_nothing_wrong_is_stored(llm, clean)
        llm.engine.pool.evict_all()
        assert answer(llm, prompt, policy="full").is_that_of(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_streamed_prefix(architecture: Architecture, device: str) -> None:
    """Chunks of an earlier request are damaged after the search has found them; also for DeepSeek-V4."""
    prompt = architecture.prompt
    with architecture.open(device) as llm:
        expected = answer(llm, prompt, policy="full")
        clean = chunks_of(llm)
        llm.engine.pool.evict_all()
        flipped: list[SlotRef] = []

        def meddle(llm: LLM) -> bool:
            seq = llm.engine._sequences.get("a")
            if seq is None or not seq.chunks:
                return False
            flipped.extend(cold_chunks(llm)[1:4])
            flip(llm, flipped)
            return True

        again = answer(llm, prompt, meddle, policy="full")
        assert again.is_that_of(expected) and len(flipped) == 3
        assert llm.engine.stats().counters.lost_chunks == llm.memory.stats().dropped_chunks == len(flipped)
        assert_nothing_wrong_is_stored(llm, clean)


@pytest.mark.parametrize("device", DEVICES)
def test_prefix_search(architecture: Architecture, device: str) -> None:
    """A prefix with several damaged chunks: all of them are dropped, and hot copies of later ones stay."""
    prompt = architecture.prompt
    with architecture.open(device, hot_chunks=64) as llm:
        expected = answer(llm, prompt, policy="full")
        clean = chunks_of(llm)
        refs = [ref for ref in llm.memory.find(llm.memory.keys()[1:6]) if ref is not None]
        flip(llm, refs)
        # hot copies are right, and what is stored is not
        assert answer(llm, prompt, policy="full").is_that_of(expected)
        llm.engine.pool.evict_all()
        assert answer(llm, prompt, policy="full").is_that_of(expected)
        assert llm.memory.stats().dropped_chunks == len(refs)
        assert_nothing_wrong_is_stored(llm, clean)


LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
KEYS = [bytes([number]) * 16 for number in range(8)]


def store_of(directory: Path, name: str) -> ArenaStore:
    arena = Arena.create(
        directory, name, layout=LAYOUT, index_nbytes=32, index_fingerprint="index", capacity_bytes=4 << 20
    )
    return ArenaStore(arena)


def batch_of(keys: list[ChunkKey], store: ArenaStore) -> ChunkBatch:
    """Store ``keys``, and return them as ``store`` sends them."""
    places = store.reserve_slots("writer", keys)
    for place in places:
        store.arena.chunks[place.ref.slot] = place.key[0]
        store.arena.seal(place.ref, place.key, store.arena.digests(place.ref.slot))
    store.commit("writer", [(place.key, place.ref) for place in places])
    store.release("writer")
    return read(store, keys)


def damage(store: ArenaStore, key: ChunkKey) -> None:
    (ref,) = store.find([key])
    assert ref is not None
    store.arena.chunks[ref.slot, 5] ^= 4


def test_a_correct_hot_copy_does_not_give_way_to_a_damaged_stored_one(tmp_path: Path) -> None:
    store = store_of(tmp_path, "store")
    pool = HotPool(LAYOUT, 4, torch.device("cpu"))
    slots = [pool.allocate() for _ in range(2)]
    batch_of(KEYS[:2], store)
    damage(store, KEYS[1])
    prefetcher = Prefetcher(pool, store, None)
    for key, slot in zip(KEYS, slots, strict=False):
        assert slot is not None
        pool.memory[slot] = key[0]
        pool.complete(slot, key, dirty=True)
        prefetcher.write_back("hot", key, slot)
    prefetcher.flush()
    done = [news for news in prefetcher.drain() if isinstance(news, WrittenBack)]
    assert [news.written_bytes for news in done] == [0, LAYOUT.nbytes]
    assert read(store, KEYS[:2]).keys == tuple(KEYS[:2]) and store.stats().dropped_chunks == 1
    prefetcher.close()
    store.release("hot")
    store.check_integrity()


def test_a_tier_keeps_what_it_is_sent_instead_of_a_damaged_chunk(tmp_path: Path) -> None:
    store, other = store_of(tmp_path, "store"), store_of(tmp_path, "other")
    sent = batch_of(KEYS, other)
    batch_of(KEYS, store)
    damage(store, KEYS[3])
    assert store_batch(store, sent) == KEYS
    assert read(store, KEYS).keys == tuple(KEYS) and store.stats().dropped_chunks == 1
    store.check_integrity()


def test_a_snapshot_is_stored_instead_of_a_damaged_one(tmp_path: Path) -> None:
    store, states = store_of(tmp_path, "store"), SnapshotStore(pieces=2, every_chunks=1)
    snapshot = torch.arange(2 * LAYOUT.nbytes, dtype=torch.int32).to(torch.uint8)
    states.store(store, "first", KEYS[0], snapshot)
    store.release("first")
    damage(store, states.keys(KEYS[0])[1])
    states.store(store, "second", KEYS[0], snapshot)
    store.release("second")
    _, refs = states.find(store, "third", KEYS[:1])
    loaded = states.load(store.arena, KEYS[0], refs)
    assert loaded is not None and torch.equal(loaded, snapshot)


def test_held_for_another_node(tmp_path: Path) -> None:
    store = store_of(tmp_path, "store")
    hosted = HostedSequences(store, LAYOUT, lambda _holder, _keys: 0)
    batch_of(KEYS[:3], store)
    damage(store, KEYS[1])
    assert hosted.hold("far", KEYS[:3]).keys == (KEYS[0], KEYS[2])
    assert store.stats().dropped_chunks == 1
    hosted.release_all(["far"])
    store.check_integrity()


@pytest.mark.parametrize("first", [True, False], ids=["at the first layer", "later"])
def test_layer_for_another_node(tmp_path: Path, first: bool) -> None:
    """The chunk is damaged before its first read, or between two of its layers."""
    store = store_of(tmp_path, "store")
    hosted = HostedSequences(store, LAYOUT, lambda _holder, _keys: 0)
    batch_of(KEYS[:3], store)
    hosted.hold("far", KEYS[:3])
    if not first:
        assert hosted.read_layer("far", KEYS[:3], 1).keys == tuple(KEYS[:3])
    damage(store, KEYS[1])  # in the bytes of layer 0
    sent = hosted.read_layer("far", KEYS[:3], 0)
    assert sent.keys == (KEYS[0], KEYS[2]) and sent.is_sound
    assert (sent.rows == np.array([[KEYS[0][0]], [KEYS[2][0]]])).all()
    assert store.stats().dropped_chunks == 1
    assert hosted.read_layer("far", KEYS[:3], 1).keys == (KEYS[0], KEYS[2])
    # the place is given to another chunk
    hosted.release_all(["far"])
    for number in range(store.arena.slots):
        batch_of([bytes([200, number % 256, number // 256]) + bytes(13)], store)
    batch_of(KEYS[:1], store)
    assert hosted.read_layer("far", KEYS[:3], 0).keys == (KEYS[0],)


def test_layer_that_is_damaged_on_its_way() -> None:
    pytest.importorskip("ray", reason="layers come from other nodes through Ray")
    from forecache.workers.memory.client.peers import PendingRows

    sent = LayerBatch.sealed((KEYS[0],), np.full((1, LAYOUT.layer_nbytes), 7, np.uint8))
    sent.rows[0, 9] ^= 1

    class Peers:
        """Another tier whose answer is damaged in transit."""

        def wait(self, tier_id: str, ref: object, timeout_s: float) -> LayerBatch:
            return sent

    peers: Any = Peers()
    with pytest.raises(ChunkLostError, match="came damaged"):
        PendingRows(peers, KEYS[:1], [("tier", None)]).result()


@pytest.mark.parametrize("device", DEVICES)
def test_index_records(architecture: Architecture, device: str) -> None:
    """Records are damaged while they choose an answer's sets: their chunks are dropped, and so is the choice."""
    settings: dict[str, Any] = {"hot_chunks": 48, "keep_ratio": 0.3, "late_policy": "wait", "window_steps": 8}
    settings["indexer"] = IndexerConfig(device_bytes=0)  # a GPU reads the arena at each prediction too
    with architecture.open(device, **settings) as llm:
        expected = answer(llm, architecture.prompt, tokens=40)
        flipped: list[SlotRef] = []

    def meddle(llm: LLM) -> bool:
        seq = llm.engine._sequences.get("a")
        if seq is None or seq.residency.decode_steps < 10:
            return False
        flipped.extend(chunk.ref for chunk in seq.chunks[1:3] if chunk.ref is not None)
        for ref in flipped:
            llm.memory.arena.index[ref.slot, 5] ^= 0x08
        return True

    with architecture.open(device, **settings) as llm:
        assert answer(llm, architecture.prompt, meddle, tokens=40).is_that_of(expected)
        assert len(flipped) == 2
        assert llm.engine.stats().counters.lost_chunks == llm.memory.stats().dropped_chunks == len(flipped)


def test_record_of_a_chunk_on_another_node(tmp_path: Path) -> None:
    arena = Arena.create(
        tmp_path,
        "records",
        layout=LAYOUT,
        index_nbytes=32,
        index_fingerprint="index",
        capacity_bytes=4 << 20,
        record_bytes=4096,
    )
    records, sent = RecordSlots(arena), batch_of(KEYS[:3], store_of(tmp_path, "store"))
    came = RecordBatch.of(sent)
    (ref,) = records.put("near", RecordBatch(came.keys[:1], came.index[:1], came.checksums[:1]))
    assert ref is not None and arena.check(ref, KEYS[0])
    arena.index[ref.slot, 3] ^= 1
    slots, generations = np.array([ref.slot]), np.array([ref.generation])
    assert not arena.check(ref, KEYS[0]) and not arena.sound_records(slots, generations)[0]
    assert records.put("near", RecordBatch(came.keys[:1], came.index[:1], came.checksums[:1])) == [ref]
    assert arena.check(ref, KEYS[0]) and arena.sound_records(slots, generations)[0]
    assert not arena.sound_records(slots, generations + 1)[0]
    came.index[1, 7] ^= 1
    assert came.sound().keys == (KEYS[0], KEYS[2])


def test_entries_of_a_prefix(tiny_dsv4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks are damaged after the search has compared them, and before their HCA entries are copied."""
    architecture = Architecture(tiny_dsv4, 128, 1300, {"snapshot_tokens": 512})
    located, flips = ChunkLifecycle.located, 0
    with architecture.open(hot_chunks=16) as llm:
        expected = answer(llm, architecture.prompt)
        clean = chunks_of(llm)
        llm.engine.pool.evict_all()

        def damaged_now(self: ChunkLifecycle, held: PrefixHeld) -> TokenSequence | None:
            nonlocal flips
            if not flips and held.refs:
                flips = 1
                flip(llm, list(held.refs[1:2]))
            return located(self, held)

        monkeypatch.setattr(ChunkLifecycle, "located", damaged_now)
        assert answer(llm, architecture.prompt).is_that_of(expected)
        assert flips == llm.memory.stats().dropped_chunks == 1
        assert llm.engine.stats().counters.lost_chunks == 0, "found before anything was computed with it"
        assert_nothing_wrong_is_stored(llm, clean)


def test_the_parts_that_layers_read_add_up_to_the_checksum_of_a_chunk() -> None:
    """As on a GPU, where each read adds to a checksum: DeepSeek-V4's layers, and the field that no layer reads."""
    fields = tuple(
        Field(name, shape, torch.bfloat16)
        for name, shape in (("entries", (3, 8, 20)), ("index", (3, 8, 4)), ("hca", (2, 1, 20)))
    )
    layout = ChunkLayout("m", 32, fields)
    memory = torch.zeros(4, layout.nbytes, dtype=torch.uint8)
    for name in ("entries", "index", "hca"):
        view = layout.view(memory, name)
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(3)))
    chunks = [Chunk(number, bytes(16), SlotRef(slot, 1), True) for number, slot in enumerate((2, 0))]
    reads = ColdReads.of("a", chunks, torch.zeros(2, dtype=torch.int64))
    nothing = torch.zeros(0, dtype=torch.int64)
    past = StreamPast(nothing, nothing, torch.tensor([2, 0]), torch.tensor([0, 1]), nothing, reads)
    for name in ("entries", "index"):
        cold = layout.view(memory, name)
        for number in range(3):
            read_past = past.gather(torch.zeros_like(cold[:1]), cold, number)
            assert torch.equal(read_past, cold[[2, 0], number].flatten(0, 1))
    past.read_to_verify(layout.view(memory, "hca"))
    assert reads.sums is not None and torch.equal(reads.sums, ops.slot_checksums(memory, torch.tensor([2, 0])))


def listed_readers() -> list[list[str]]:
    """The rows of the page's table "Readers"."""
    text = (ROOT / "docs" / "integrity.md").read_text(encoding="utf-8")
    section = text.partition("## Readers")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert len(rows) > 10
    return rows[2:]


def functions_of(path: Path) -> set[str]:
    """The names of a module's functions and methods (`Class.method`)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("row", listed_readers(), ids=lambda row: row[0])
def test_what_the_page_names_is_there(row: list[str]) -> None:
    """The functions that read and verify, and the tests that flip a bit there, exist."""
    _, reads, verifies, _, tests = row
    for cell, least in ((reads, 1), (verifies, 1), (tests, 1)):
        named = re.findall(r"`([\w/]+\.py):([\w.]+)`", cell)
        assert len(named) >= least, f"{cell} names no function"
        for file, function in named:
            assert function in functions_of(ROOT / file), f"{file} has no {function}"
