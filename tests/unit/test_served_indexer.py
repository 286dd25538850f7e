"""A trained indexer behind the engine: its requests, against transformers' hidden states and keys."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from forecache.cluster.cli.eval import _columns, _parser, _trained_digest
from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.preflight import check_model
from forecache.indexer.records import checkpoint as checkpoints
from forecache.indexer.records.checkpoint import CheckpointManifest, load_checkpoint, save_checkpoint
from forecache.indexer.records.encoder import EncoderShape, MemoryIndexer
from forecache.indexer.records.index_spec import encode_chunks
from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest
from forecache.indexer.records.shards import RecordedDocument
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest, StepState
from forecache.indexer.training.training_data import predict_rows
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import load_backbone
from forecache.workers.recording.documents import Recipe
from forecache.workers.recording.record import describe, make_seed_weights, query_projection
from forecache.workers.residency.window import PROBE_TOKENS, WindowCycle

CHUNK_TOKENS = 16
HISTORY = (0, 2, 5, 20)
"""More steps than a chunk has tokens, and more than some prompts leave to compute."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.fixture(autouse=True)
def always_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sets predicted also while all chunks are kept. The engine would skip that, but only such steps are exact, so
    that transformers gives the same states."""
    monkeypatch.setattr(WindowCycle, "_keeps_all", lambda self, seq: False)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an indexer for the tiny model, with random weights instead of initial ones."""
    backbone = load_backbone(tiny_model, dtype="float32", device="cpu", chunk_tokens=CHUNK_TOKENS)
    calibration = CalibrationRecord(
        documents=1, tasks=("needle",), min_tokens=1, max_tokens=1, chunk_tokens=CHUNK_TOKENS, seed=0, events=0,
        torch_version="", transformers_version="", date="",
    )  # fmt: skip
    retrieval = RetrievalManifest(
        model_type="llama", layers=3, attention_heads=4, kv_heads=2, head_dim=16, calibration=calibration,
        heads=tuple(RetrievalHead(layer=layer, head=head, score=0.5) for layer, head in ((2, 3), (0, 1))),
    )  # fmt: skip
    recorded = describe(backbone, retrieval, Recipe(), "tiny-llama")
    shape = EncoderShape(history=HISTORY, context=4, units=8, reach=1)
    torch.manual_seed(3)
    projection = query_projection(recorded, make_seed_weights(backbone, recorded))
    indexer = MemoryIndexer(projection, len(recorded.target_layers), recorded.retrieval_heads, shape)
    for weight in (indexer.out.weight, indexer.gate.weight, indexer.around.weight):
        torch.nn.init.normal_(weight)
    with torch.no_grad():
        indexer.projection.weight.add_(torch.randn_like(indexer.projection.weight), alpha=0.02)
    path = tmp_path_factory.mktemp("indexer") / "tiny.safetensors"
    save_checkpoint(path, indexer, CheckpointManifest.of(recorded, shape, {}))
    return path


class Recorder:
    """Records requests and predictions."""

    def __init__(self, inner: Indexer) -> None:
        self.inner = inner
        self.requests: list[PredictRequest] = []
        self.answers: list[Future[Prediction]] = []

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        self.requests.append(request)
        self.answers.append(self.inner.predict(request))
        return self.answers[-1]

    def close(self) -> None:
        self.inner.close()


@contextmanager
def opened(model: Path, checkpoint: Path | str, arena_dir: Path, **settings: Any) -> Iterator[tuple[LLM, Recorder]]:
    """An LLM whose least budget is eight chunks, so steps over up to eight chunks are exact."""
    recorders: list[Recorder] = []

    def wrap(inner: Indexer) -> Indexer:
        recorders.append(Recorder(inner))
        return recorders[0]

    defaults: dict[str, Any] = {"device": "cpu", "late_policy": "wait", "cold_bytes": 8 << 20}
    with LLM(
        str(model),
        skip_tokenizer=True,
        dtype="float32",
        chunk_tokens=CHUNK_TOKENS,
        window_steps=16,
        lead_steps=2,
        keep_ratio=0.2,
        min_resident_tokens=0,
        hot_bytes=4 << 20,
        arena_dir=arena_dir,
        indexer=IndexerConfig(checkpoint=str(checkpoint)),
        wrap_indexer=wrap,
        **{**defaults, **settings},
    ) as llm:
        yield llm, recorders[0]
        llm.engine.flush()
        llm.engine.check_integrity()


