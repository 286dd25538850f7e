"""Fixtures of the kernel tests."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels can run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Different inputs for each test, the same ones every time."""
    torch.manual_seed(sum(request.node.name.encode()))


@pytest.fixture(scope="module", autouse=True)
def _alone(one_thread: None) -> None:
    """Tensors are small here: threads would only wait for each other."""


@pytest.fixture
def poisoned() -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch fills fresh memory with NaN (or the largest integer)."""

    @contextmanager
    def context() -> Iterator[None]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(1).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return context


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``‖actual - expected‖ / ‖expected‖`` in float64; NaN when anything is."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        actual, expected = actual.double().cpu(), expected.double().cpu()
        assert actual.shape == expected.shape
        return float((actual - expected).norm() / expected.norm())

    return measure


@dataclass(frozen=True)
class DecodeShape:
    heads: int
    kv_heads: int
    head_dim: int
    chunk_tokens: int
    max_chunks: int


@dataclass
class DecodeCase:
    """A pool with NaN everywhere but in the tokens that may be read."""

    q: Tensor
    kv: Tensor
    layer: int
    block_table: Tensor
    context_lens: Tensor
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.kv, self.layer, self.block_table, self.context_lens, self.scale

    def expected(self) -> tuple[Tensor, Tensor]:
        """out and lse in float64, on the CPU."""
        kv, lens, table = self.kv.cpu().double(), self.context_lens.tolist(), self.block_table.cpu().long()
        q = self.q.cpu().double()
        batch, heads, _ = q.shape
        chunk_tokens = kv.shape[4]
        out = torch.zeros_like(q)
        lse = torch.full((batch, heads), -math.inf, dtype=torch.float64)
        for i, length in enumerate(lens):
            if length == 0:
                continue
            chunks = kv[table[i, : math.ceil(length / chunk_tokens)], self.layer]
            k, v = (
                chunks[:, part].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(heads // kv.shape[3], 0)
                for part in (0, 1)
            )
            logits = torch.einsum("hd,hnd->hn", q[i], k) * self.scale
            out[i] = torch.einsum("hn,hnd->hd", logits.softmax(-1), v)
            lse[i] = logits.logsumexp(-1)
        return out, lse


def make_decode_case(
    shape: DecodeShape, dtype: torch.dtype, lens: list[int], device: torch.device, kv_dtype: torch.dtype | None = None
) -> DecodeCase:
    batch, layers, layer = len(lens), 2, 1
    slots = batch * shape.max_chunks + 2
    row = layers * 2 * shape.kv_heads * shape.chunk_tokens * shape.head_dim
    memory = torch.full((slots, row + 64), math.nan)  # rows are longer than the field, as in the hot pool
    kv = memory[:, :row].view(slots, layers, 2, shape.kv_heads, shape.chunk_tokens, shape.head_dim)
    table = torch.randperm(slots)[: batch * shape.max_chunks].view(batch, shape.max_chunks)
    for i, length in enumerate(lens):
        for chunk, slot in enumerate(table[i].tolist()):
            tokens = min(shape.chunk_tokens, length - chunk * shape.chunk_tokens)
            if tokens > 0:
                kv[slot, layer, :, :, :tokens] = torch.randn(2, shape.kv_heads, tokens, shape.head_dim)
    memory = memory.to(kv_dtype or dtype).to(device)
    return DecodeCase(
        q=torch.randn(batch, shape.heads, shape.head_dim).to(dtype).to(device),
        kv=memory[:, :row].view(kv.shape),
        layer=layer,
        block_table=table.int().to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        scale=2 * shape.head_dim**-0.5,
    )


@pytest.fixture
def make_case() -> Callable[..., DecodeCase]:
    """``make_case(shape, dtype, lens, device, kv_dtype=None)``: inputs of decode attention, and what comes out."""

    def make(shape: Any, *args: Any, **kwargs: Any) -> DecodeCase:
        return make_decode_case(DecodeShape(*shape), *args, **kwargs)

    return make
