"""Sizes as people write them."""

import re

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(value: object) -> object:
    """``"4GiB"``, ``"512 MB"``, ``"1.5gib"`` or ``"1024"`` → bytes. What is not a string passes through.

    Raises:
        ValueError: the string is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
