"""Records what a model's heads attend to, so that a Memory Indexer can be trained without the model (docs/indexer.md).

The model reads a document in one pass, then its correct reply, and continues greedily. The recording contains the steps
of the reply and of a few windows of the text. The captured keys give the exact attention of every head on every chunk.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from forecache.indexer.records.index_spec import Head, encode_chunks
from forecache.indexer.records.manifest import ManifestError, RetrievalManifest, find_manifest
from forecache.indexer.records.queries import QueryProjection
from forecache.indexer.records.shards import (
    SEED_WEIGHTS_FILE,
    RecordedDocument,
    ShardManifest,
    shard_path,
    write_shard,
)
from forecache.workers.errors import ForecacheError, UnsupportedModelError
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.attention_modules import attention_modules
from forecache.workers.models.tokenizer import load_tokenizer
from forecache.workers.recording.capture import Capture, CaptureShape, install
from forecache.workers.recording.documents import Recipe, SourceDocument, make_document, plan
from forecache.workers.recording.events import find_events

LEAST_PROMPT_TOKENS = 1024
PROMPT_END_STEPS = 32
"""Last steps of the prompt that are recorded with the reply: serving predicts the first windows from them."""
QUERY_TOLERANCE = 0.05
"""Largest relative difference between rebuilt queries and the model's; the rounding of float16 and bfloat16 fits."""
Progress = Callable[[int, int], None]


