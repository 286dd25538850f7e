"""Can this model's attention be replaced by ours, exactly? Found out at load, by asking the model."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forecache.workers.errors import UnsupportedModelError

PROBE_NAME = "forecache_probe"
PROBE_TOKENS = 8
ROPE_OF_THE_BATCH = ("longrope", "dynamic")
"""RoPE kinds whose frequencies depend on the longest position of the forward pass: K in the cache would change."""

REFUSED_ARGUMENTS = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias on attention logits",
}


@dataclass(frozen=True)
class Geometry:
    """Shapes of a model's attention; ``scale`` multiplies its logits."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class _Call:
    layer: int | None
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    key_data: int
    scale: float
    arguments: dict[str, Any]


def refuse_config(config: Any, name: str) -> None:
    """Raise :class:`UnsupportedModelError` for what the configuration alone tells."""
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(f"{name} is of type '{config.model_type}', which is not a decoder language model.")
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in ROPE_OF_THE_BATCH:
            raise UnsupportedModelError(
                f"{name} uses '{kind}' RoPE, whose frequencies change with the length of the batch, so that cached keys "
                "would not be those of a later step. Set a fixed kind (for example yarn) in its config.json."
            )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}; only models whose layers "
            "all use full attention can be served."
        )


def _rope_types(parameters: Any) -> list[str]:
    """``rope_type`` of a flat dict, or of each entry of a dict per layer kind."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [entry["rope_type"] for entry in parameters.values() if isinstance(entry, dict) and "rope_type" in entry]


@torch.inference_mode()
def inspect_attention(model: PreTrainedModel) -> Geometry:
    """Run a few tokens, watch every attention call, and return the shapes; refuse what we would compute wrongly."""
    name = str(model.config._name_or_path)
    calls: list[_Call] = []

    def watch(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> Any:
        calls.append(
            _Call(
                layer=getattr(module, "layer_idx", None),
                query=tuple(query.shape),
                key=tuple(key.shape),
                value=tuple(value.shape),
                key_data=key.data_ptr(),
                scale=float(arguments.get("scaling") or query.shape[-1] ** -0.5),
                arguments={k: arguments[k] for k in REFUSED_ARGUMENTS if arguments.get(k) is not None},
            )
        )
        kept.append(key)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)

    kept: list[torch.Tensor] = []  # alive until the end, so that equal addresses mean shared keys
    AttentionInterface.register(PROBE_NAME, watch)
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=model.device).unsqueeze(0)
    try:
        model.set_attn_implementation(PROBE_NAME)
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{name}: transformers can't exchange its attention: {error}") from error
    return _judge(name, model, calls)


def _judge(name: str, model: PreTrainedModel, calls: list[_Call]) -> Geometry:
    layers = int(model.config.num_hidden_layers)
    if sorted(call.layer if call.layer is not None else -1 for call in calls) != list(range(layers)):
        raise UnsupportedModelError(
            f"{name} has {layers} layers but made {len(calls)} attention calls through transformers' "
            "AttentionInterface: some of its layers do something else (recurrence, convolution, attention of their own)."
        )
    for call in calls:
        for argument in call.arguments:
            raise UnsupportedModelError(f"{name} uses {REFUSED_ARGUMENTS[argument]}, which is not supported yet.")
        if call.key != call.value:
            raise UnsupportedModelError(
                f"{name}: keys {list(call.key)} and values {list(call.value)} of layer {call.layer} differ in shape "
                "(latent attention); only equal shapes are supported."
            )
    first = calls[0]
    if len({(call.query, call.key) for call in calls}) > 1:
        raise UnsupportedModelError(f"{name} has layers of different attention shapes, which is not supported yet.")
    if len({call.key_data for call in calls}) < layers:
        raise UnsupportedModelError(f"{name} shares keys between layers, which is not supported yet.")
    return Geometry(layers, first.query[1], first.key[1], first.key[3], first.scale)
