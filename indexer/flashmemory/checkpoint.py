"""The Memory Indexer that FlashMemory-DeepSeek-V4 publishes (arXiv 2606.09079), read from safetensors.

A retriever scores the compressed index keys of one of DeepSeek-V4's CSA layers, one key for four tokens:
``q = RoPE(W_qb (RMSNorm(W_qa x) ⊙ g))``, ``w = W_p x · (head_dim · heads)^-½``, and an entry's logit is
``Σ_h w_h relu(q_h · k)``. The publication applies the normalised Walsh-Hadamard transform to queries and keys. It is
orthogonal and changes no product, so queries here, like the keys that transformers computes, leave it out.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NORM_EPS = 1e-6
FLOATS = ("F64", "F32", "F16", "BF16")
STEPS = "steps"
"""Key of the number of query steps in a file's metadata."""
MAX_STEPS = 256


@dataclass(frozen=True)
class RetrieverShape:
    """Sizes of a retriever.

    ``frequencies``: RoPE's angles per position, one for each rotated pair; the pairs are the last dimensions of a head.
    The published retriever has hidden 4096, heads 128, head_dim 128, rank 2048 and 32 frequencies.
    """

    hidden: int
    heads: int
    head_dim: int
    rank: int
    frequencies: tuple[float, ...]

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors, by name."""
        return {
            "wq_a.weight": (self.rank, self.hidden),
            "q_norm_weight": (self.rank,),
            "wq_b.weight": (self.heads * self.head_dim, self.rank),
            "weights_proj.weight": (self.heads, self.hidden),
        }


class FlashMemoryError(ValueError):
    """The file is not a checkpoint in FlashMemory's format, or is an unsupported variant of one."""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one retriever, shaped as :attr:`RetrieverShape.tensors` says and in its order."""

    wq_a: Tensor
    q_norm: Tensor
    wq_b: Tensor
    weights_proj: Tensor


class FlashMemoryIndexer:
    """Retrievers of several layers.

    ``layers``: weights by CSA layer number, counted over the CSA layers from 0; all have the sizes ``shape``.
    ``steps``: an entry's score is the largest over the queries of this many last steps of a sequence. The published
    checkpoint uses one step; ``forecache indexer train`` writes the number into the file's metadata.
    """

    def __init__(self, layers: dict[int, LayerWeights], shape: RetrieverShape, steps: int = 1) -> None:
        self.layers = layers
        self.shape = shape
        self.steps = steps

    @classmethod
    def load(cls, path: Path, *, shape: RetrieverShape, device: str = "cpu") -> Self:
        """Read all retrievers of ``path`` as float32.

        Raises :class:`FlashMemoryError` when the file is unreadable or pickled, or when its tensors do not fit
        ``shape``.
        """
        if path.suffix != ".safetensors":
            raise FlashMemoryError(f"{path.name} is not a .safetensors file; pickled checkpoints can run code")
        names = shape.tensors
        try:
            with safe_open(path, framework="pt", device=device) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                layers = {
                    number: LayerWeights(*(file.get_tensor(f"retrievers.l{number}.{name}").float() for name in names))
                    for number in _check(path, slices, names)
                }
                return cls(layers, shape, _steps(path, file.metadata() or {}))
        except (OSError, SafetensorError) as error:
            raise FlashMemoryError(f"can't read {path}: {error}") from error

    def queries(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`retriever_queries` of CSA layer ``layer``."""
        return retriever_queries(self.layers[layer], self.shape, hidden, positions)


def retriever_queries(
    weights: LayerWeights, shape: RetrieverShape, hidden: Tensor, positions: Tensor, norm_eps: float = NORM_EPS
) -> tuple[Tensor, Tensor]:
    """Queries [batch, heads, head_dim] and the weights of their heads [batch, heads], in the dtype of ``weights``.

    ``hidden``: [batch, hidden], the input of the layer's attention; ``positions``: int64 [batch].
    """
    x = hidden.to(weights.wq_a.dtype)
    low = x @ weights.wq_a.T
    low = low * torch.rsqrt(low.square().mean(1, keepdim=True) + norm_eps) * weights.q_norm
    q = (low @ weights.wq_b.T).view(-1, shape.heads, shape.head_dim)
    rope = 2 * len(shape.frequencies)
    q = torch.cat([q[..., :-rope], rotate_interleaved(q[..., -rope:], positions, shape.frequencies)], 2)
    return q, (x @ weights.weights_proj.T) * (shape.head_dim * shape.heads) ** -0.5


def rotate_interleaved(x: Tensor, positions: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """Rotary embedding of neighbouring pairs: ``x`` [batch, heads, 2 · len(frequencies)] at ``positions`` [batch]."""
    # float64: at position 1,000,000 a float32 angle is off by 0.06
    turns = torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    angles = positions.double().outer(turns).unsqueeze(1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2)


def retriever_shape(path: Path, head_dim: int, frequencies: tuple[float, ...]) -> RetrieverShape:
    """Sizes of the retrievers in ``path``, taken from its first layer, for index keys of ``head_dim`` dimensions.

    Raises :class:`FlashMemoryError` when the file is unreadable or has no retriever for such keys.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FlashMemoryError(f"can't read {path}: {error}") from error
    down = next((shape for name, shape in shapes.items() if name.endswith(".wq_a.weight")), None)
    up = next((shape for name, shape in shapes.items() if name.endswith(".wq_b.weight")), None)
    if down is None or up is None or len(down) != 2 or len(up) != 2 or up[0] % head_dim:
        raise FlashMemoryError(f"{path.name} has no retrievers.l<N> tensors for index keys of {head_dim} dimensions")
    rank, hidden = down
    return RetrieverShape(hidden, up[0] // head_dim, head_dim, rank, frequencies)


def _steps(path: Path, metadata: dict[str, str]) -> int:
    value = metadata.get(STEPS, "1")
    if not value.isdecimal() or not 1 <= int(value) <= MAX_STEPS:
        raise FlashMemoryError(
            f"{path.name} gives {value!r} as its number of query steps, which is not 1 to {MAX_STEPS}"
        )
    return int(value)


def _check(path: Path, tensors: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """CSA layer numbers in the file, ascending. Raises on unknown names and number formats, and on other shapes."""
    numbers: set[int] = set()
    for name, tensor in tensors.items():
        found = re.fullmatch(r"retrievers\.l(\d+)\.(.+)", name)
        if found is None or found[2] not in shapes:
            raise FlashMemoryError(
                f"{path.name} has a tensor '{name}', which is none of retrievers.l<N>.{{{', '.join(shapes)}}}. "
                "Quantised (int4, int8) and other variants of the checkpoint are not supported; use the slim "
                "safetensors in bf16 or fp32"
            )
        shape = tuple(tensor.get_shape())  # type: ignore[attr-defined]
        if shape != shapes[found[2]]:
            raise FlashMemoryError(f"{path.name}: '{name}' has shape {list(shape)}, not {list(shapes[found[2]])}")
        number_format = str(tensor.get_dtype())  # type: ignore[attr-defined]
        if number_format not in FLOATS:
            raise FlashMemoryError(
                f"{path.name}: '{name}' is stored as {number_format}. Quantised variants are not supported; use the "
                "slim safetensors in bf16 or fp32"
            )
        numbers.add(int(found[1]))
    missing = [f"retrievers.l{n}.{name}" for n in sorted(numbers) for name in shapes]
    missing = [name for name in missing if name not in tensors]
    if missing or not numbers:
        raise FlashMemoryError(f"{path.name} lacks {', '.join(missing) or 'every retrievers.l<N> tensor'}")
    return sorted(numbers)