class Model:
    """transformers' forward of one text."""

    def __init__(self, model: Path, tokens: list[int], scorer: LookaheadScorer) -> None:
        self.scorer = scorer
        manifest = scorer.manifest
        llama: Any = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.inference_mode():
            output = llama(torch.tensor([tokens]), use_cache=True, output_hidden_states=True)
            self.hidden = torch.stack(
                [llama.model.layers[n].input_layernorm(output.hidden_states[n][0]) for n in manifest.target_layers], 1
            ).half()
        cache = output.past_key_values
        self.keys = torch.stack([cache.layers[layer].keys[0, head] for layer, head in manifest.index_kv_heads])

    def document(self, start: int) -> RecordedDocument:
        """A document as if recorded from position ``start`` on."""
        tokens = len(self.hidden)
        padded = torch.nn.functional.pad(self.keys, (0, 0, 0, -tokens % CHUNK_TOKENS))
        by_chunk = padded.view(len(padded), -1, CHUNK_TOKENS, padded.shape[2]).transpose(0, 1)
        nothing = torch.zeros(0)
        return RecordedDocument(
            task="prose", text="numbers", split="eval", answer=(0, 0), answer_step=-1,
            positions=torch.arange(start, tokens), runs=torch.tensor([[0, tokens - start]]), hidden=self.hidden[start:],
            records=encode_chunks(self.scorer.own, by_chunk), event_offsets=nothing, event_chunk=nothing,
            event_head=nothing, event_share=nothing, peak_share=nothing, bounds_score=nothing,
        )  # fmt: skip

    def check(self, request: PredictRequest, prediction: Prediction, *, start: int) -> None:
        """Check ``request`` and its prediction for a history that begins at ``start``."""
        scorer, state = self.scorer, request.state
        assert state is not None
        position, steps = state.position, min(state.position + 1 - start, scorer.steps)
        assert state.steps == steps and len(request.index_slots) == (position + 1) // CHUNK_TOKENS
        np.testing.assert_allclose(state.hidden, self.hidden[position], atol=4e-3)
        expected = scorer.queries(self.hidden[position + 1 - steps : position + 1], position)
        queries = torch.tensor(request.queries)
        torch.testing.assert_close(queries[: len(expected)], expected, atol=5e-3, rtol=5e-3)
        # the model's own queries are those of the seed weights, which it left for others here
        local = []
        for query, kv, at in zip(queries, scorer.spec.query_to_kv, scorer.positions(position, steps), strict=True):
            seen = self.keys[kv, (int(at) + 1) // CHUNK_TOKENS * CHUNK_TOKENS : int(at) + 1]
            local.append((seen @ query * scorer.spec.scale).logsumexp(0))
        torch.testing.assert_close(torch.tensor(request.local_lse), torch.stack(local), atol=2e-3, rtol=2e-3)
        found = predict_rows(
            scorer._indexer, scorer.manifest.index_spec, self.document(start), torch.tensor([position - start])
        )
        # training reads the open chunk's keys as int8 too; serving has them as they are
        expected = found.logits[0, : int(found.complete[0])]
        assert prediction.missing == ()
        torch.testing.assert_close(torch.tensor(prediction.scores), expected, atol=0.05, rtol=0.05)


def text(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 256, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_exact(
    path: Path, llm: LLM, recorder: Recorder, texts: dict[str, list[int]], begins: Callable[[StepState, str], int]
) -> list[int]:
    """Check the requests for up to eight chunks, which are all resident, so transformers computes the same.

    A history ``begins`` at some position. Returns the places of the requesting steps within their chunks.
    """
    assert llm.scorer.lookahead is not None
    scorer = llm.scorer.lookahead.to(torch.device("cpu"))
    models = {name: Model(path, tokens, scorer) for name, tokens in texts.items()}
    places = []
    for request, answer in zip(recorder.requests, recorder.answers, strict=True):
        assert request.state is not None
        if answer.cancelled():
            continue  # the engine was closed before this prediction
        if request.state.position < 8 * CHUNK_TOKENS:
            start = begins(request.state, request.sequence_id)
            models[request.sequence_id].check(request, answer.result(30), start=start)
            places.append(request.state.position % CHUNK_TOKENS)
    return places


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap_steps", [False, True])
def test_it_is_asked_what_training_asked(
    tiny_model: Path, checkpoint: Path, arena_dir: Path, overlap_steps: bool, device: str
) -> None:
    """From the first boundaries on, whose history is in the prompt; with prompts of several lengths together."""
    prompts = [text(size, size) for size in (83, 64, 47, 30, 90)]
    with opened(tiny_model, checkpoint, arena_dir, overlap_steps=overlap_steps, device=device) as (llm, recorder):
        assert llm.scorer.name == "trained" and llm.scorer.digest == llm.scorer.lookahead.manifest.digest  # type: ignore[union-attr]
        texts = {f"s{len(prompt)}": list(prompt) for prompt in prompts}
        for name, prompt in texts.items():
            sampling = SamplingParams(max_tokens=128 - len(prompt) + 30, ignore_eos=True)
            llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, CacheOptions()))
        while not llm.engine.idle:
            for event in llm.engine.step():
                texts[event.request_id] += event.token_ids
    places = check_exact(tiny_model, llm, recorder, texts, lambda state, name: 0)
    assert 30 <= len(places) < len(recorder.requests)
    assert CHUNK_TOKENS - 1 in places, "one asks at the step that completes a chunk"
    assert min(places) < HISTORY[1], "one asks right after a chunk was completed"


