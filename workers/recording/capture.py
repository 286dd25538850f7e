"""An attention function for transformers that captures a recording: keys of whole documents, queries of some steps.

The model reads documents one after another, then decodes them together, each at its own length. These buffers replace
the model's KV cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from forecache.workers.models.step.attention_modules import attention_modules

CAPTURE = "forecache_capture"


@dataclass(frozen=True)
class CaptureShape:
    """Sizes of the buffers. ``tokens``: longest document with its reply; ``steps``: most recorded steps of a
    document."""

    documents: int
    tokens: int
    steps: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int


class Capture:
    """Buffers of a few documents, and the attention that fills them.

    ``keys``, ``values``: [layers, documents, kv_heads, tokens, head_dim], after RoPE; ``queries``: [layers, documents,
    heads, steps, head_dim]; ``hidden``: [target layers, documents, steps, hidden], inputs of the attention modules; all
    in the model's dtype. ``lengths``: int64 [documents], tokens read so far; ``steps``: int64 [documents], steps
    captured so far. On the model's device.
    """

    def __init__(self, shape: CaptureShape, target_layers: tuple[int, ...], model: PreTrainedModel) -> None:
        self._target = {layer: place for place, layer in enumerate(target_layers)}
        self._model = model
        per_layer = (shape.layers, shape.documents)
        dtype, device = model.dtype, model.device
        self.keys = torch.zeros(*per_layer, shape.kv_heads, shape.tokens, shape.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.queries = torch.zeros(*per_layer, shape.heads, shape.steps, shape.head_dim, dtype=dtype, device=device)
        self.hidden = torch.zeros(
            len(target_layers), shape.documents, shape.steps, shape.hidden_size, dtype=dtype, device=device
        )
        self.lengths = torch.zeros(shape.documents, dtype=torch.int64, device=device)
        self.steps = torch.zeros(shape.documents, dtype=torch.int64, device=device)
        self._document: int | None = None
        self._kept = torch.zeros(0, dtype=torch.int64, device=device)
        self._longest = 0

    def read(self, document: int, token_ids: list[int], kept: list[int]) -> Tensor:
        """Read a prompt and capture the steps at positions ``kept``. Returns the logits of its last token,
        [vocabulary]."""
        tokens = torch.tensor([token_ids], device=self.lengths.device)
        self._document = document
        self._kept = torch.tensor(kept, dtype=torch.int64, device=tokens.device)
        logits = self._forward(tokens, torch.arange(len(token_ids), device=tokens.device).unsqueeze(0))
        self._document = None
        self.lengths[document] = len(token_ids)
        self.steps[document] = len(kept)
        return logits[0]

    def decode(self, token_ids: Tensor) -> Tensor:
        """Read one more token of every document: int64 [documents] → logits [documents, vocabulary]."""
        self._longest = int(self.lengths.max()) + 1
        logits = self._forward(token_ids.unsqueeze(1), self.lengths.unsqueeze(1))
        self.lengths += 1
        self.steps += 1
        return logits

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        model: Any = self._model
        output = model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, forecache_capture=self
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of ``layer``: ``query`` [documents or 1, heads, tokens, head_dim] → the same shape."""
        if self._document is not None:
            tokens = query.shape[2]
            self.keys[layer, self._document, :, :tokens] = key[0]
            self.values[layer, self._document, :, :tokens] = value[0]
            self.queries[layer, self._document, :, : len(self._kept)] = query[0, :, self._kept]
            # repeat K/V for SDPA backends without grouped-query attention
            return nn.functional.scaled_dot_product_attention(
                query, *_repeated(query, key, value), is_causal=True, scale=scale
            )
        rows = torch.arange(len(self.lengths), device=query.device)
        self.keys[layer, rows, :, self.lengths] = key[:, :, 0]
        self.values[layer, rows, :, self.lengths] = value[:, :, 0]
        self.queries[layer, rows, :, self.steps] = query[:, :, 0]
        keys, values = (store[layer, :, :, : self._longest] for store in (self.keys, self.values))
        grouped = query.view(len(rows), keys.shape[1], -1, query.shape[3])
        logits = (grouped @ keys.transpose(2, 3)).float() * scale
        ahead = torch.arange(self._longest, device=query.device) > self.lengths.unsqueeze(1)
        weights = logits.masked_fill_(ahead[:, None, None], -torch.inf).softmax(3).to(query.dtype)
        return (weights @ values).view(query.shape)

    def see(self, layer: int, hidden: Tensor) -> None:
        """Capture ``hidden`` [documents or 1, tokens, hidden], the input of the attention module of ``layer``."""
        place = self._target.get(layer)
        if place is None:
            return
        if self._document is not None:
            self.hidden[place, self._document, : len(self._kept)] = hidden[0, self._kept]
        else:
            rows = torch.arange(len(self.lengths), device=hidden.device)
            self.hidden[place, rows, self.steps] = hidden[:, 0]


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    forecache_capture: Capture,
    **_: Any,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx  # type: ignore[assignment]
    return forecache_capture.attend(layer, query, key, value, scaling).transpose(1, 2).contiguous(), None


def _before_attention(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    hidden = arguments[0] if arguments else named["hidden_states"]
    layer: int = module.layer_idx  # type: ignore[assignment]
    named["forecache_capture"].see(layer, hidden)


def install(model: PreTrainedModel) -> None:
    """Make ``model`` use the :class:`Capture` that its forward receives as attention."""
    AttentionInterface.register(CAPTURE, _attention)
    model.set_attn_implementation(CAPTURE)
    for module in attention_modules(model).values():
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
