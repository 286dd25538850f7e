"""Choice of the backend and of the launch settings."""

import subprocess
import sys

import pytest
import torch

from forecache.kernels.common import tuning

CPU_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails, as on macOS
import torch
from forecache.kernels.attention import prefill
from forecache.kernels.chunks import ops as chunk_ops
from forecache.kernels.attention import ops

kv = torch.randn(4, 1, 2, 2, 16, 64)
where = torch.tensor([3])
ops.store_kv(torch.ones(1, 2, 64), torch.ones(1, 2, 64), kv, 0, where, where)
table, lens = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
out, lse = ops.sparse_decode(torch.randn(1, 4, 64), kv, 0, table, lens, 0.125)
out, lse = ops.merge_partials(out, lse, out, lse)
k, v = ops.gather_layer(kv, 0, where)
assert chunk_ops.slot_checksums(torch.ones(2, 256, dtype=torch.uint8), where[:0]).shape == (0,)
out, lse = prefill.prefill_attention(torch.randn(16, 4, 64), k, v, [(k, v)], 0.125)
assert out.isfinite().all() and (k[:, 3] == 1).all()
print("done")
"""


def test_cpu_needs_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", CPU_WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 64, 256, 512, 513, 5000])
@pytest.mark.parametrize("max_blocks", [1, 3, 16, 2048])
@pytest.mark.parametrize("places", [1, 264, 396])
def test_splits_fill_the_gpu_where_there_is_work(rows: int, max_blocks: int, places: int) -> None:
    splits = tuning.decode_splits(rows, max_blocks, places)
    assert 1 <= splits <= max_blocks
    programs = rows * splits
    waves = -(-programs // places)
    if splits < max_blocks:
        assert programs >= 0.9 * places * waves, "the last wave is nearly full"


def test_one_sequence_occupies_a_whole_h100() -> None:
    """132 multiprocessors, 8 KV heads, 128K tokens in blocks of 64, three programs each; equal shares always do."""
    splits = tuning.decode_splits(8, 2048, 132 * 3)
    assert splits * 8 >= 2 * 132


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 8, 71])
def test_h100_settings_fit_shared_memory_and_cover_latency(dtype: torch.dtype, head_dim: int, group: int) -> None:
    config = tuning.decode_config(dtype, head_dim, group, "hopper")
    padded = 1 << (head_dim - 1).bit_length()
    block_bytes = 2 * config.block_tokens * padded * dtype.itemsize
    resident = config.programs_per_sm * block_bytes * (config.num_stages - 1)
    assert config.block_tokens & (config.block_tokens - 1) == 0
    assert resident <= 227 * 1024
    assert config.programs_per_sm * config.num_warps >= 8, "two warps for each of the four schedulers"
    in_flight = config.programs_per_sm * block_bytes * (config.num_stages - 2)
    # 64 KiB of the padded blocks; latency times the bandwidth of a multiprocessor is about 20 KB
    assert in_flight >= 64 * 1024


def test_unknown_gpus_get_small_blocks() -> None:
    config = tuning.decode_config(torch.bfloat16, 128, 4, "other")
    assert config.block_tokens * 128 * 2 * 2 * config.num_stages * config.programs_per_sm <= 100 * 1024


@pytest.mark.parametrize("programs", [1, 8, 64, 131, 133, 2048])
@pytest.mark.parametrize("past_tokens", [0, 64, 4096, 131072])
def test_splits_of_a_past_fit_the_gpu_at_once(programs: int, past_tokens: int) -> None:
    splits = tuning.prefill_splits(programs, past_tokens, 132)
    assert splits == 1 or (programs * splits <= 132 and past_tokens >= 2048 * splits)
    if programs == 8 and past_tokens == 131072:
        assert splits == 16