@pytest.mark.parametrize("device", DEVICES)
def test_behind_a_stored_prefix_the_history_is_whole(
    tiny_model: Path, checkpoint: Path, arena_dir: Path, device: str
) -> None:
    """An answer must not depend on which chunks are stored."""
    prompt = text(5 * CHUNK_TOKENS + 3)
    with opened(tiny_model, checkpoint, arena_dir, device=device, max_step_tokens=32) as (llm, recorder):
        first = llm.generate([prompt], max_tokens=60, ignore_eos=True)[0]
        recorder.requests.clear()
        recorder.answers.clear()
        again = llm.generate([prompt], max_tokens=60, ignore_eos=True)[0]
        assert again.stats.cached_tokens == (len(prompt) - PROBE_TOKENS) // CHUNK_TOKENS * CHUNK_TOKENS > 0
        assert again.token_ids == first.token_ids
    texts = {recorder.requests[0].sequence_id: [*prompt, *again.token_ids]}
    assert len(check_exact(tiny_model, llm, recorder, texts, lambda state, name: 0)) > 5


def test_sequences_come_and_go_and_keep_their_histories(tiny_model: Path, checkpoint: Path, arena_dir: Path) -> None:
    """More sequences than the batch holds, some cancelled, one restarted: ring lines are reused, histories are not."""
    with opened(tiny_model, checkpoint, arena_dir, max_batch_size=2, overlap_steps=True) as (llm, recorder):
        texts: dict[str, list[int]] = {}
        for number in range(5):
            prompt = text(35 + 7 * number, number)
            texts[f"s{number}"] = prompt
            sampling = SamplingParams(max_tokens=128 - len(prompt) + 16, ignore_eos=True)
            llm.engine.add_request(GenerateRequest(f"s{number}", tuple(prompt), sampling, CacheOptions()))
        steps = 0
        restarted = None
        while not llm.engine.idle:
            steps += 1
            if steps == 20:
                llm.engine.cancel("s0")
            running = llm.engine._scheduler.running
            decoding = [seq for seq in running if seq.residency.decode_steps == 12 and seq.request_id == "s3"]
            if decoding and restarted is None:
                llm.engine._finish_in_flight()
                restarted = decoding[0]
                assert restarted.num_computed + 1 == len(restarted.token_ids)
                llm.engine._restart(restarted, "as the test wants it")
            for event in llm.engine.step():
                texts[event.request_id] = texts[event.request_id] + list(event.token_ids)
            llm.engine.check_integrity()
        assert restarted is not None and restarted.restarts == 1
    # after its restart too: so many tokens are computed again, whatever is found of it
    assert len(check_exact(tiny_model, llm, recorder, texts, lambda state, name: 0)) > 30


def test_an_aborted_prefill_costs_no_other_its_history(tiny_model: Path, checkpoint: Path, arena_dir: Path) -> None:
    """Aborted steps are computed again, over the values that they had written."""
    aborts: list[int] = []
    with opened(tiny_model, checkpoint, arena_dir) as (llm, recorder):
        launch = llm.engine._runner.launch

        def aborting(plan: Any, aborted: Any = lambda: False) -> Any:
            of_two = any(part.sequence.request_id == "two" for part in plan.streams)
            if of_two and len(aborts) < 2 and "one" in llm.engine._sequences:
                if plan.decode:  # else the other waits for a prediction: not yet
                    aborts.append(1)
                calls = iter(range(10))
                return launch(plan, lambda: next(calls) >= 2)  # in the third layer
            return launch(plan, aborted)

        llm.engine._runner.launch = aborting  # type: ignore[method-assign]
        texts = {"one": text(50, 1), "two": text(90, 2)}
        for name, prompt in texts.items():
            sampling = SamplingParams(max_tokens=128 - len(prompt) + 16, ignore_eos=True)
            llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, CacheOptions()))
            for _ in range(8 if name == "one" else 0):
                for event in llm.engine.step():
                    texts[event.request_id] = texts[event.request_id] + list(event.token_ids)
        while not llm.engine.idle:
            for event in llm.engine.step():
                texts[event.request_id] = texts[event.request_id] + list(event.token_ids)
    assert len(aborts) == 2
    assert len(check_exact(tiny_model, llm, recorder, texts, lambda state, name: 0)) > 10


