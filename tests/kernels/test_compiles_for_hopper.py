"""Every kernel compiles for a Hopper GPU, with the arguments its launcher gives it, also where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: Triton's interpreter, which other tests run in, is chosen when kernels are imported. The
# driver is asked for the GPU's architecture only, and nothing is launched: launches become compilations.
COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def compile_only(self, *args, grid, warmup, run=JITFunction.run, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    print(self.__name__, len(kernel.asm["cubin"]))


driver.set_active(Hopper())
JITFunction.run = compile_only

from forecache.kernels.csa import decode as csa_decode
from forecache.kernels.attention import chunk_mass
from forecache.kernels.attention import flag_non_finite
from forecache.kernels.attention import gather_layer
from forecache.kernels.attention import merge_partials
from forecache.kernels.attention import ragged_prefill
from forecache.kernels.chunks import quantize_chunks
from forecache.kernels.chunks import score_chunks
from forecache.kernels.csa import score_entries
from forecache.kernels.chunks import slot_checksums
from forecache.kernels.attention import decode as sparse_decode
from forecache.kernels.attention import store_kv
from forecache.kernels.csa import top_entries
from forecache.kernels.common import tuning
from forecache.kernels.common.columns import Columns
from forecache.kernels.common.tuning import DecodeConfig

tuning.gpu_family = lambda device: "hopper"
tuning.multiprocessors = lambda device: 132
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
where, layer = torch.tensor([1, 0]), torch.tensor(1)
scale = torch.ones(4, 3, 2, 2)


def pool(dtype, head_dim=128):
    return torch.zeros(4, 3, 2, 2, 64, head_dim, dtype=dtype)


def decode(dtype, head_dim, group, config, q_dtype=BF16, **options):
    if dtype == FP8:
        options |= {"k_scale": scale[:, :, 0], "v_scale": scale[:, :, 1]}
    q = torch.zeros(2, 2 * group, head_dim, dtype=q_dtype)
    sparse_decode.sparse_decode(q, pool(dtype, head_dim), layer, where[None].int().expand(2, 2), where.int(), 0.1,
        config=config, **options)


def copies():
    slot_checksums.slot_checksums(torch.zeros(4, 512, dtype=torch.uint8), where)
    sums = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.float32, BF16, FP8):
        gather_layer.gather_layer(pool(dtype), layer, where)
        gather_layer.gather_layer(pool(dtype), 1, where, sums=sums)
    memory = torch.zeros(4, 3 * 2 * 2 * 64 * 128 + 256, dtype=torch.uint8)
    rows, scales = memory[:, :-256].view(FP8).view(4, 3, 2, 2, 64, 128), memory[:, -256:-208].view(torch.float32)
    gather_layer.gather_layer(rows, layer, where, scale=scales.view(4, 3, 2, 2), sums=sums, dtype=BF16)
    merge_partials.merge_partials(torch.zeros(9, 128), torch.zeros(9), torch.zeros(9, 128), torch.zeros(9))


def fp8():
    for head_dim in (128, 256):
        quantize_chunks.quantize_chunks(pool(BF16, head_dim), where, pool(FP8, head_dim), scale, where)
        quantize_chunks.dequantize_chunks(pool(FP8, head_dim), scale, where, pool(BF16, head_dim), where)
    new = torch.zeros(2, 2, 128, dtype=BF16)
    store_kv.store_kv(new, new, pool(BF16), layer, where, where)
    store_kv.store_kv(new, new, pool(FP8), layer, where, where, scale=scale)
    flags = torch.zeros(2, dtype=torch.uint8)
    store_kv.store_kv(new, new, pool(BF16), layer, where, where, non_finite=flags)
    store_kv.store_kv(new, new, pool(FP8), layer, where, where, scale=scale, non_finite=flags)
    flag_non_finite.flag_non_finite(new, flags)


def scores():
    rows, int8 = torch.zeros(4, 65536, dtype=torch.uint8), torch.int8
    for dtype, tokens, head_dim in ((int8, 64, 128), (int8, 20, 80), (FP8, 256, 64), (torch.float16, 1, 256)):
        queries, starts = torch.zeros(3, head_dim), torch.tensor([0, 1, 3], dtype=torch.int32)
        for kept in ({}, {"copies": rows, "copy_slots": where}):
            score_chunks.score_chunks(rows, where, queries, starts, chunk_tokens=tokens, dtype=dtype, **kept)
    for dtype, head_dim in ((int8, 64), (torch.float32, 128)):
        queries, starts = torch.zeros(50, head_dim), torch.tensor([0, 25, 50], dtype=torch.int32)
        score_chunks.score_chunks(rows, where, queries, starts, chunk_tokens=64, dtype=dtype)
        into = Columns(torch.zeros(50, len(where)), where, where[:2])
        for kept in ({}, {"copies": rows, "copy_slots": where}):
            score_chunks.score_chunks(rows, where, queries, starts, chunk_tokens=64, dtype=dtype, into=into, **kept)


def csa():
    table, lens = where[None].int().expand(2, 2), where.int()
    for dtype in (BF16, torch.float32):
        q, entries = torch.zeros(2, 64, 512, dtype=dtype), torch.zeros(4, 64, 512, dtype=dtype)
        window, chosen = torch.zeros(4, 128, 512, dtype=dtype), torch.zeros(2, 512, dtype=torch.int32)
        csa_decode.csa_decode(q, entries, table, lens, window, where, lens, torch.zeros(64), 0.1, selected=chosen)
        csa_decode.attend_entries(q[:, :4, :64], entries[..., :64].contiguous(), table, lens, 0.1)
        keys = torch.zeros(4, 64, 128, dtype=dtype)
        score_entries.score_entries(q[..., :128].contiguous(), torch.zeros(2, 64), keys, table, lens)
    top_entries.top_entries(torch.zeros(2, 9000), 512)


def splits():
    decode(BF16, 128, 4, DecodeConfig(64, 4, 3, 3))
    decode(BF16, 64, 3, DecodeConfig(64, 4, 4, 4))
    decode(FP8, 128, 4, DecodeConfig(64, 4, 4, 3))
    decode(FP8, 128, 7, DecodeConfig(64, 4, 4, 3, pairs=True))
    decode(torch.float32, 80, 1, DecodeConfig(32, 8, 3, 2), q_dtype=torch.float32)


def prefill(dtype, head_dim, group, q_dtype=BF16, **options):
    scales = {"k_scale": scale[:, :, 0], "v_scale": scale[:, :, 1]} if dtype == FP8 else {}
    packed = torch.zeros(9, 2 * group + 4, head_dim, dtype=q_dtype)
    ragged_prefill.ragged_prefill(*packed.split((2 * group, 2, 2), 1), pool(dtype, head_dim), layer,
        where[None].int().expand(2, 2), where.int(), torch.zeros(3, dtype=torch.int32), 0.1, **scales, **options)


def prefills():
    prefill(BF16, 128, 4, config=tuning.PREFILL_VARIANTS["wide-tma"], splits=2)
    prefill(FP8, 128, 4)
    prefill(BF16, 96, 3)
    prefill(torch.float32, 64, 1, torch.float32)


def masses():
    heads, starts = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    table = torch.zeros(2, 5, dtype=torch.int32)
    for dtype, q_dtype in ((BF16, BF16), (BF16, torch.float32), (FP8, BF16)):
        k_scale = scale[:, :, 0] if dtype == FP8 else None
        chunk_mass.chunk_mass(torch.zeros(2, 2, 128, dtype=q_dtype), torch.zeros(2, 2), pool(dtype), heads, heads,
            table, heads, starts, 0.1, k_scale=k_scale)


def streams():
    config = DecodeConfig(64, 4, 3, 3, stream=True, pairs=True)
    decode(BF16, 128, 4, config)
    decode(BF16, 128, 7, config)
    decode(BF16, 64, 3, config)
    decode(FP8, 128, 4, config)
    decode(FP8, 64, 3, config)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there on this platform")
@pytest.mark.parametrize(
    ("group", "kernels"),
    [
        ("copies", 9),
        ("fp8", 9),
        ("scores", 14),
        ("csa", 13),
        ("splits", 10),
        ("streams", 10),
        ("prefills", 5),
        ("masses", 3),
    ],
)
def test_kernels_compile(group: str, kernels: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{COMPILE}\n{group}()"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == kernels, done.stdout
