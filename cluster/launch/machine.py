"""Quick checks before the start: ports, directories, keys, and whether Ray and Redis answer. Avoids slow imports."""

import os
import shutil
import socket
from pathlib import Path

import redis

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.tenants import Tenants
from forecache.workers.masking import mask_secrets
from forecache.workers.memory.arena.cold_size import CPU_SHARE, auto_cold_bytes

CONNECT_S = 3.0
GCS_ANSWER_S = 5.0


def check(config: ServeConfig) -> None:
    """Run all checks of this file that ``config`` needs.

    Raises:
        StartError: what is wrong and what to change.
        MemorySizeError: memory or `--arena-dir` is too small for any cold memory.
    """
    if config.address is not None:
        check_ray(config.address)
    check_port(config.host, config.port)
    memory, store_bytes = config.memory, config.object_store_bytes
    if memory.cold_bytes != "auto":
        cold_bytes = memory.cold_bytes + (memory.record_bytes if config.address is not None else 0)
        check_arena_dir(memory.arena_dir, cold_bytes, store_bytes, config.address)
    else:
        _check_writable(memory.arena_dir, "--arena-dir")
        if config.address is None:
            auto_cold_bytes(memory.arena_dir, share=CPU_SHARE, claimed_room=store_room(memory.arena_dir, store_bytes))
    if config.memory.disk_bytes:
        check_disk_dir(config.memory.disk_dir, config.memory.disk_bytes)
    Tenants.load(config.limits.api_keys_file)
    if config.redis_url is not None:
        check_redis(config.redis_url)


def check_listens(address: str) -> None:
    """Raise :class:`StartError` when ``address`` is not HOST:PORT, or nothing listens there.

    Skips ``auto``, which :func:`check_ray` resolves.
    """
    if address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise StartError(
            f"--address {address} is not the address of a Ray cluster: write HOST:PORT of its head, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise _no_ray(address, error.strerror or str(error)) from error


def check_ray(address: str) -> None:
    """Raise :class:`StartError` when no Ray cluster answers at ``address``; Ray itself would wait for minutes."""
    check_listens(address)

    import grpc  # with Ray, this takes seconds
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    try:
        found = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise _no_ray(address, "none runs on this machine") from error
    check_listens(found)
    with init_grpc_channel(found, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            head = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            head.CheckAlive(CheckAliveRequest(), timeout=GCS_ANSWER_S)
        except grpc.RpcError as error:
            # Ray reports other errors better, such as a missing token
            if error.code() in (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.UNIMPLEMENTED,
            ):
                raise _no_ray(
                    found, "whatever listens there is not a Ray head, or has another version of Ray"
                ) from error


def _no_ray(address: str, reason: str) -> StartError:
    return StartError(
        f"no Ray cluster is at --address {address} ({reason}): start one with `ray start --head`, correct the address, "
        "or leave --address out to start Ray on this machine"
    )


def check_port(host: str, port: int) -> None:
    """Raise :class:`StartError` when the server can't listen on ``port``."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartError(
            f"can't listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from error


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_redis(url: str, timeout_s: float = 3.0) -> None:
    """Raise :class:`StartError` when no Redis answers at ``url``."""
    shown = mask_secrets(url)
    try:
        with redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            client.ping()
    except ValueError as error:
        raise StartError(f"--redis-url {shown} is not a Redis URL: {mask_secrets(str(error))}") from error
    except redis.RedisError as error:
        reason = mask_secrets(str(error))
        raise StartError(
            f"no Redis answers at {shown} ({reason}): start it, correct --redis-url, or leave it out to use the "
            "embedded server"
        ) from error


def check_arena_dir(directory: Path, cold_bytes: int, object_store_bytes: int, address: str | None) -> None:
    """Raise :class:`StartError` when the arena does not fit ``directory``.

    A Ray that we start puts its object store into `/dev/shm` too. Sizes are in bytes.
    """
    _check_writable(directory, "--arena-dir")
    store_bytes = 0 if address is not None else store_room(directory, object_store_bytes)
    needed = cold_bytes + store_bytes
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StartError(
            f"{directory} is too small: {_gib(needed)} needed ({needed} bytes: --cold-bytes {cold_bytes}"
            f"{f' and {store_bytes} for Ray' if store_bytes else ''}), {_gib(free)} free; lower --cold-bytes, make "
            f"{directory} larger, or choose another memory-backed --arena-dir"
        )


def store_room(directory: Path, object_store_bytes: int) -> int:
    """Bytes that the object store of a Ray on this machine takes of the file system of ``directory``."""
    return object_store_bytes if directory.stat().st_dev == Path("/dev/shm").stat().st_dev else 0


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def check_disk_dir(directory: Path, disk_bytes: int) -> None:
    """Raise :class:`StartError` when ``directory`` has no room for ``disk_bytes``."""
    _check_writable(directory, "--disk-dir")
    if disk_bytes > (free := shutil.disk_usage(directory).free):
        raise StartError(
            f"--disk-dir {directory} is too small: {_gib(disk_bytes)} needed (--disk-bytes), {_gib(free)} free; lower "
            "--disk-bytes, or choose another --disk-dir"
        )


def _check_writable(directory: Path, flag: str) -> None:
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise StartError(f"{flag} {directory} is not a directory that can be written to")
