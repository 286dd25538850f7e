"""Checksums of rows, whole and gathered layer by layer, reference and Triton, against Python's integers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import gather_layer, ops, reference
from forecache.kernels.chunks import ops as chunk_ops
from forecache.kernels.chunks import reference as chunk_reference
from forecache.kernels.chunks import slot_checksums

Poison = Callable[[], Any]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
FIELDS = [  # dtype, kv_heads, head_dim, chunk_tokens
    (torch.float32, 2, 64, 16),
    (torch.bfloat16, 3, 64, 16),
    (torch.float16, 1, 80, 20),
    (torch.bfloat16, 1, 256, 64),
    (torch.float8_e4m3fn, 2, 80, 20),
    (torch.float8_e4m3fn, 1, 128, 64),
]


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return SimpleNamespace(slot_checksums=chunk_reference.slot_checksums, gather_layer=reference.gather_layer)
    return SimpleNamespace(slot_checksums=slot_checksums.slot_checksums, gather_layer=gather_layer.gather_layer)


def key(i: int) -> int:
    """The i-th word's key, in Python's integers."""
    z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    return (z ^ (z >> 32)) * 0xBF58476D1CE4E5B9 % 2**64 | 1


def expected_sums(memory: Tensor, slots: Tensor) -> list[int]:
    """Signed sums, as an int64 holds them."""
    keys = [key(i) for i in range(memory.shape[1] // 4)]
    sums = []
    for slot in slots.tolist():
        row = bytes(memory[slot].tolist())
        words = (int.from_bytes(row[at : at + 4], "little") for at in range(0, len(row), 4))
        total = sum(k * w for k, w in zip(keys, words, strict=True)) % 2**64
        sums.append(total - 2**64 if total >= 2**63 else total)
    return sums


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("nbytes", [256, 1280, 32768, 33280])
def test_sums_are_those_of_integers(kernels: Any, nbytes: int, device: torch.device, poisoned: Poison) -> None:
    memory = random_bytes(5, nbytes + 256)[:, :nbytes]
    memory[4] = 255
    slots = torch.tensor([4, 0, 3, 3])
    with poisoned():
        sums = kernels.slot_checksums(memory.to(device), slots.to(device))
    assert sums.dtype == torch.int64 and sums.device.type == device.type
    assert sums.tolist() == expected_sums(memory, slots)


def test_every_flipped_bit_shows(kernels: Any, device: torch.device) -> None:
    bits = torch.cat([torch.arange(32) + 32 * word for word in (0, 1, 30, 63)])
    memory = random_bytes(256).repeat(len(bits) + 1, 1)
    memory[torch.arange(len(bits)), bits // 8] ^= (1 << bits % 8).to(torch.uint8)
    sums = kernels.slot_checksums(memory.to(device), torch.arange(len(memory), device=device))
    assert len(set(sums.tolist())) == len(memory), "no two of them are alike, and none is like the whole row"


def test_swapped_words_show(kernels: Any, device: torch.device) -> None:
    memory = random_bytes(2, 512)
    memory[1] = memory[0].view(2, 64, 4).flip(0).reshape(512)
    first, second = kernels.slot_checksums(memory.to(device), torch.arange(2, device=device)).tolist()
    assert first != second


def test_sums_of_parts_add_up(kernels: Any, device: torch.device) -> None:
    memory = random_bytes(3, 1024)
    memory[1, 300:] = 0
    memory[2, :300] = 0
    memory[0] = memory[1] + memory[2]
    whole, *parts = kernels.slot_checksums(memory.to(device), torch.arange(3, device=device))
    assert whole == sum(parts)


def test_sums_of_parts_of_rows_add_up(kernels: Any, device: torch.device, poisoned: Poison) -> None:
    """Parts that were copied out of longer rows, each with the word that it begins at."""
    memory, slots = random_bytes(3, 1536), torch.tensor([2, 0])
    total = torch.zeros(2, dtype=torch.int64, device=device)
    for start, stop in ((0, 512), (512, 640), (640, 1536)):
        part = memory[slots, start:stop].contiguous().to(device)
        with poisoned():
            total += kernels.slot_checksums(part, torch.arange(2, device=device), start // 4)
    assert total.tolist() == expected_sums(memory, slots)


def test_sums_of_no_rows(kernels: Any, device: torch.device) -> None:
    sums = kernels.slot_checksums(random_bytes(3, 256).to(device), torch.empty(0, dtype=torch.int64, device=device))
    assert sums.shape == (0,) and sums.dtype == torch.int64


def test_rows_beyond_two_billion_words(kernels: Any, device: torch.device) -> None:
    """Of the memory only the pages of two rows are touched."""
    stride = 3 << 30
    memory = torch.empty(3 * stride + 256, dtype=torch.uint8, device=device).as_strided((4, 256), (stride, 1))
    near = random_bytes(2, 256)
    memory[0], memory[3] = near.to(device)
    sums = kernels.slot_checksums(memory, torch.tensor([3, 0], device=device))
    assert sums.tolist() == expected_sums(near, torch.tensor([1, 0]))


def make_rows(dtype: torch.dtype, kv_heads: int, head_dim: int, chunk_tokens: int) -> tuple[Tensor, int]:
    """Bytes of 6 rows of 3 layers, with scales behind fp8, and where the scales begin; the rest is zeros."""
    kv_bytes = 3 * 2 * kv_heads * chunk_tokens * head_dim * dtype.itemsize
    scale_at = -(-kv_bytes // 256) * 256
    memory = torch.zeros(6, scale_at + 256, dtype=torch.uint8)
    values = torch.randn(6, kv_bytes // dtype.itemsize).to(dtype)
    memory[:, :kv_bytes] = values.view(torch.uint8)
    if dtype.itemsize == 1:
        scales = torch.rand(6, 3 * 2 * kv_heads)
        memory[:, scale_at : scale_at + scales.shape[1] * 4] = scales.view(torch.uint8)
    return memory, scale_at


def views(memory: Tensor, scale_at: int, field: tuple[torch.dtype, int, int, int]) -> tuple[Tensor, Tensor | None]:
    dtype, kv_heads, head_dim, chunk_tokens = field
    shape = (3, 2, kv_heads, chunk_tokens, head_dim)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    kv = memory[:, :nbytes].view(dtype).unflatten(1, shape)
    scales = memory[:, scale_at : scale_at + 4 * 6 * kv_heads].view(torch.float32).unflatten(1, (3, 2, kv_heads))
    return kv, scales if dtype.itemsize == 1 else None


@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int layer", "tensor layer"])
def test_gathering_every_layer_makes_the_rows_sums(
    kernels: Any, field: tuple[torch.dtype, int, int, int], as_tensor: bool, device: torch.device, poisoned: Poison
) -> None:
    memory, scale_at = make_rows(*field)
    kv, scale = views(memory.to(device), scale_at, field)
    slots = torch.tensor([5, 0, 3, 3])
    sums = torch.zeros(4, dtype=torch.int64, device=device)
    for layer in range(3):
        index = torch.tensor(layer, device=device) if as_tensor else layer
        dtype = torch.float32 if scale is not None else None
        with poisoned():
            k, v = kernels.gather_layer(kv, index, slots.to(device), scale=scale, sums=sums, dtype=dtype)
        expected = kv.cpu().float()[slots, layer]
        if scale is not None:
            expected = expected * scale.cpu()[slots, layer, :, :, None, None]
        assert torch.equal(torch.stack((k, v)).cpu().float(), expected.permute(1, 2, 0, 3, 4).flatten(2, 3))
    assert sums.tolist() == expected_sums(memory, slots)


def test_sums_take_every_bit_pattern(kernels: Any, device: torch.device) -> None:
    """NaN payloads and negative zeros count as the bits that they are."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        field = (dtype, 1, 64, 16)
        memory = random_bytes(6, 3 * 2 * 16 * 64 * dtype.itemsize + 256)
        memory[:, -256:] = 0
        kv, _ = views(memory.to(device), 0, field)
        slots = torch.tensor([1, 4])
        sums = torch.zeros(2, dtype=torch.int64, device=device)
        for layer in range(3):
            kernels.gather_layer(kv, layer, slots.to(device), sums=sums)
        assert sums.tolist() == expected_sums(memory, slots)


