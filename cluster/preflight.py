"""What can be known to fail before anything is started."""

import os
import shutil
import socket
from pathlib import Path

import redis

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.workers.errors import UnsupportedModelError


def check(config: ServeConfig) -> None:
    """Everything that is quick to check.

    Raises:
        StartError: what is wrong and what to change.
    """
    check_port(config.host, config.port)
    check_arena_dir(config.memory.arena_dir, config.memory.cold_bytes, config.object_store_bytes, config.address)
    if config.redis_url is not None:
        check_redis(config.redis_url)


def check_port(host: str, port: int) -> None:
    """Raises :class:`StartError` when ``port`` can't be listened on."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartError(
            f"can't listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from error


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_redis(url: str, timeout_s: float = 3.0) -> None:
    """Raises :class:`StartError` when no Redis answers at ``url``."""
    shown = _without_password(url)
    try:
        with redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            client.ping()
    except ValueError as error:
        raise StartError(f"--redis-url {shown} is no Redis URL: {error}") from error
    except redis.RedisError as error:
        raise StartError(
            f"no Redis answers at {shown} ({error}): start it, correct --redis-url, or leave it out to use the "
            "embedded server"
        ) from error


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}…@{rest.rsplit('@', 1)[1]}" if "@" in rest else url


def check_arena_dir(directory: Path, cold_bytes: int, object_store_bytes: int, address: str | None) -> None:
    """Raises :class:`StartError` when the arena does not fit this machine's shared memory.

    Ray's object store takes its share of `/dev/shm` too, when Ray is started here.
    """
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise StartError(f"--arena-dir {directory} is not a directory that can be written to")
    shared = address is None and directory.stat().st_dev == Path("/dev/shm").stat().st_dev
    needed = cold_bytes + (object_store_bytes if shared else 0)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StartError(
            f"{directory} is too small: {_gib(needed)} needed ({needed} bytes: --cold-bytes {cold_bytes}"
            f"{f' and {object_store_bytes} for Ray' if shared else ''}), {_gib(free)} free; lower --cold-bytes, make "
            f"{directory} larger, or choose another memory-backed --arena-dir"
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def max_model_len(path: Path, wanted: int | None) -> int:
    """Longest prompt + answer the model at ``path`` will serve, in tokens; reads its configuration, not its weights.

    Raises:
        UnsupportedModelError: no decoder, or ``wanted`` is more than it was made for.
    """
    from forecache.workers.decode.backbone import load_config  # imports transformers: seconds

    own_limit = int(load_config(path).max_position_embeddings)
    if wanted is not None and wanted > own_limit:
        raise UnsupportedModelError(
            f"--max-model-len {wanted} is more than the {own_limit} positions that {path} was made for."
        )
    return wanted or own_limit
