"""Records which compressed entries a DeepSeek-V4 model attends to, as training data for FlashMemory's retrievers.

It runs the training forward over whole documents. An entry is labelled positive if any head has a retrieval event on it
within the reply tokens that follow, since these are the entries that decoding will need. The published label, the
nucleus of a layer's attention averaged over its heads (arXiv 2606.09079), comes mostly from heads that retrieve
nothing: the best possible choice of 10 % of the chunks held only a quarter of it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerBase
from xxhash import xxh3_64_hexdigest

from forecache.indexer.flashmemory.entry_shards import (
    MANIFEST_FILE,
    OWN_FILE,
    EntryDocument,
    EntryManifest,
    document_path,
    write_document,
)
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.recording.deepseek_v4.attention import CsaCapture, index_scores, keep_best
from forecache.workers.recording.deepseek_v4.documents import REPLY, Document, DocumentMaker
from forecache.workers.recording.deepseek_v4.forward import TrainingForward

CHUNK_TOKENS = 256
TOKENS = 64
"""Tokens whose attention on all entries is in memory at a time."""


@dataclass(frozen=True)
class EntryRecipe:
    """What to record; for the other fields see :class:`EntryManifest`.

    ``rows``: steps recorded of each document, half of them the first steps of replies. ``horizon``: tokens of a window
    and of the lead before it.
    """

    documents: int = 96
    eval_documents: int = 24
    min_tokens: int = 2048
    max_tokens: int = 16_384
    rows: int = 48
    steps: int = 24
    horizon: int = 72
    event_share: float = 0.5
    seed: int = 0


def record_entries(
    path: Path,
    out: Path,
    recipe: EntryRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    device: str = "cpu",
    part: tuple[int, int] = (1, 1),
    progress: Callable[[int, int], None] = lambda done, documents: None,
) -> EntryManifest:
    """Record into the directory ``out``. Existing documents are kept, so a stopped recording can be continued.

    With ``part`` (k, n) it records every n-th document from the k-th on: n processes that share ``out`` record it
    together. Raises :class:`UnsupportedModelError` if ``out`` holds a recording of another kind.
    """
    model: Any = DeepseekV4ForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    model = model.to(device).eval()
    manifest = _describe(model, recipe, model_name)
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST_FILE).exists() and EntryManifest.load(out) != manifest:
        raise UnsupportedModelError(f"{out} holds a recording of another kind: choose another directory.")
    save_file(_own_indexers(model, manifest), out / OWN_FILE)
    manifest.save(out)
    forward = TrainingForward(model)
    makers = {"train": DocumentMaker(tokenizer, "docstrings"), "eval": DocumentMaker(tokenizer, "topics")}
    total = recipe.documents + recipe.eval_documents
    numbers = range(part[0] - 1, total, part[1])
    for done, number in enumerate(numbers, 1):
        if not document_path(out, number).exists():
            rng = random.Random(f"{recipe.seed} record {number}")
            block = max(forward.window, CHUNK_TOKENS)
            tokens = max(1, rng.randint(recipe.min_tokens, recipe.max_tokens) // block) * block
            maker = makers["train" if number < recipe.documents else "eval"]
            write_document(out, number, _record(forward, maker.document(rng, tokens), recipe, manifest, rng))
        progress(done, len(numbers))
    return manifest


def _describe(model: Any, recipe: EntryRecipe, model_name: str) -> EntryManifest:
    config = model.config
    layers = sum(kind == "compressed_sparse_attention" for kind in config.layer_types)
    if not layers:
        raise UnsupportedModelError(f"{model_name} has no layers with Compressed Sparse Attention.")
    digest = "".join(xxh3_64_hexdigest(p.detach().cpu().contiguous().numpy().tobytes()) for p in model.parameters())
    return EntryManifest(
        model_name=model_name,
        weights_digest=xxh3_64_hexdigest(digest.encode()),
        hidden_size=config.hidden_size,
        heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rank=config.q_lora_rank,
        norm_eps=config.rms_norm_eps,
        layers=tuple(range(layers)),
        frequencies=tuple(model.model.rotary_emb.compress_inv_freq.double().tolist()),
        ratio=config.compress_rates["compressed_sparse_attention"],
        chunk_tokens=CHUNK_TOKENS,
        horizon=recipe.horizon,
        event_share=recipe.event_share,
        steps=recipe.steps,
        documents=recipe.documents,
        eval_documents=recipe.eval_documents,
        seed=recipe.seed,
    )


def _own_indexers(model: Any, manifest: EntryManifest) -> dict[str, Tensor]:
    """The weights of the model's Lightning Indexers, named as those of retrievers, which use the same formula."""
    attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn.compressor, "indexer")]
    return {
        f"retrievers.l{number}.{name}": tensor.detach().cpu().contiguous()
        for number in manifest.layers
        for name, tensor in (
            ("wq_a.weight", attentions[number].q_a_proj.weight),
            ("q_norm_weight", attentions[number].q_a_norm.weight),
            ("wq_b.weight", attentions[number].compressor.indexer.q_b_proj.weight),
            ("weights_proj.weight", attentions[number].compressor.indexer.scorer.weights_proj.weight),
        )
    }


