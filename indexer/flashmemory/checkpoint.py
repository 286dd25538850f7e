"""The published Memory Indexer of FlashMemory-DeepSeek-V4 (arXiv 2606.09079), read from its safetensors.

A target layer scores the compressed index keys of DeepSeek-V4's CSA layers, one key for four tokens:
``q = H · RoPE(W_qb (RMSNorm(W_qa x) ⊙ g))``, ``w = W_p x · (head_dim · heads)^-½`` and
``score = σ(Σ_h w_h relu(q_h · k))``, H being the normalised Walsh-Hadamard transform. Scores of the layers are
joined by maximum or mean.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

HIDDEN_SIZE = 4096
HEADS = 128
HEAD_DIM = 128
QUERY_RANK = 2048
KEY_BYTES = HEAD_DIM + 4
"""128 float8_e4m3 values, then their float32 scale."""
ROPE_DIMS = 64
ROPE_BASE = 160_000.0
ROPE_FACTOR = 16.0
ROPE_ORIGINAL_LENGTH = 65_536
ROPE_BETA_FAST, ROPE_BETA_SLOW = 32.0, 1.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class RetrieverShape:
    """Sizes of a retriever; the defaults are those of the published one. ``frequencies``: angles per position of the
    rotated pairs, float64 [rope_dims / 2]; None: :func:`yarn_frequencies`."""

    hidden: int = HIDDEN_SIZE
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    rank: int = QUERY_RANK
    rope_dims: int = ROPE_DIMS
    frequencies: tuple[float, ...] | None = None

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one layer, by name."""
        return {
            "wq_a.weight": (self.rank, self.hidden),
            "q_norm_weight": (self.rank,),
            "wq_b.weight": (self.heads * self.head_dim, self.rank),
            "weights_proj.weight": (self.heads, self.hidden),
        }


PUBLISHED = RetrieverShape()
SHAPES = PUBLISHED.tensors
FLOATS = ("F64", "F32", "F16", "BF16")
STEPS = "steps"
"""Name, in the metadata of a file, of how many steps ask together."""
MAX_STEPS = 256


