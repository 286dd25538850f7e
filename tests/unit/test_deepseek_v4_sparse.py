"""DeepSeek-V4 over partial resident sets: chunk scores, budgets, and the selection of entries within the set."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from forecache.indexer.flashmemory.checkpoint import (
    STEPS,
    FlashMemoryError,
    FlashMemoryIndexer,
    RetrieverShape,
)
from forecache.indexer.records.entry_scores import chunk_scores, entry_logits
from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.workers.llm import LLM
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.models.deepseek_v4.queries import EntryProbe
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape

MakeDeepseekV4 = Callable[..., DeepseekV4ForCausalLM]
CHUNK_BYTES = 37376
SELECTION = SelectionConfig(min_chunks=2, recency_fraction=0.25)
SPEC = IndexSpec(
    kind="entries",
    query_heads=tuple((layer, head) for layer in (1, 3) for head in range(5)),
    kv_heads=((1, 0), (3, 0)),
    query_to_kv=(0,) * 5 + (1,) * 5,
    head_dim=16,
    chunk_tokens=8,
    scale=1.0,
    dtype=torch.int8,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, make_deepseek_v4: MakeDeepseekV4) -> Path:
    directory = tmp_path_factory.mktemp("tiny-deepseek-v4")
    make_deepseek_v4(directory)
    return directory


def open_llm(path: Path, arena_dir: Path, **settings: Any) -> LLM:
    defaults = {"dtype": "float32", "cold_bytes": 32 << 20, "hot_bytes": 2 << 20, "threads": 1, "window_steps": 8}
    defaults["min_resident_tokens"] = 0
    return LLM(str(path), skip_tokenizer=True, arena_dir=arena_dir, selection=SELECTION, **(defaults | settings))


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(2, 256, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()


def naive_scores(keys: Tensor, queries: Tensor, weights: Tensor) -> Tensor:
    """sigmoid(Σ_h w_h relu(q_h · k)), the largest over the layers, in float64: [chunks, entries]."""
    by_layer = []
    for layer in range(2):
        own = slice(5 * layer, 5 * layer + 5)
        products = torch.einsum("hd,ced->hce", queries[own].double(), keys[:, layer].double()).relu()
        by_layer.append((weights[own].double().view(-1, 1, 1) * products).sum(0).sigmoid())
    return torch.stack(by_layer).amax(0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_scores_of_chunks_are_counts_of_entries_above_the_threshold(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = replace(SPEC, dtype=dtype)
    keys, queries, weights = torch.randn(30, 2, 8, 16), torch.randn(10, 16), torch.randn(10) / 10
    records = encode_chunks(spec, keys)
    expected = naive_scores(keys, queries, weights)
    slots = torch.randperm(30)
    logits = entry_logits(spec, records, queries, weights, slots)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits.T.sigmoid().double(), expected[slots], rtol=0, atol=tolerance)
    for threshold in (0.5, 0.7):
        counts = chunk_scores(replace(spec, threshold=threshold), logits).floor()
        above = math.log(threshold / (1 - threshold)) < logits.T
        assert counts.tolist() == above.sum(1).tolist()
    assert len(counts.unique()) > 2


def test_of_equal_counts_the_better_entry_goes_first_and_nothing_is_not_a_number() -> None:
    logits = torch.full((8, 4), -torch.inf)
    logits[0] = torch.tensor([1.0, 30.0, -1.0, -torch.inf])
    scores = chunk_scores(SPEC, logits)
    assert scores.argsort(descending=True).tolist() == [1, 0, 2, 3]
    assert scores.isfinite().all()
    assert scores.floor().tolist() == [1, 1, 0, 0]


def test_the_adaptive_threshold_lets_as_many_pass_wherever_scores_lie() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 40)
    for shift in (0.0, -20.0):
        scores = chunk_scores(replace(SPEC, adaptive_entries=50), logits + shift)
        assert scores.floor().sum() == 50
    assert chunk_scores(SPEC, logits - 20).floor().sum() == 0, "a fixed threshold knows nothing of them"


FREQUENCIES = (1.0, 2.0, 3.0, 4.0)


def save_retrievers(file: Path, layers: tuple[int, ...], heads: int = 6, rank: int = 24, steps: int = 1) -> None:
    torch.manual_seed(2)
    shape = RetrieverShape(hidden=64, heads=heads, head_dim=16, rank=rank, frequencies=FREQUENCIES)
    tensors = {
        f"retrievers.l{layer}.{name}": torch.randn(size) / math.sqrt(size[-1])
        for layer in layers
        for name, size in shape.tensors.items()
    }
    save_file(tensors, file, metadata={STEPS: str(steps)})


def test_resident_sets_stay_within_the_budget_and_answers_differ_from_dense(path: Path, arena_dir: Path) -> None:
    prompt = prompt_of(3500)
    with open_llm(path, arena_dir, keep_ratio=0.3, hot_bytes=11 * CHUNK_BYTES, late_policy="wait") as llm:
        [dense] = llm.generate([prompt], max_tokens=40, ignore_eos=True, keep_ratio=1.0)
        tables = record_tables(llm)
        [sparse] = llm.generate([prompt], max_tokens=40, ignore_eos=True)
        llm.engine.flush()
        llm.engine.check_integrity()
    assert len(tables) >= 39
    assert max(tables) <= 6 + 1, "the budget of 14 chunks, and the open one"
    assert sparse.stats.context_chunks == dense.stats.resident_chunks == 14
    assert sparse.stats.resident_chunks == 7
    assert sparse.stats.recalled_chunks > 0
    assert sparse.stats.keep_ratio == pytest.approx(0.5)
    assert sparse.token_ids != dense.token_ids


def generations(llm: LLM, request: PredictRequest) -> npt.NDArray[np.int64]:
    """The current generations of the request's slots, whose chunks have not moved."""
    now = llm.memory.arena.generation(np.maximum(request.index_slots, 0)).astype(np.int64)
    assert (now == request.generations)[request.index_slots >= 0].all()
    return now