@pytest.mark.parametrize("device", DEVICES)
def test_it_serves_where_little_is_kept(tiny_model: Path, checkpoint: Path, arena_dir: Path, device: str) -> None:
    with opened(tiny_model, checkpoint, arena_dir, device=device, overlap_steps=True) as (llm, recorder):
        answers = llm.generate([text(400, 4), text(523, 5)], max_tokens=70, ignore_eos=True)
        assert [len(answer.token_ids) for answer in answers] == [70, 70]
        assert all(answer.stats.resident_chunks < answer.stats.context_chunks / 2 for answer in answers)
        stats = llm.engine.stats().counters
        assert stats.windows > 10 and stats.failed_predictions == 0
    assert all(answer.result(30).missing == () for answer in recorder.answers)


def test_the_package_s_own_is_found(
    tiny_model: Path,
    checkpoint: Path,
    arena_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packaged = arena_dir / "checkpoints"
    packaged.mkdir()
    for file in (checkpoint, checkpoint.with_suffix(".json")):
        shutil.copy(file, packaged)
    monkeypatch.setattr(checkpoints, "PACKAGED_CHECKPOINTS", packaged)
    caplog.set_level(logging.INFO)

    def name_with(config: IndexerConfig, **settings: Any) -> str:
        caplog.clear()
        with LLM(
            str(tiny_model), skip_tokenizer=True, dtype="float32", device="cpu", arena_dir=arena_dir, hot_bytes=4 << 20,
            cold_bytes=8 << 20, indexer=config, **{"chunk_tokens": CHUNK_TOKENS, **settings},
        ) as llm:  # fmt: skip
            return llm.scorer.name

    assert name_with(IndexerConfig()) == "trained"
    assert "scored by the trained indexer" in caplog.text
    assert name_with(IndexerConfig(checkpoint="none")) == "bounds"
    assert "no trained indexer serves" in caplog.text
    assert name_with(IndexerConfig(manifest="none")) == "bounds", "manifest none asks for bounds"
    assert name_with(IndexerConfig(manifest="none", checkpoint=str(checkpoint))) == "trained"
    assert name_with(IndexerConfig(), chunk_tokens=32) == "bounds"
    # a path that does not fit is said, and costs nothing else
    assert name_with(IndexerConfig(checkpoint=str(checkpoint)), chunk_tokens=32) == "bounds"
    assert "chunk_tokens differ" in caplog.text and "WARNING" in caplog.text
    assert name_with(IndexerConfig(checkpoint=str(arena_dir / "nowhere.safetensors"))) == "bounds"
    assert "can't read the indexer's manifest" in caplog.text
    broken = packaged / checkpoint.name
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x01")
    assert name_with(IndexerConfig()) == "bounds"
    assert "does not belong to its manifest" in caplog.text
    manifest = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
    assert manifest["digest"] == load_checkpoint(checkpoint)[1].digest


def test_before_anything_is_loaded_it_is_known_who_will_serve(
    tiny_model: Path, checkpoint: Path, arena_dir: Path
) -> None:
    """The maximum length, the warnings at start and the identity of an evaluation depend on it."""
    digest = load_checkpoint(checkpoint)[1].digest

    def found(*, chunk_tokens: int = CHUNK_TOKENS, **indexer: str) -> str | None:
        engine = EngineConfig(model=str(tiny_model), dtype="float32", device="cpu", chunk_tokens=chunk_tokens)
        config = ServeConfig.model_validate(
            {"engine": engine, "memory": {"cold_bytes": 3 << 20}, "indexer": {"checkpoint": str(checkpoint), **indexer}}
        )
        facts = check_model(tiny_model, config)
        named = facts.trained_digest
        assert _trained_digest(config, tiny_model) == named
        if named is not None:
            with opened(tiny_model, checkpoint, arena_dir, cold_bytes=3 << 20) as (llm, _):
                assert facts.cold_limit == llm.memory.arena.slots * CHUNK_TOKENS
        return named

    assert found() == digest
    assert found(manifest="none") == digest
    assert found(checkpoint="none") is None
    assert found(checkpoint="auto") is None
    assert found(checkpoint=str(arena_dir / "nowhere.safetensors")) is None
    assert found(chunk_tokens=32) is None


def test_the_evaluation_s_columns() -> None:
    parse, config = _parser().parse_args, ServeConfig()
    assert [c.name for c in _columns(parse(["--out", "x"]), config)] == [
        "full", "lookahead", "training-free", "recency", "random",
    ]  # fmt: skip
    over_http = _columns(parse(["--out", "x", "--url", "http://there"]), config)
    assert [c.name for c in over_http] == ["full", "lookahead", "recency", "random"], "a server has one indexer"
    (free,) = _columns(parse(["--out", "x", "--columns", "training-free"]), config)
    assert IndexerConfig().model_copy(update=dict(free.indexer)).checkpoint == "none"