def test_sums_are_refused_where_they_cannot_be_those_of_rows(device: torch.device) -> None:
    field = (torch.float8_e4m3fn, 1, 64, 16)
    memory, scale_at = make_rows(*field)
    kv, scale = views(memory.to(device), scale_at, field)
    assert scale is not None
    slots, sums = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for backend in (reference, gather_layer):
        with pytest.raises(AssertionError, match="must lie in kv's rows"):
            backend.gather_layer(kv, 0, slots, scale=scale.clone(), sums=sums, dtype=torch.float32)
        with pytest.raises(AssertionError, match="give the dtype"):
            backend.gather_layer(kv, 0, slots, scale=scale)
        with pytest.raises(AssertionError, match="whole 32-bit words"):
            backend.gather_layer(kv.new_empty(1, 1, 2, 1, 1, 62), 0, slots, sums=sums)


@pytest.mark.gpu
@NEEDS_GPU
def test_registered_host_memory_is_summed_in_place() -> None:
    field = (torch.bfloat16, 8, 128, 64)
    memory, scale_at = make_rows(*field)
    registered = memory.clone().share_memory_()
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(registered.data_ptr(), registered.nbytes, 0)) == 0
    try:
        kv, _ = views(registered, scale_at, field)
        slots = torch.tensor([5, 2, 0], device="cuda")
        sums = torch.zeros(3, dtype=torch.int64, device="cuda")
        for layer in range(3):
            on_gpu = ops.gather_layer(kv, layer, slots, sums=sums)
            for ours, theirs in zip(on_gpu, reference.gather_layer(kv, layer, slots.cpu()), strict=True):
                assert ours.is_cuda and torch.equal(ours.cpu(), theirs)
        assert torch.equal(sums, chunk_ops.slot_checksums(registered, slots))
        assert torch.equal(sums.cpu(), chunk_ops.slot_checksums(memory, slots.cpu()))
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(registered.data_ptr())
