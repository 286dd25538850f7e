"""The published indexer's format against its formula written out anew in float64 numpy, and what is refused."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from forecache.indexer.flashmemory.checkpoint import (
    SHAPES,
    FlashMemoryError,
    FlashMemoryIndexer,
    decode_keys,
    pool_entries,
    walsh_hadamard,
)

LAYERS = (10, 12, 20)
POSITIONS = (3, 70_001, 1_000_000)
ENTRIES = 40
Array = npt.NDArray[np.float64]


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
    return FlashMemoryIndexer.load(checkpoint)


def random_keys(seed: int) -> tuple[torch.Tensor, Array]:
    """Rows of 132 bytes, and the numbers they stand for, decoded bit by bit."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (ENTRIES, 128), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    scales = rng.uniform(0.001, 0.02, ENTRIES).astype(np.float32)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 0xF, (codes & 0x7).astype(np.float64)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7))
    rows = np.concatenate([codes, scales.view(np.uint8).reshape(ENTRIES, 4)], 1)
    return torch.from_numpy(rows), sign * values * scales.astype(np.float64)[:, None]


def of_layer(weights: dict[str, torch.Tensor], layer: int) -> dict[str, Array]:
    return {name: weights[f"retrievers.l{layer}.{name}"].double().numpy() for name in SHAPES}


def reference_logit(w: dict[str, Array], x: Array, position: int, keys: Array) -> Array:
    """One step's logits of one layer, by the formula, a pair of dimensions at a time."""
    low = w["wq_a.weight"] @ x
    low = low / math.sqrt(float(np.mean(low**2)) + 1e-6) * w["q_norm_weight"]
    q = (w["wq_b.weight"] @ low).reshape(128, 128)

    def correction(turns: float) -> float:
        return 64 * math.log(65_536 / (turns * 2 * math.pi)) / (2 * math.log(160_000))

    low_pair, high_pair = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), 31)
    for pair in range(32):
        ramp = 0.0 if pair < low_pair else 1.0 if pair >= high_pair else (pair - low_pair) / (high_pair - low_pair)
        own = 160_000 ** (-2 * pair / 64)
        angle = position * (own * (1 - ramp) + own / 16 * ramp)
        even, odd = q[:, 64 + 2 * pair].copy(), q[:, 65 + 2 * pair].copy()
        q[:, 64 + 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        q[:, 65 + 2 * pair] = even * math.sin(angle) + odd * math.cos(angle)
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]) / math.sqrt(128)
    q = q @ hadamard
    head_weights = w["weights_proj.weight"] @ x / math.sqrt(128) / math.sqrt(128)
    result: Array = (head_weights[:, None] * np.maximum(q @ keys.T, 0)).sum(0)
    return result


def test_scores_follow_the_formula(weights: dict[str, torch.Tensor], indexer: FlashMemoryIndexer) -> None:
    assert tuple(indexer.layers) == LAYERS
    generator = torch.Generator().manual_seed(1)
    hidden = {layer: torch.randn(len(POSITIONS), 4096, generator=generator, dtype=torch.float64) for layer in LAYERS}
    rows, expected = {}, {}
    for layer in LAYERS:
        rows[layer], keys = random_keys(layer)
        np.testing.assert_allclose(decode_keys(rows[layer]).double().numpy(), keys, rtol=1e-6)
        w = of_layer(weights, layer)
        steps = zip(hidden[layer], POSITIONS, strict=True)
        expected[layer] = np.stack([reference_logit(w, x.numpy(), at, keys) for x, at in steps])
        ours = indexer.logits(layer, hidden[layer].float(), rows[layer], torch.tensor(POSITIONS)).double().numpy()
        np.testing.assert_allclose(ours, expected[layer], atol=1e-4 * float(np.abs(expected[layer]).max()))
    by_layer = 1 / (1 + np.exp(-np.stack([expected[layer] for layer in LAYERS])))
    inputs = {layer: x.float() for layer, x in hidden.items()}
    highest = indexer.scores(inputs, rows, torch.tensor(POSITIONS))
    np.testing.assert_allclose(highest.double().numpy(), by_layer.max(0), atol=2e-4)
    mean = indexer.scores(inputs, rows, torch.tensor(POSITIONS), combine="mean")
    np.testing.assert_allclose(mean.double().numpy(), by_layer.mean(0), atol=2e-4)


def test_in_float64_it_is_the_formula_to_rounding(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    exact = FlashMemoryIndexer.load(checkpoint, dtype=torch.float64)
    rows, keys = random_keys(5)
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = exact.logits(12, x, rows, torch.tensor([524_287]))[0].numpy()
    # the decoded keys are float32 numbers times a float32 scale
    expected = reference_logit(of_layer(weights, 12), x[0].numpy(), 524_287, keys)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_the_transform_is_its_own_inverse() -> None:
    x = torch.randn(3, 128, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)
    torch.testing.assert_close(walsh_hadamard(x).norm(), x.norm())


def test_a_chunk_scores_as_its_best_entry() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4]])
    assert pool_entries(scores, 2).tolist() == [[pytest.approx(0.9), pytest.approx(0.3), pytest.approx(0.4)]]


def test_what_is_no_published_checkpoint_is_refused_by_name(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one = {name: tensor for name, tensor in weights.items() if ".l10." in name}

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "variant.safetensors")
        with pytest.raises(FlashMemoryError) as caught:
            FlashMemoryIndexer.load(tmp_path / "variant.safetensors")
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
        FlashMemoryIndexer.load(tmp_path / "joint.pt")
    with pytest.raises(FlashMemoryError, match="can't read"):
        FlashMemoryIndexer.load(tmp_path / "none.safetensors")


def test_keys_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match="132"):
        decode_keys(torch.zeros(4, 128, dtype=torch.uint8))