@torch.no_grad()
def _record(
    forward: TrainingForward, document: Document, recipe: EntryRecipe, manifest: EntryManifest, rng: random.Random
) -> EntryDocument:
    device = next(forward.parameters()).device
    positions = torch.tensor(_positions(document, recipe, rng), device=device)
    written = _written(document, positions.tolist(), recipe.horizon)
    tokens = torch.tensor(sorted({at for span in written for at in span}), device=device)
    asking = positions.unsqueeze(1) + torch.arange(1 - recipe.steps, 1, device=device)
    hidden: list[Tensor] = []
    keys: list[Tensor] = []
    events: list[Tensor] = []

    def observe(capture: CsaCapture) -> None:
        hidden.append(capture.hidden[0, asking])
        keys.append(capture.index_keys[0])
        parts = [_events(capture, part, manifest, forward) for part in torch.split(tokens, TOKENS)]
        events.append(torch.cat(parts).cpu())

    forward(torch.from_numpy(document.ids)[None].to(device), sparse=True, observe=observe)
    happened = torch.stack(events).any(0)
    row_of = {at: row for row, at in enumerate(tokens.tolist())}
    golden = torch.stack([happened[[row_of[at] for at in span]].any(0) for span in written])
    counts = golden.sum(1)
    return EntryDocument(
        positions=positions,
        hidden=torch.stack(hidden, 2).half(),
        keys=torch.stack(keys).half(),
        golden_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        golden_entries=golden.nonzero()[:, 1].int(),
    )


def _positions(document: Document, recipe: EntryRecipe, rng: random.Random) -> list[int]:
    """Ascending positions to record, each followed by a token of a reply, half of them by its first."""
    first = max(2 * CHUNK_TOKENS, recipe.steps)
    following = [at for at in range(first, len(document.ids) - 1) if document.roles[at + 1] >= REPLY]
    begins = [at for at in following if document.roles[at] < REPLY]
    begins = rng.sample(begins, min(len(begins), recipe.rows // 2))
    return sorted({*begins, *rng.sample(following, min(len(following), recipe.rows - len(begins)))})


def _written(document: Document, positions: list[int], horizon: int) -> list[list[int]]:
    """For each position: itself, and the positions after it in the same reply, ``horizon`` at most."""
    spans = []
    for at in positions:
        end = at + 1
        while end < min(at + 1 + horizon, len(document.ids) - 1) and document.roles[end] >= REPLY:
            end += 1
        spans.append([*range(at, end)])
    return spans


def _events(capture: CsaCapture, at: Tensor, manifest: EntryManifest, forward: TrainingForward) -> Tensor:
    """Entries on which any head of this layer puts at least ``event_share`` of its attention, for the tokens ``at``.

    Returns bool [tokens, entries].
    """
    entries = capture.entries[0]
    seen = torch.arange(len(entries), device=at.device) < ((at + 1) // manifest.ratio).unsqueeze(1)
    if len(entries) > forward.topk:
        scores = index_scores(capture.index_queries[:, at], capture.index_weights[:, at], capture.index_keys)[0]
        seen = keep_best(scores, seen, forward.topk)
    q = capture.queries[0, at]
    logits = torch.einsum("thd,ed->the", q, entries).float() * q.shape[2] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), -torch.inf)
    total = torch.logaddexp(logits.logsumexp(2), capture.near_lse[0, at])
    happened: Tensor = (logits - total.unsqueeze(2)).exp() >= manifest.event_share
    return happened.any(1)