class FlashMemoryError(ValueError):
    """The file is no checkpoint in FlashMemory's format, or a variant of it that is not supported."""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one target layer, in the shapes of :data:`SHAPES`."""

    wq_a: Tensor
    q_norm: Tensor
    wq_b: Tensor
    weights_proj: Tensor


class FlashMemoryIndexer:
    """``layers``: CSA layer number, counted over CSA layers from 0, → weights, of sizes ``shape``.

    ``steps``: that ask together, the last ones of a sequence; an entry's score is its largest. The published ones ask
    with one. ``forecache indexer train`` writes the number into the file's metadata.
    """

    def __init__(self, layers: dict[int, LayerWeights], shape: RetrieverShape = PUBLISHED, steps: int = 1) -> None:
        self.layers = layers
        self.shape = shape
        self.steps = steps

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        shape: RetrieverShape = PUBLISHED,
    ) -> Self:
        """Read every target layer of ``path``. Raises :class:`FlashMemoryError` with what does not fit ``shape``."""
        if path.suffix != ".safetensors":
            raise FlashMemoryError(
                f"{path.name} is not *.safetensors; pickled checkpoints can run code and are refused"
            )
        try:
            with safe_open(path, framework="pt", device=device) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                numbers = _check(path, slices, shape.tensors)
                return cls(
                    {
                        number: LayerWeights(
                            *(file.get_tensor(f"retrievers.l{number}.{name}").to(dtype) for name in SHAPES)
                        )
                        for number in numbers
                    },
                    shape,
                    _steps(path, file.metadata() or {}),
                )
        except (OSError, SafetensorError) as error:
            raise FlashMemoryError(f"can't read {path}: {error}") from error

    def queries(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [batch, heads, head_dim] and weights [batch, heads] of the heads.

        ``hidden``: [batch, hidden], the input of the attention of CSA layer ``layer``; ``positions``: int64 [batch].
        """
        q, w = self.plain_queries(layer, hidden, positions)
        return walsh_hadamard(q), w

    def plain_queries(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`queries`, for keys without the Walsh-Hadamard transform, which transformers keep: it changes no
        product."""
        weights = self.layers[layer]
        x = hidden.to(weights.wq_a.dtype)
        low = x @ weights.wq_a.T
        low = low * torch.rsqrt(low.square().mean(1, keepdim=True) + NORM_EPS) * weights.q_norm
        shape, rope = self.shape, self.shape.rope_dims
        q = (low @ weights.wq_b.T).view(-1, shape.heads, shape.head_dim)
        rotated = rotate_interleaved(q[..., -rope:], positions, shape.frequencies)
        q = torch.cat([q[..., :-rope], rotated], 2)
        return q, (x @ weights.weights_proj.T) * (shape.head_dim * shape.heads) ** -0.5

    def logits(self, layer: int, hidden: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, entries] of one layer. ``keys``: uint8 [batch, entries, 132] or [entries, 132], its own."""
        q, w = self.queries(layer, hidden, positions)
        k = decode_keys(keys).to(q.dtype)
        # weights may be negative, so the rectified products can't be summed before they are weighted
        return torch.einsum("bh,bhn->bn", w, (q @ k.transpose(-1, -2)).relu())

    def scores(
        self,
        hidden: dict[int, Tensor],
        keys: dict[int, Tensor],
        positions: Tensor,
        *,
        combine: Literal["max", "mean"] = "max",
    ) -> Tensor:
        """Scores [batch, entries] in (0, 1), joined over the target layers; hidden states and keys of each layer."""
        by_layer = torch.stack(
            [self.logits(layer, hidden[layer], keys[layer], positions).sigmoid() for layer in self.layers]
        )
        return by_layer.amax(0) if combine == "max" else by_layer.mean(0)


def _steps(path: Path, metadata: dict[str, str]) -> int:
    told = metadata.get(STEPS, "1")
    if not told.isdecimal() or not 1 <= int(told) <= MAX_STEPS:
        raise FlashMemoryError(f"{path.name} says that {told!r} steps ask together, which is not 1 to {MAX_STEPS}")
    return int(told)


def retriever_shape(path: Path, head_dim: int, frequencies: tuple[float, ...]) -> RetrieverShape:
    """The sizes of the retrievers in ``path``, for index keys of ``head_dim``: as their first layer has them.

    Raises :class:`FlashMemoryError` if there is none.
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
    return RetrieverShape(hidden, up[0] // head_dim, head_dim, rank, 2 * len(frequencies), frequencies)


def pool_entries(scores: Tensor, entries_per_chunk: int) -> Tensor:
    """Scores of chunks from those of their entries, the largest one: [batch, entries] → [batch, chunks]."""
    missing = -scores.shape[1] % entries_per_chunk
    padded = torch.nn.functional.pad(scores, (0, missing))
    return padded.view(len(scores), -1, entries_per_chunk).amax(2)


def decode_keys(keys: Tensor) -> Tensor:
    """uint8 [..., 132] → float32 [..., 128]."""
    if keys.dtype != torch.uint8 or keys.shape[-1] != KEY_BYTES:
        raise ValueError(f"index keys are {keys.dtype} [..., {keys.shape[-1]}], not uint8 [..., {KEY_BYTES}]")
    values = keys[..., :HEAD_DIM].contiguous().view(torch.float8_e4m3fn).float()
    decoded: Tensor = values * keys[..., HEAD_DIM:].contiguous().view(torch.float32)
    return decoded


def walsh_hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last axis, a power of two long, divided by the root of its length."""
    size = x.shape[-1]
    width = 1
    y = x
    while width < size:
        pairs = y.reshape(*x.shape[:-1], size // (2 * width), 2, width)
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        width *= 2
    return y.reshape(x.shape) / math.sqrt(size)


def yarn_frequencies() -> Tensor:
    """Angles per position of the rotated pairs, float64 [32]: YaRN (Peng et al., arXiv 2309.00071), no mscale.

    Pairs that turn more than ``ROPE_BETA_FAST`` times over the original length keep their frequency, those that turn
    less than ``ROPE_BETA_SLOW`` times are slowed by the factor, those between are mixed in proportion.
    """

    def pair_that_turns(times: float) -> float:
        return ROPE_DIMS * math.log(ROPE_ORIGINAL_LENGTH / (times * 2 * math.pi)) / (2 * math.log(ROPE_BASE))

    low = max(math.floor(pair_that_turns(ROPE_BETA_FAST)), 0)
    high = min(math.ceil(pair_that_turns(ROPE_BETA_SLOW)), ROPE_DIMS // 2 - 1)
    pairs = torch.arange(ROPE_DIMS // 2, dtype=torch.float64)
    slowed = ((pairs - low) / max(high - low, 1)).clamp(0, 1)
    frequencies = ROPE_BASE ** (-2 * pairs / ROPE_DIMS)
    return frequencies * (1 - slowed) + frequencies / ROPE_FACTOR * slowed


def rotate_interleaved(x: Tensor, positions: Tensor, frequencies: tuple[float, ...] | None = None) -> Tensor:
    """Rotary embedding of neighbouring pairs: ``x`` [batch, heads, dims] at ``positions`` [batch], by the angles per
    position ``frequencies`` of the pairs, which are :func:`yarn_frequencies` where none are given."""
    # float64: at position 1,000,000 a float32 angle is off by 0.06
    turns = yarn_frequencies() if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
    angles = positions.double().cpu().outer(turns).unsqueeze(1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2)


def _check(path: Path, tensors: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Numbers of the target layers, ascending; refuses names, number formats that we do not know, and other shapes."""
    numbers: set[int] = set()
    for name, tensor in tensors.items():
        found = re.fullmatch(r"retrievers\.l(\d+)\.(.+)", name)
        if found is None or found[2] not in shapes:
            raise FlashMemoryError(
                f"{path.name} has a tensor '{name}', which is none of retrievers.l<N>.{{{', '.join(shapes)}}}: "
                "quantised (int4, int8) and other variants of the checkpoint are not supported, take the slim "
                "safetensors in bf16 or fp32"
            )
        shape = tuple(tensor.get_shape())  # type: ignore[attr-defined]
        if shape != shapes[found[2]]:
            raise FlashMemoryError(f"{path.name}: '{name}' has shape {list(shape)}, not {list(shapes[found[2]])}")
        number_format = str(tensor.get_dtype())  # type: ignore[attr-defined]
        if number_format not in FLOATS:
            raise FlashMemoryError(
                f"{path.name}: '{name}' is stored as {number_format}: quantised variants are not supported, take the "
                "slim safetensors in bf16 or fp32"
            )
        numbers.add(int(found[1]))
    missing = [f"retrievers.l{n}.{name}" for n in sorted(numbers) for name in shapes]
    missing = [name for name in missing if name not in tensors]
    if missing or not numbers:
        raise FlashMemoryError(f"{path.name} lacks {', '.join(missing) or 'every retrievers.l<N> tensor'}")
    return sorted(numbers)
