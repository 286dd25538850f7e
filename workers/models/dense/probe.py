"""Can this model's attention be replaced by ours, exactly? Found out at load, by asking the model."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from forecache.workers.errors import UnsupportedModelError, explained
from forecache.workers.models.step.architecture import Geometry

logger = logging.getLogger(__name__)

PROBE_NAME = "forecache_probe"
FIRST_CALL_NAME = "forecache_first_call"
PROBE_TOKENS = 8
KNOWN_ARGUMENTS = frozenset(
    {
        "dropout",  # none outside training
        "scaling",
        "is_causal",  # checked by itself
        "forecache",
        # of the caller, about what the model returns; they change no attention
        "position_ids",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "deterministic",
    }
)
"""What an attention function may be called with. Any other argument that has a value means something that
forecache's attention does not compute."""

MEANINGS = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias on attention logits",
    "block_indices": "attention to selected blocks",
    "indices": "attention to selected tokens",
}


@dataclass(frozen=True)
class _Call:
    layer: int | None
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    key_data: int
    scale: float
    causal: bool
    masked: bool
    reached: bool
    refused: tuple[str, ...]


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
                causal=bool(arguments.get("is_causal", getattr(module, "is_causal", True))),
                masked=attention_mask is not None,
                reached="forecache" in arguments,
                refused=tuple(k for k in arguments if k not in KNOWN_ARGUMENTS and arguments[k] is not None),
            )
        )
        kept.append(key)
        # what it returns does not matter: only the calls are watched
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    kept: list[torch.Tensor] = []  # alive until the end, so that equal addresses mean shared keys
    AttentionInterface.register(PROBE_NAME, watch)
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=model.device).unsqueeze(0)
    with explained(f"{name}:", "transformers can't exchange its attention"):
        model.set_attn_implementation(PROBE_NAME)
        model(input_ids=tokens, use_cache=False, logits_to_keep=1, forecache=True)
    return _judge(name, model, calls)


class _FirstCallError(Exception):
    """Ends a forward pass at its first attention call."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> None:
        super().__init__()
        self.query, self.key, self.value = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        self.scale = float(scale or query.shape[-1] ** -0.5)


def expected_geometry(config: Any) -> Geometry:
    """The shapes that :func:`inspect_attention` will find in a model with this configuration, before its weights exist.

    The model is built without memory, on PyTorch's meta device, and run up to its first attention call. No formula over
    the fields of a configuration holds for all: GLM-4.7-Flash names the width of its rotary part ``head_dim``.

    Raises :class:`UnsupportedModelError` if transformers can't build the model, if it calls no attention, or if its
    keys and values differ in shape.
    """
    name = str(getattr(config, "_name_or_path", "") or config.model_type)
    layers = int(config.num_hidden_layers)
    with explained(f"{name}:", "its attention can't be examined"):
        try:
            call = _first_call(copy.deepcopy(config), "meta")  # transformers writes into it
        except RuntimeError as error:
            # code before the attention reads values, and meta tensors have none, such as in the router of JetMoE
            logger.debug("%s can't run on the meta device: %s", name, error)
            first = copy.deepcopy(config)
            first.num_hidden_layers = 1
            call = _first_call(first, "cpu")
    if call is None:
        raise _other_layers(name, layers, 0)
    if call.key != call.value:
        raise _unequal(name, 0, call.key, call.value)
    return Geometry(layers, call.query[1], call.key[1], call.key[3], call.scale)


@torch.inference_mode()
def _first_call(config: Any, device: str) -> _FirstCallError | None:
    """The first attention call of a model without weights; None: it makes none."""

    def stop(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **arguments: Any
    ) -> Any:
        raise _FirstCallError(query, key, value, arguments.get("scaling"))

    AttentionInterface.register(FIRST_CALL_NAME, stop)
    with torch.device(device):
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        model.set_attn_implementation(FIRST_CALL_NAME)
        try:
            model(input_ids=torch.ones(1, PROBE_TOKENS, dtype=torch.int64), use_cache=False)
        except _FirstCallError as call:
            return call
    return None


def _unequal(name: str, layer: int | None, key: tuple[int, ...], value: tuple[int, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: keys {list(key)} and values {list(value)} of layer {layer} differ in shape (latent attention); only "
        "equal shapes are supported."
    )


def _other_layers(name: str, layers: int, calls: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} has {layers} layers but made {calls} attention calls through transformers' AttentionInterface: its "
        "layers do something else (recurrence, convolution, custom attention)."
    )


def _judge(name: str, model: PreTrainedModel, calls: list[_Call]) -> Geometry:
    layers = int(model.config.num_hidden_layers)
    if sorted(call.layer if call.layer is not None else -1 for call in calls) != list(range(layers)):
        raise _other_layers(name, layers, len(calls))
    for call in calls:
        if not call.causal:
            raise UnsupportedModelError(f"{name} is no decoder: its tokens attend to later ones as well.")
        if not call.reached:
            raise UnsupportedModelError(
                f"{name} does not hand the arguments of its forward on to its attention (layer {call.layer}), so the "
                "step's chunks can't reach it."
            )
        if call.refused:
            uses = MEANINGS.get(call.refused[0], "a custom attention")
            raise UnsupportedModelError(
                f"{name} uses {uses} ({', '.join(call.refused)} of layer {call.layer}), which forecache's attention "
                "does not compute."
            )
        if call.masked:
            raise UnsupportedModelError(
                f"{name} adds a custom mask or bias to the attention logits of layer {call.layer}, which "
                "forecache's attention does not compute."
            )
        if call.key != call.value:
            raise _unequal(name, call.layer, call.key, call.value)
    first = calls[0]
    if len({call.scale for call in calls}) > 1:
        raise UnsupportedModelError(f"{name} scales attention logits layer by layer, which is not supported yet.")
    if len({(call.query, call.key) for call in calls}) > 1:
        raise UnsupportedModelError(f"{name} has layers of different attention shapes, which is not supported yet.")
    if len({call.key_data for call in calls}) < layers:
        raise UnsupportedModelError(f"{name} shares keys between layers, which is not supported yet.")
    return Geometry(layers, first.query[1], first.key[1], first.key[3], first.scale)
