"""What kernel tests share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels can run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Different inputs for each test, the same ones every time."""
    torch.manual_seed(sum(request.node.name.encode()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
