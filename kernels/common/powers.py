"""Powers of two: division by one is exact."""

# Kernel arguments are not Python values: no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def power_of_two(b_values):
    """The largest power of two up to each of ``b_values`` (float32, not negative); 1 for 0."""
    # clears all bits of a float32 except those of the exponent
    b_powers = (b_values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(b_powers > 0, b_powers, 1.0)