def record_tables(llm: LLM) -> list[int]:
    """Record the lengths of the block tables of decode steps."""
    lengths: list[int] = []
    layout = llm.engine._runner._layout  # type: ignore[attr-defined]
    rows = layout.rows

    def watch(sequences: Any) -> Any:
        lengths.extend(len(seq.block_row()) for seq in sequences)
        return rows(sequences)

    layout.rows = watch
    return lengths


@pytest.mark.parametrize("threshold", ["fixed", "adaptive"])
def test_a_checkpoint_of_retrievers_serves(path: Path, arena_dir: Path, tmp_path: Path, threshold: Any) -> None:
    save_retrievers(tmp_path / "r.safetensors", (0, 2))
    indexer = IndexerConfig(checkpoint=str(tmp_path / "r.safetensors"), threshold=threshold)
    asked: list[tuple[PredictRequest, Future[Prediction]]] = []

    class Watched:
        """The LLM's indexer, with all its requests and results recorded."""

        def __init__(self, own: Indexer) -> None:
            self._own = own
            self.close = own.close

        def predict(self, request: PredictRequest) -> Future[Prediction]:
            asked.append((request, self._own.predict(request)))
            return asked[-1][1]

    with open_llm(path, arena_dir, keep_ratio=0.3, late_policy="wait", indexer=indexer, wrap_indexer=Watched) as llm:
        assert llm.scorer.name == "trained"
        assert llm.index_spec.kv_heads == ((0, 0), (2, 0))
        llm.generate([prompt_of(2000)], max_tokens=40, ignore_eos=True)
        assert llm.engine.stats().counters.failed_predictions == 0
        # what scores on a GPU answers the same, from the arena and then from what it kept of it
        with closing(
            CudaIndexer(llm.index_spec, llm.memory.arena, torch.device("cpu"), 1 << 20, RegisteredMemory)
        ) as other:
            for request, answer in [*asked, *asked]:
                again = other.predict(replace(request, generations=generations(llm, request))).result()
                np.testing.assert_allclose(again.scores, answer.result().scores, rtol=1e-5, atol=1e-6)
    assert len(asked) > 3
    for request, answer in asked:
        assert request.queries.shape == (12, 16) and request.weights is not None and request.weights.any()
        assert answer.result().missing == ()
        assert answer.result().scores.shape == (7,) and len(set(answer.result().scores.tolist())) == 7