def record(
    model_path: Path,
    out: Path,
    recipe: Recipe,
    *,
    model_name: str,
    manifest: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    part: tuple[int, int] = (1, 1),
    progress: Progress = lambda done, documents: None,
) -> ShardManifest:
    """Record the documents of ``recipe`` into the directory ``out``; keeps shards that exist.

    With ``part`` (k, n) it records every n-th shard from the k-th on: n processes that share ``out``, on one or several
    machines, record it together. Raises :class:`UnsupportedModelError` if the model can't be recorded, or ``out`` holds
    another recording.
    """
    if not LEAST_PROMPT_TOKENS <= recipe.min_tokens <= recipe.max_tokens:
        raise ForecacheError(
            f"can't make documents of {recipe.min_tokens} to {recipe.max_tokens} tokens: questions and facts take up "
            f"to "
            f"{LEAST_PROMPT_TOKENS} tokens; raise --min-tokens, and --max-tokens if it is less"
        )
    backbone = load_backbone(model_path, device=device, dtype=dtype)
    retrieval = find_retrieval_heads(manifest, model_name, backbone)
    install(backbone.model)
    described = describe(backbone, retrieval, recipe, model_name)
    _prepare(out, described, make_seed_weights(backbone, described))
    tokenizer = load_tokenizer(model_path)
    kinds = list(plan(recipe))
    done = 0
    for shard in range(part[0] - 1, described.shards, part[1]):
        first = shard * recipe.documents_per_shard
        wanted = kinds[first : first + recipe.documents_per_shard]
        if not shard_path(out, shard).exists():
            # one length per shard, so that documents that are decoded together waste no memory
            tokens = random.Random(f"{recipe.seed} {shard}").randint(recipe.min_tokens, recipe.max_tokens)
            sources = [
                make_document(*kind, tokenizer, tokens=tokens, seed=recipe.seed * 1_000_003 + first + number)
                for number, kind in enumerate(wanted)
            ]
            write_shard(out, shard, _record_shard(backbone, described, recipe, sources, tokenizer))
        done += len(wanted)
        progress(done, -(-described.documents // part[1]))
    return described


def _prepare(out: Path, described: ShardManifest, seed_weights: dict[str, torch.Tensor]) -> None:
    """Write the manifest and the seed weights, or check that ``out`` has the same manifest."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "manifest.json").exists():
        there = ShardManifest.load(out)
        ours = ShardManifest.model_validate_json(described.model_dump_json())
        names = [name for name in ShardManifest.model_fields if getattr(there, name) != getattr(ours, name)]
        if names:
            raise UnsupportedModelError(
                f"{out} holds another recording ({', '.join(names)} differ): choose another --out"
            )
        return
    # rename and write the manifest last, since another process may do the same now
    partial = out / f"{SEED_WEIGHTS_FILE}.{os.getpid()}.partial"
    save_file({name: tensor.contiguous() for name, tensor in seed_weights.items()}, partial)
    partial.rename(out / SEED_WEIGHTS_FILE)
    described.save(out)


@torch.inference_mode()
def _record_shard(
    backbone: Backbone,
    described: ShardManifest,
    recipe: Recipe,
    sources: Sequence[SourceDocument],
    tokenizer: PreTrainedTokenizerBase,
) -> list[RecordedDocument]:
    geometry, device = backbone.geometry, backbone.device
    kept = [
        list(_kept_positions(len(source.prompt_token_ids), recipe, number)) for number, source in enumerate(sources)
    ]
    capture = Capture(
        CaptureShape(
            documents=len(sources),
            tokens=max(len(source.prompt_token_ids) for source in sources) + recipe.reply_tokens,
            steps=max(map(len, kept)) + recipe.reply_tokens,
            layers=geometry.layers,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            hidden_size=described.hidden_size,
        ),
        described.target_layers,
        backbone.model,
    )
    following = torch.stack(
        [capture.read(n, source.prompt_token_ids, kept[n]).argmax() for n, source in enumerate(sources)]
    )
    ends = torch.tensor(_end_tokens(backbone, tokenizer), dtype=torch.int64, device=device)
    ended = torch.zeros(len(sources), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(sources), dtype=torch.int64, device=device)
    for step in range(recipe.reply_tokens):
        for number, source in enumerate(sources):
            if step < len(source.reply_token_ids):
                following[number] = source.reply_token_ids[step]
        ended |= torch.isin(following, ends)
        if bool(ended.all()):
            break
        lengths += ~ended
        following = capture.decode(following).argmax(1)
    return [
        _document(backbone, described, capture, source, kept[number], int(lengths[number]), number)
        for number, source in enumerate(sources)
    ]


def _end_tokens(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a reply."""
    generation: Any = backbone.model.generation_config
    eos = getattr(generation, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None})


def _kept_positions(prompt_tokens: int, recipe: Recipe, number: int) -> Iterator[int]:
    """Positions of the prompt to record, ascending: windows of its text and its end, each with its history."""
    rng = random.Random(f"{recipe.seed} {prompt_tokens} {number}")
    size = recipe.prompt_window_tokens
    places = range(prompt_tokens // 4, prompt_tokens - PROMPT_END_STEPS - size, size)
    windows = [(start, start + size) for start in rng.sample(places, min(recipe.prompt_windows, len(places)))]
    windows.append((prompt_tokens - PROMPT_END_STEPS, prompt_tokens))
    kept = {place for start, end in windows for place in range(max(start - recipe.history_steps, 0), end)}
    yield from sorted(kept)


def _document(
    backbone: Backbone,
    described: ShardManifest,
    capture: Capture,
    source: SourceDocument,
    kept: list[int],
    reply_tokens: int,
    number: int,
) -> RecordedDocument:
    """One document from the buffers of ``capture``; its last ``reply_tokens`` steps belong to the reply."""
    prompt, chunk_tokens = len(source.prompt_token_ids), described.chunk_tokens
    tokens, steps = prompt + reply_tokens, len(kept) + reply_tokens
    places = [*kept, *range(prompt, tokens)]
    positions = torch.tensor(places, device=backbone.device)
    keys = capture.keys[:, number, :, :tokens]
    queries = capture.queries[:, number, :, :steps]
    hidden = capture.hidden[:, number, :steps].transpose(0, 1)
    if not number:
        check_queries(backbone, described, hidden, queries, positions)
    events = find_events(
        queries, keys, positions, scale=described.scale, chunk_tokens=chunk_tokens, event_mass=described.event_mass
    )
    indexed = torch.stack([keys[layer, head] for layer, head in described.index_kv_heads])
    indexed = torch.nn.functional.pad(indexed, (0, 0, 0, -tokens % chunk_tokens))
    by_chunk = indexed.view(len(indexed), -1, chunk_tokens, described.head_dim).transpose(0, 1)
    answer, answer_step = (0, 0), -1
    if source.answer_span is not None and source.answer_place is not None:
        answer = (source.answer_span[0] // chunk_tokens, (source.answer_span[1] - 1) // chunk_tokens + 1)
        if source.answer_place < reply_tokens:
            answer_step = len(kept) - 1 + source.answer_place
    breaks = [0, *(row for row in range(1, steps) if places[row] != places[row - 1] + 1), steps]
    return RecordedDocument(
        task=source.task,
        text=source.text,
        split=source.split,
        answer=answer,
        answer_step=answer_step,
        positions=positions,
        runs=torch.tensor(list(pairwise(breaks)), dtype=torch.int64),
        hidden=hidden.half(),
        records=encode_chunks(described.index_spec, by_chunk),
        event_offsets=events.offsets,
        event_chunk=events.chunk,
        event_head=events.head,
        event_share=events.share,
        peak_share=events.peak_share,
        bounds_score=events.bounds_score,
    )


def find_retrieval_heads(setting: str, model_name: str, backbone: Backbone) -> RetrievalManifest:
    """The manifest that ``setting`` names ("auto" or a file). Raises :class:`UnsupportedModelError` without one."""
    geometry = backbone.geometry
    try:
        found = find_manifest(
            setting,
            model_name,
            model_type=backbone.config.model_type,
            layers=geometry.layers,
            attention_heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
        )
    except ManifestError as error:
        raise UnsupportedModelError(str(error)) from error
    if found is None:
        raise UnsupportedModelError(
            f"{model_name} has no manifest of retrieval heads, which an indexer needs: make one with "
            f"`forecache indexer calibrate --model {model_name} --out FILE`, and pass it as --manifest FILE"
        )
    return found


def describe(backbone: Backbone, retrieval: RetrievalManifest, recipe: Recipe, model_name: str) -> ShardManifest:
    """The manifest of a recording of ``recipe`` with this model."""
    geometry = backbone.geometry
    group = geometry.heads // geometry.kv_heads
    own: list[Head] = [(head.layer, head.head) for head in retrieval.heads]
    kv_heads = sorted({(layer, head // group) for layer, head in own})
    # heads of the same KV head use the same stored keys, so they cost no memory
    siblings = [(layer, kv * group + place) for layer, kv in kv_heads for place in range(group)]
    return ShardManifest(
        model_type=backbone.config.model_type,
        model_name=model_name,
        weights_fingerprint=backbone.fingerprint,
        layers=geometry.layers,
        attention_heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        hidden_size=int(backbone.config.hidden_size),
        scale=geometry.scale,
        rope_scaling=float(_rotary(backbone).attention_scaling),
        query_norm_eps=_query_norm_eps(backbone),
        chunk_tokens=backbone.layout.chunk_tokens,
        target_layers=tuple(sorted({layer for layer, _ in own})),
        query_heads=(*own, *(head for head in siblings if head not in own)),
        retrieval_heads=len(own),
        index_kv_heads=tuple(kv_heads),
        event_mass=recipe.event_mass,
        recipe={name: value for name, value in vars(recipe).items() if name != "seed"},
        documents=recipe.documents + recipe.eval_documents,
        documents_per_shard=recipe.documents_per_shard,
        seed=recipe.seed,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


def _rotary(backbone: Backbone) -> Any:
    rotary = getattr(backbone.model.base_model, "rotary_emb", None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        raise UnsupportedModelError(
            f"{backbone.path} has no rotary embedding shared by all layers, so its attention can't be recorded"
        )
    return rotary


def _query_norm_eps(backbone: Backbone) -> float | None:
    module: Any = attention_modules(backbone.model).get(0)
    norm = getattr(module, "q_norm", None)
    return None if norm is None else float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def make_seed_weights(backbone: Backbone, described: ShardManifest) -> dict[str, torch.Tensor]:
    """The query projections of ``described.query_heads``, from which an indexer starts; float32 on the CPU."""
    modules: dict[int, Any] = attention_modules(backbone.model)
    weights: dict[str, list[torch.Tensor]] = {"weight": [], "bias": [], "norm": []}
    size = described.head_dim
    for layer, head in described.query_heads:
        if layer not in modules:
            raise UnsupportedModelError(f"layer {layer} of {backbone.path} has no q_proj, from which an indexer starts")
        rows = slice(head * size, (head + 1) * size)
        projection = modules[layer].q_proj
        weights["weight"].append(projection.weight[rows].float().cpu())
        bias = torch.zeros(size) if projection.bias is None else projection.bias[rows].float().cpu()
        weights["bias"].append(bias)
        if described.query_norm_eps is not None:
            weights["norm"].append(modules[layer].q_norm.weight.float().cpu())
    stacked = {name: torch.stack(tensors) for name, tensors in weights.items() if tensors}
    return stacked | {"inverse_frequencies": _rotary(backbone).inv_freq.float().cpu()}


def check_queries(
    backbone: Backbone, described: ShardManifest, hidden: torch.Tensor, queries: torch.Tensor, positions: torch.Tensor
) -> None:
    """Check that queries rebuilt from hidden states equal the model's, since the indexer starts from rebuilt queries.

    ``hidden`` [steps, target layers, hidden], ``queries`` [layers, heads, steps, head_dim], ``positions`` int64
    [steps]. Raises :class:`UnsupportedModelError` if they differ by more than ``QUERY_TOLERANCE``.
    """
    seed = {name: tensor.to(backbone.device) for name, tensor in make_seed_weights(backbone, described).items()}
    projection = query_projection(described, seed)
    rebuilt = projection.to(backbone.device)(hidden.half(), positions)
    own = torch.stack([queries[layer, head] for layer, head in described.query_heads], 1).float()
    difference = float((rebuilt - own).norm() / own.norm())
    if not difference <= QUERY_TOLERANCE:
        raise UnsupportedModelError(
            f"{backbone.path}: queries rebuilt from its hidden states differ from its own by {difference:.0%}. Its "
            "attention does more than project, normalise and rotate as Llama's, so no indexer can start from it."
        )


def query_projection(described: ShardManifest, seed_weights: dict[str, torch.Tensor]) -> QueryProjection:
    """The model's own query projection of ``described.query_heads``."""
    return QueryProjection(
        seed_weights["weight"],
        seed_weights["bias"],
        seed_weights["inverse_frequencies"],
        tuple(described.target_layers.index(layer) for layer, _ in described.query_heads),
        rope_scaling=described.rope_scaling,
        norm=seed_weights.get("norm"),
        norm_eps=described.query_norm_eps,
    )
