"""Records what a DeepSeek-V4 model attends to among its compressed entries: training data of FlashMemory's retrievers.

The forward is the training one, over whole documents; labels follow the published rule (arXiv 2606.09079): entries in
the nucleus of a layer's attention on its selected entries, united over the next tokens.
"""

import json
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

from forecache.indexer.entry_shards import (
    MANIFEST_FILE,
    OWN_FILE,
    EntryDocument,
    EntryManifest,
    document_path,
    write_document,
)
from forecache.workers.dsv4_attention import CsaCapture, index_scores
from forecache.workers.dsv4_documents import REPLY, Document, DocumentMaker
from forecache.workers.dsv4_forward import TrainingForward
from forecache.workers.errors import UnsupportedModelError

CHUNK_TOKENS = 256
MODEL_TYPE = "deepseek_v4"


@dataclass(frozen=True)
class EntryRecipe:
    """``steps``: recorded of each document, half of them up to ``lead`` tokens before a reply. ``horizon``: the tokens
    of a window and the ``lead`` before it. The other fields: :class:`EntryManifest`."""

    documents: int = 96
    eval_documents: int = 24
    min_tokens: int = 2048
    max_tokens: int = 16_384
    steps: int = 48
    lead: int = 8
    horizon: int = 72
    nucleus: float = 0.6
    least_mass: float = 0.1
    seed: int = 0


def record_entries(
    path: Path,
    out: Path,
    recipe: EntryRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, documents: None,
) -> EntryManifest:
    """Record into ``out``; documents that are there already are kept, so a stopped recording goes on.

    Raises :class:`UnsupportedModelError` if ``out`` holds a recording of another kind.
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
    for number in range(total):
        if not document_path(out, number).exists():
            rng = random.Random(f"{recipe.seed} record {number}")
            block = max(forward.window, CHUNK_TOKENS)
            tokens = max(1, rng.randint(recipe.min_tokens, recipe.max_tokens) // block) * block
            maker = makers["train" if number < recipe.documents else "eval"]
            write_document(out, number, _record(forward, maker.document(rng, tokens), recipe, manifest, rng))
        progress(number + 1, total)
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
        nucleus=recipe.nucleus,
        least_mass=recipe.least_mass,
        # 3 of the 21 layers of the published model
        least_layers=max(1, round(3 / 21 * layers)),
        documents=recipe.documents,
        eval_documents=recipe.eval_documents,
        seed=recipe.seed,
    )


def _own_indexers(model: Any, manifest: EntryManifest) -> dict[str, Tensor]:
    """The Lightning Indexers as retrievers: the same formula."""
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
    hidden: list[Tensor] = []
    keys: list[Tensor] = []
    votes: list[Tensor] = []

    def observe(capture: CsaCapture) -> None:
        hidden.append(capture.hidden[0, positions])
        keys.append(capture.index_keys[0])
        nucleus = [_attended(capture, int(at), manifest, forward) for at in positions]
        votes.append(torch.stack(nucleus))

    forward(torch.from_numpy(document.ids)[None].to(device), sparse=True, observe=observe)
    golden = torch.stack(votes).sum(0) >= manifest.least_layers
    counts = golden.sum(1).cpu()
    return EntryDocument(
        positions=positions,
        hidden=torch.stack(hidden, 1).half(),
        keys=torch.stack(keys).half(),
        golden_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        golden_entries=golden.nonzero()[:, 1].int().cpu(),
    )


def _positions(document: Document, recipe: EntryRecipe, rng: random.Random) -> list[int]:
    """Ascending steps: half anywhere, half shortly before replies."""
    last = len(document.ids) - 2
    first = min(2 * CHUNK_TOKENS, last)
    replies = [at for at in range(first, last + 1) if document.roles[at] >= REPLY > document.roles[at - 1]]
    near = [
        max(first, at - rng.randint(1, recipe.lead)) for at in rng.sample(replies, min(len(replies), recipe.steps // 2))
    ]
    anywhere = rng.sample(range(first, last + 1), min(recipe.steps, last + 1 - first))
    return sorted({*near, *anywhere[: recipe.steps - len(near)]})


def _attended(capture: CsaCapture, position: int, manifest: EntryManifest, forward: TrainingForward) -> Tensor:
    """Entries that a token of the horizon behind ``position`` attends to in this layer, bool [entries]."""
    tokens = slice(position + 1, min(position + 1 + manifest.horizon, capture.queries.shape[1]))
    at = torch.arange(tokens.start, tokens.stop, device=capture.queries.device)
    entries = capture.entries[0]
    seen = torch.arange(len(entries), device=at.device) < ((at + 1) // manifest.ratio).unsqueeze(1)
    scores = index_scores(capture.index_queries[:, tokens], capture.index_weights[:, tokens], capture.index_keys)[0]
    if len(entries) > forward.topk:
        best = scores.masked_fill(~seen, -torch.inf).topk(forward.topk, sorted=False).indices
        seen &= torch.zeros_like(seen).scatter_(1, best, True)
    q = capture.queries[0, tokens]
    logits = torch.einsum("thd,ed->the", q, entries).float() * q.shape[2] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), -torch.inf)
    total = torch.logaddexp(logits.logsumexp(2), capture.near_lse[0, tokens])
    shares = (logits - total.unsqueeze(2)).exp().mean(1)
    mass = shares.sum(1, keepdim=True)
    ordered, order = shares.sort(1, descending=True)
    # those before which less than the nucleus has been gathered
    inside = (ordered.cumsum(1) - ordered < manifest.nucleus * mass) & (ordered > 0) & (mass >= manifest.least_mass)
    return torch.zeros_like(inside).scatter_(1, order, inside).any(0)


def is_deepseek_v4(path: Path) -> bool:
    """Whether the model in ``path`` is one."""
    try:
        return bool(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (OSError, json.JSONDecodeError):
        return False  # whoever loads it will say what is wrong
