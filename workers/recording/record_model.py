"""What a recording tells of its model, and the projections that an indexer starts from."""

from typing import Any

import torch
import transformers

from forecache.indexer.records.index_spec import Head
from forecache.indexer.records.manifest import ManifestError, RetrievalManifest, find_manifest
from forecache.indexer.records.queries import QueryProjection
from forecache.indexer.records.shards import ShardManifest
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.attention_modules import attention_modules
from forecache.workers.models.backbone import Backbone
from forecache.workers.recording.documents import Recipe

QUERY_TOLERANCE = 0.05
"""Largest difference of a rebuilt query from the model's own, as a share of the queries' norm; float16 and bf16 fit."""


def find_retrieval_heads(setting: str, model_name: str, backbone: Backbone) -> RetrievalManifest:
    """The manifest that ``setting`` names, "auto" or a file; an indexer can't start without one."""
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
            f"{model_name} has no manifest of retrieval heads, from which the indexer starts. Make one with "
            f"`forecache indexer calibrate --model {model_name} --out FILE`, and pass it as --manifest FILE."
        )
    return found


def describe(backbone: Backbone, retrieval: RetrievalManifest, recipe: Recipe, model_name: str) -> ShardManifest:
    """The manifest of a recording of ``recipe`` with this model."""
    geometry = backbone.geometry
    group = geometry.heads // geometry.kv_heads
    own: list[Head] = [(head.layer, head.head) for head in retrieval.heads]
    kv_heads = sorted({(layer, head // group) for layer, head in own})
    # heads that share the stored keys cost no memory more
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
        raise UnsupportedModelError(f"{backbone.path} has no rotary embedding that all its layers share.")
    return rotary


def _query_norm_eps(backbone: Backbone) -> float | None:
    module: Any = attention_modules(backbone.model).get(0)
    norm = getattr(module, "q_norm", None)
    return None if norm is None else float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def make_seed_weights(backbone: Backbone, described: ShardManifest) -> dict[str, torch.Tensor]:
    """The query projections of ``described.query_heads``, see :attr:`Recording.seed_weights`."""
    modules: dict[int, Any] = attention_modules(backbone.model)
    weights: dict[str, list[torch.Tensor]] = {"weight": [], "bias": [], "norm": []}
    size = described.head_dim
    for layer, head in described.query_heads:
        if layer not in modules:
            raise UnsupportedModelError(f"layer {layer} of {backbone.path} has no q_proj to start the indexer from.")
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
    """Queries rebuilt from hidden states must be the model's own, else the indexer would start from something else."""
    seed = {name: tensor.to(backbone.device) for name, tensor in make_seed_weights(backbone, described).items()}
    projection = query_projection(described, seed)
    rebuilt = projection.to(backbone.device)(hidden.half(), positions)
    own = torch.stack([queries[layer, head] for layer, head in described.query_heads], 1).float()
    difference = float((rebuilt - own).norm() / own.norm())
    if not difference <= QUERY_TOLERANCE:
        raise UnsupportedModelError(
            f"{backbone.path}: queries made from its hidden states differ from its own by {difference:.0%}; its "
            "attention does more than project, normalise and rotate in Llama's way, so no indexer can start from it."
        )


def query_projection(described: ShardManifest, seed_weights: dict[str, torch.Tensor]) -> QueryProjection:
    """The model's own queries of ``described.query_heads``."""
    return QueryProjection(
        seed_weights["weight"],
        seed_weights["bias"],
        seed_weights["inverse_frequencies"],
        tuple(described.target_layers.index(layer) for layer, _ in described.query_heads),
        rope_scaling=described.rope_scaling,
        norm=seed_weights.get("norm"),
        norm_eps=described.query_norm_eps,
    )
