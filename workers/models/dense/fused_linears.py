"""Projections of the same input as one matrix product: queries, keys and values; gate and up.

At small batches a decode step reads every weight once, and each product has a beginning and an end in which memory
idles: fewer and larger ones lose less. Models call their projections one by one, so the first of a group computes for
all of it, and the others hand out their part. That a model calls them in order and with one input is not taken on
trust: if its logits change, all is as it was.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

CHECK_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, relative to the largest one: a larger product may be summed in another order."""

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Group(nn.Module):
    """Joined weights of some linear layers, and what they made of the present input, until it has been handed out."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.rows = [layer.out_features for layer in layers]
        self.parts: tuple[Tensor, ...] = ()
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        # buffers: the parameters are the parts
        self.register_buffer("weight", torch.cat([layer.weight.data for layer in layers]), persistent=False)
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)

    def part(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            self.parts = torch.split(functional.linear(x, self.weight, self.bias), self.rows, dim=-1)
        part = self.parts[index]
        if index == len(self.rows) - 1:
            self.parts = ()
        return part


class FusedLinear(nn.Module):
    """Part ``index`` of a group, in the place of a linear layer. ``weight`` and ``bias`` are views of the group's."""

    bias: nn.Parameter | None

    def __init__(self, group: _Group, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index
        first = sum(group.rows[:index])
        rows = slice(first, first + group.rows[index])
        self.weight = nn.Parameter(group.weight[rows], requires_grad=False)
        bias = None if group.bias is None else nn.Parameter(group.bias[rows], requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] → [..., out of this part], a view; the parts of a group are asked for in their order."""
        return self.group.part(self.index, x)


def fuse_linears(model: PreTrainedModel) -> int:
    """Join the projections of ``model`` that read the same input; returns how many groups there are.

    Memory for one group is needed in addition for a moment, none afterwards.
    """
    groups = 0
    for module in list(model.modules()):
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            plain = [layer for layer in layers if type(layer) is nn.Linear]
            if len(plain) < len(names) or not _alike(plain):
                continue
            group = _Group(plain)
            for index, name in enumerate(names):
                setattr(module, name, FusedLinear(group, index))
            groups += 1
    return groups


@torch.inference_mode()
def fuse_checked(model: PreTrainedModel) -> int:
    """:func:`fuse_linears`, undone where it changes the logits of some random tokens; returns the groups that stay."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, CHECK_TOKENS), generator=generator).to(model.device)
    expected = model(input_ids=tokens, use_cache=False).logits
    groups = fuse_linears(model)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        error = float((logits - expected).abs().max() / expected.abs().max())
    except (IndexError, RuntimeError) as reason:  # parts asked for out of order, or of another shape
        logger.warning("%s calls its projections in another way: %s", type(model).__name__, reason)
        error = float("inf")
    if error <= TOLERANCE[expected.dtype]:
        return groups
    logger.warning("%s keeps its projections apart: joined, its logits differ by %.1e", type(model).__name__, error)
    _separate(model)
    return 0


def _separate(model: PreTrainedModel) -> None:
    """Plain layers again, over the same memory."""
    for module in list(model.modules()):
        for name, fused in list(module.named_children()):
            if isinstance(fused, FusedLinear):
                rows, columns = fused.weight.shape
                with torch.device("meta"):
                    plain = nn.Linear(columns, rows, bias=fused.bias is not None)
                plain.register_parameter("weight", fused.weight)
                plain.register_parameter("bias", fused.bias)
                setattr(module, name, plain)


def _alike(layers: list[nn.Linear]) -> bool:
    """Whether ``layers`` may read one input, and all have a bias or none has."""
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and layer.weight.dtype == first.weight.dtype
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
    )
