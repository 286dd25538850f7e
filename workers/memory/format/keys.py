"""Names of chunks: equal prefixes have equal names, on every worker."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

ChunkKey = bytes
"""16 bytes of blake2b over (parent key, token ids of the chunk, layout fingerprint, salt)."""

KEY_BYTES = 16


def root_key(layout_fingerprint: str, salt: str = "") -> ChunkKey:
    """The parent of a sequence's first chunk. Keys below roots of different salts or layouts are never equal."""
    digest = blake2b(digest_size=KEY_BYTES, person=b"forecache-root")
    for part in (layout_fingerprint.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def child_key(parent: ChunkKey, token_ids: Sequence[int]) -> ChunkKey:
    """The key of the chunk of ``token_ids`` that follows the chunk (or root) named ``parent``."""
    digest = blake2b(digest_size=KEY_BYTES, person=b"forecache-chunk")
    digest.update(parent)
    digest.update(np.asarray(token_ids, dtype="<i8").tobytes())
    return digest.digest()


def prefix_keys(root: ChunkKey, token_ids: Sequence[int], chunk_tokens: int) -> Iterator[ChunkKey]:
    """Keys of the full chunks of ``token_ids``, in order; a last partial chunk has no key."""
    key = root
    for start in range(0, len(token_ids) - chunk_tokens + 1, chunk_tokens):
        key = child_key(key, token_ids[start : start + chunk_tokens])
        yield key


def batches(keys: Iterable[ChunkKey], size: int) -> Iterator[list[ChunkKey]]:
    """``keys`` in lists of ``size``; the last one may be shorter."""
    iterator = iter(keys)
    while batch := list(islice(iterator, size)):
        yield batch