def test_the_last_steps_ask_together_at_the_end_of_the_prompt_too(
    path: Path, arena_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions use the queries of three steps, also across the end of the prompt."""
    torch.manual_seed(5)
    save_retrievers(tmp_path / "r.safetensors", (0, 2), steps=3)
    indexer = IndexerConfig(checkpoint=str(tmp_path / "r.safetensors"))
    prompt = prompt_of(2048)
    inputs: dict[int, dict[int, Tensor]] = {0: {}, 2: {}}
    requests: list[PredictRequest] = []
    probes: list[EntryProbe] = []
    given_keys: dict[int, Tensor] = {}
    asking = [2045, 2046, 2047]

    class Watched:
        def __init__(self, own: Indexer) -> None:
            self._own = own
            self.close = own.close

        def predict(self, request: PredictRequest) -> Future[Prediction]:
            requests.append(request)
            return self._own.predict(request)

    with open_llm(path, arena_dir, keep_ratio=0.3, late_policy="wait", indexer=indexer, wrap_indexer=Watched) as llm:
        runner: Any = llm.engine._runner
        layers = {number: layer for layer, number in DeepseekV4Shape.of(runner._model.config).csa.items()}
        for number, seen in inputs.items():

            def keep(module: Any, given: Any, named: Any, seen: dict[int, Tensor] = seen) -> None:
                hidden = given[0] if given else named["hidden_states"]
                seen.update(zip(named["forecache"].positions.tolist(), hidden[0].clone(), strict=True))

            runner._model.model.layers[layers[number]].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
        make = runner._queries.probe
        runner._queries.probe = lambda *given: probes.append(make(*given)) or probes[-1]
        see = EntryProbe.see
        monkeypatch.setattr(
            EntryProbe, "see", lambda self, number, keys: (given_keys.update({number: keys}), see(self, number, keys))
        )
        llm.generate([prompt], max_tokens=40, ignore_eos=True)
        llm.engine.flush()
        llm.engine.check_integrity()
        retriever = runner._queries._retriever
        assert retriever.steps == 3

        def asked_at(position: int) -> tuple[Tensor, Tensor]:
            at = torch.arange(position - 2, position + 1)
            by_layer = [
                retriever.queries(number, torch.stack([seen[p] for p in at.tolist()]), at)
                for number, seen in inputs.items()
            ]
            return torch.cat([q for q, _ in by_layer], 1), torch.cat([w for _, w in by_layer], 1)

        known = {p: asked_at(p) for p in range(2047, 2047 + 40)}
        spec = llm.index_spec
    found = set()
    for request in requests:
        assert request.queries.shape == (3 * 12, 16) and request.weights is not None
        near = [p for p, (q, _) in known.items() if np.allclose(q.flatten(0, 1), request.queries, atol=2e-2)]
        [position] = near
        np.testing.assert_allclose(request.weights, known[position][1].flatten(), atol=1e-2)
        found.add(position)
    assert min(found) < 2050, "within three steps of the prompt's end"

    logits = []
    for number, seen in inputs.items():
        keys = given_keys[number]
        assert keys.shape == (512, 16)
        q, w = retriever.queries(number, torch.stack([seen[p] for p in asking]), torch.tensor(asking))
        logits.append((w.unsqueeze(1) @ (q @ keys.T).relu())[:, 0].amax(0))
    expected = torch.stack(logits).amax(0)
    [probe] = probes
    assert probe._logits is not None
    torch.testing.assert_close(probe._logits, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    torch.testing.assert_close(probe.mass, chunk_scores(spec, probe._logits.view(8, 64).T))


@pytest.mark.parametrize("told", ["0", "-1", "257", "two"])
def test_a_file_that_says_nonsense_of_its_steps_is_refused(tmp_path: Path, told: str) -> None:
    save_retrievers(tmp_path / "r.safetensors", (0,), steps=told)  # type: ignore[arg-type]
    shape = RetrieverShape(64, 6, 16, 24, FREQUENCIES)
    with pytest.raises(FlashMemoryError, match=f"'{told}' as its number of query steps"):
        FlashMemoryIndexer.load(tmp_path / "r.safetensors", shape=shape)


def test_a_checkpoint_of_another_model_costs_nothing_but_its_help(
    path: Path, arena_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_retrievers(tmp_path / "r.safetensors", (20,))
    indexer = IndexerConfig(checkpoint=str(tmp_path / "r.safetensors"))
    with open_llm(path, arena_dir, indexer=indexer) as llm:
        assert llm.scorer.name == "training-free"
    assert "made for hidden size 64 and CSA layers [20]" in caplog.text
