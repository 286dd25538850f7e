"""Decoder layers through ``torch.compile``: their norms, rotary embeddings and activations become few kernels.

Attention itself is not traced: :func:`.attention.attend` breaks the graph. So compiled code contains no layer's number,
and all layers share it. It works for any number of tokens except one, which compilers specialise: steps of one token
are padded to two. Everything is compiled at start, and nothing later.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from forecache.workers.errors import ForecacheError, UnsupportedModelError
from forecache.workers.models.step.architecture import Geometry

MIN_TOKENS = 2
"""A compiled step has at least this many tokens."""


def compile_layers(model: PreTrainedModel, geometry: Geometry) -> None:
    """Compile every decoder layer of ``model`` at its first call. Raises :class:`UnsupportedModelError` if there is no
    list of them."""
    for layer in decoder_layers(model, geometry):
        layer.compile(dynamic=True)


def decoder_layers(model: PreTrainedModel, geometry: Geometry) -> nn.ModuleList:
    """The list of ``geometry.layers`` modules that the model runs one after another."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for modules in lists:
        if len(modules) == geometry.layers:
            return modules
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of its {geometry.layers} layers to compile. "
        "Start with --torch-compile false."
    )


def compiled_graphs() -> int:
    """How many graphs were compiled so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_compiled_once(before: int, after: int) -> None:
    """``before`` graphs after the first steps, ``after`` them when steps of all kinds were made: must be the same.

    Raises :class:`ForecacheError`: else requests would wait for compilers, or layers silently run uncompiled.
    """
    if after != before:
        raise ForecacheError(
            f"torch.compile made {after - before} more graphs for other batch sizes or layers than the {before} first "
            "ones: this model can't be compiled once for all. Start with --torch-compile false."
        )
