"""FlashMemory's checkpoint format against its formula in float64 numpy, and refused checkpoints."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from forecache.indexer.flashmemory.checkpoint import (
    FlashMemoryError,
    FlashMemoryIndexer,
    LayerWeights,
    RetrieverShape,
)
from forecache.indexer.records.entry_scores import largest_logits

LAYERS = (10, 12, 20)
POSITIONS = (3, 70_001, 1_000_000)
ENTRIES = 40
Array = npt.NDArray[np.float64]


def yarn_frequencies() -> tuple[float, ...]:
    """RoPE frequencies of DeepSeek-V4's entries: YaRN (arXiv 2309.00071), base 160,000, factor 16 of 65,536 tokens."""

    def correction(turns: float) -> float:
        return 64 * math.log(65_536 / (turns * 2 * math.pi)) / (2 * math.log(160_000))

    low, high = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), 31)
    ramps = [min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(32)]
    return tuple(160_000 ** (-2 * pair / 64) * (1 - ramp + ramp / 16) for pair, ramp in enumerate(ramps))


FREQUENCIES = yarn_frequencies()
PUBLISHED = RetrieverShape(hidden=4096, heads=128, head_dim=128, rank=2048, frequencies=FREQUENCIES)
SHAPES = PUBLISHED.tensors
HADAMARD = np.array([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]) / math.sqrt(128)


def random_weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"retrievers.l{layer}.{name}": (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
        for layer in LAYERS
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(0)


@pytest.fixture(scope="module")
def checkpoint(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flashmemory") / "published.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def indexer(checkpoint: Path) -> FlashMemoryIndexer:
    return FlashMemoryIndexer.load(checkpoint, shape=PUBLISHED)


def of_layer(weights: dict[str, torch.Tensor], layer: int) -> dict[str, Array]:
    return {name: weights[f"retrievers.l{layer}.{name}"].double().numpy() for name in SHAPES}


def reference_logit(w: dict[str, Array], x: Array, position: int, keys: Array) -> Array:
    """The logits of one step and layer, by the formula, one pair of dimensions at a time."""
    low = w["wq_a.weight"] @ x
    low = low / math.sqrt(float(np.mean(low**2)) + 1e-6) * w["q_norm_weight"]
    q = (w["wq_b.weight"] @ low).reshape(128, 128)

    for pair, frequency in enumerate(FREQUENCIES):
        angle = position * frequency
        even, odd = q[:, 64 + 2 * pair].copy(), q[:, 65 + 2 * pair].copy()
        q[:, 64 + 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        q[:, 65 + 2 * pair] = even * math.sin(angle) + odd * math.cos(angle)
    q = q @ HADAMARD
    head_weights = w["weights_proj.weight"] @ x / math.sqrt(128) / math.sqrt(128)
    result: Array = (head_weights[:, None] * np.maximum(q @ keys.T, 0)).sum(0)
    return result


def logits_of(indexer: FlashMemoryIndexer, layer: int, hidden: torch.Tensor, keys: Array) -> Array:
    """The server's logits [steps, entries], from keys before the Walsh-Hadamard transform."""
    q, w = indexer.queries(layer, hidden, torch.tensor(POSITIONS))
    plain = torch.from_numpy(keys @ HADAMARD).to(q.dtype)
    steps = [largest_logits(q[step : step + 1], w[step : step + 1], plain) for step in range(len(hidden))]
    return torch.stack(steps).double().numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_logits_follow_the_published_formula(
    weights: dict[str, torch.Tensor], indexer: FlashMemoryIndexer, dtype: torch.dtype, tolerance: float
) -> None:
    """The formula transforms queries and keys; the server transforms neither."""
    assert tuple(indexer.layers) == LAYERS
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    for layer in LAYERS:
        hidden = torch.randn(len(POSITIONS), 4096, generator=generator, dtype=torch.float64)
        keys, w = rng.standard_normal((ENTRIES, 128)), of_layer(weights, layer)
        steps = zip(hidden, POSITIONS, strict=True)
        expected = np.stack([reference_logit(w, x.numpy(), at, keys) for x, at in steps])
        own = indexer.layers[layer]
        cast = LayerWeights(*(x.to(dtype) for x in (own.wq_a, own.q_norm, own.wq_b, own.weights_proj)))
        ours = logits_of(FlashMemoryIndexer({layer: cast}, PUBLISHED), layer, hidden, keys)
        np.testing.assert_allclose(ours, expected, atol=tolerance * float(np.abs(expected).max()))


def test_what_is_no_published_checkpoint_is_refused_by_name(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one = {name: tensor for name, tensor in weights.items() if ".l10." in name}

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "variant.safetensors")
        with pytest.raises(FlashMemoryError) as caught:
            FlashMemoryIndexer.load(tmp_path / "variant.safetensors", shape=PUBLISHED)
        return str(caught.value)

    int4 = one | {"retrievers.l10.wq_b.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    assert "retrievers.l10.wq_b.qweight" in refused(int4) and "int4" in refused(int4)
    eight = one | {"retrievers.l10.wq_a.weight": torch.zeros(2048, 4096, dtype=torch.int8)}
    assert "'retrievers.l10.wq_a.weight' is stored as I8" in refused(eight)
    narrow = one | {"retrievers.l10.wq_a.weight": torch.zeros(1024, 4096, dtype=torch.bfloat16)}
    assert "[1024, 4096]" in refused(narrow)
    lacking = {name: tensor for name, tensor in one.items() if "q_norm" not in name}
    assert "lacks retrievers.l10.q_norm_weight" in refused(lacking)
    with pytest.raises(FlashMemoryError, match="pickled"):
        FlashMemoryIndexer.load(tmp_path / "joint.pt", shape=PUBLISHED)
    with pytest.raises(FlashMemoryError, match="can't read"):
        FlashMemoryIndexer.load(tmp_path / "none.safetensors", shape=PUBLISHED)
