"""Flags rows that contain an infinity or NaN, in Triton. In PyTorch: `reference.flag_non_finite`."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.attention.store_kv import is_wrong
from forecache.kernels.common import checks

_BLOCK = 1024


@triton.jit
def _flag_kernel(
    x,  # [rows, width]
    non_finite,  # [rows] uint8
    row_stride,
    width,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        b_x = tl.load(x + i_row * row_stride + o_x, mask=o_x < width, other=0.0)
        b_wrong = tl.maximum(b_wrong, is_wrong(b_x).to(tl.int32))
    wrong = tl.max(b_wrong, 0)
    tl.store(non_finite + i_row, wrong.to(tl.uint8), mask=wrong > 0)


def flag_non_finite(x: Tensor, non_finite: Tensor) -> None:
    """See `reference.flag_non_finite`."""
    checks.flags(non_finite, len(x))
    if not x.numel():
        return
    rows = x.flatten(1)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _flag_kernel[(len(rows),)](rows, non_finite, rows.stride(0), rows.shape[1], BLOCK=_BLOCK)
