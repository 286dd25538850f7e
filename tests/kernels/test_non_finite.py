"""Infinities and NaNs are marked when they are written; reference and Triton."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forecache.kernels.attention import flag_non_finite, reference, store_kv

WRONG = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return reference
    return SimpleNamespace(store_kv=store_kv.store_kv, flag_non_finite=flag_non_finite.flag_non_finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_rows_with_a_wrong_number(kernels: Any, dtype: torch.dtype, wrong: float, device: torch.device) -> None:
    x = torch.full((6, 3, 700), torch.finfo(dtype).max, dtype=dtype, device=device)
    x[1, 2, 699], x[4, 0, 0], x[5] = wrong, wrong, -torch.finfo(dtype).max
    flags = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.uint8, device=device)
    kernels.flag_non_finite(x, flags)
    assert flags.tolist() == [0, 1, 1, 0, 1, 0]
    columns = torch.zeros(6, 8, device=device)[:, ::2]
    columns[3, 1] = wrong
    flags.zero_()
    kernels.flag_non_finite(columns, flags)
    assert flags.tolist() == [0, 0, 0, 1, 0, 0]
    kernels.flag_non_finite(x[:, :0], flags)
    kernels.flag_non_finite(x[:0], flags[:0])
    assert flags.tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("wrong", WRONG)
def test_keys_and_values_that_are_stored(kernels: Any, part: int, wrong: float, device: torch.device) -> None:
    """Of padding nothing is said; what was marked stays marked."""
    kv = torch.zeros(3, 2, 2, 3, 4, 80, dtype=torch.bfloat16, device=device)
    new = torch.full((2, 6, 3, 80), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    new[part, 1, 2, 79] = new[part, 5, 0, 0] = wrong
    slots = torch.tensor([0, 0, 2, -1, 1, -1], device=device)
    offsets = torch.tensor([2, 3, 0, 0, 1, 0], device=device)
    flags = torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.uint8, device=device)
    kernels.store_kv(new[0], new[1], kv, 1, slots, offsets, non_finite=flags)
    assert flags.tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_fp8_pool_hides_no_infinity(kernels: Any, part: int, wrong: float, device: torch.device) -> None:
    """Stored, infinity would be the largest number of all, or none: it is found before."""
    kv = torch.zeros(3, 2, 2, 3, 4, 80, device=device).to(torch.float8_e4m3fn)
    scale = torch.zeros(3, 2, 2, 3, device=device)
    new = torch.full((2, 6, 3, 80), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    new[part, 1, 2, 79] = new[part, 5, 0, 0] = wrong
    slots = torch.tensor([0, 0, 2, 2, 1, -1], device=device)
    offsets = torch.tensor([2, 3, 0, 1, 1, 0], device=device)
    flags = torch.zeros(6, dtype=torch.uint8, device=device)
    kernels.store_kv(new[0], new[1], kv, 1, slots, offsets, scale=scale, non_finite=flags)
    # of a chunk's tokens that are new together maybe the first one is marked
    assert flags[:2].any() and not flags[2:].any()
    # the largest finite numbers are stored as finite ones
    assert (kv[1:].float() * scale[1:, ..., None, None]).isfinite().all()
