"""Find the attention modules of a model."""

from torch import nn
from transformers import PreTrainedModel


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        # DeepSeek's queries are made in two steps
        if isinstance(layer, int) and (hasattr(module, "q_proj") or hasattr(module, "q_a_proj")):
            found[layer] = module
    return found
