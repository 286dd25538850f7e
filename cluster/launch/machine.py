"""What a start needs of this machine and of the addresses that it is given: quick to look at, before slow imports."""

import os
import shutil
import socket
from pathlib import Path

import redis

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.http.tenants import Tenants
from forecache.workers.masking import mask_secrets

CONNECT_S = 3.0
GCS_ANSWER_S = 5.0


def check(config: ServeConfig) -> None:
    """Everything here.

    Raises:
        StartError: what is wrong and what to change.
    """
    if config.address is not None:
        check_ray(config.address)
    check_port(config.host, config.port)
    cold_bytes = config.memory.cold_bytes + (config.memory.record_bytes if config.address is not None else 0)
    check_arena_dir(config.memory.arena_dir, cold_bytes, config.object_store_bytes, config.address)
    if config.memory.disk_bytes:
        check_disk_dir(config.memory.disk_dir, config.memory.disk_bytes)
    Tenants.load(config.limits.api_keys_file)
    if config.redis_url is not None:
        check_redis(config.redis_url)


def check_listens(address: str) -> None:
    """Raises :class:`StartError` when ``address`` is no address of a Ray cluster, or none listens there.

    ``auto`` is a matter of :func:`check_ray`.
    """
    if address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise StartError(f"--address {address} is no address of a Ray cluster: write HOST:PORT of its head, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise _no_ray(address, error.strerror or str(error)) from error


def check_ray(address: str) -> None:
    """Raises :class:`StartError` when no Ray cluster answers at ``address``: Ray itself waits for minutes."""
    check_listens(address)

    import grpc  # with Ray, seconds
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
            # what else it may say, as that a token is missing, is for Ray to tell
            if error.code() in (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.UNIMPLEMENTED,
            ):
                raise _no_ray(found, "what listens there is no Ray head, or a Ray of another version") from error


def _no_ray(address: str, reason: str) -> StartError:
    return StartError(
        f"no Ray cluster is at --address {address} ({reason}): start one with `ray start --head`, correct the address, "
        "or leave it out to start a Ray on this machine"
    )


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
    shown = mask_secrets(url)
    try:
        with redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            client.ping()
    except ValueError as error:
        raise StartError(f"--redis-url {shown} is no Redis URL: {mask_secrets(str(error))}") from error
    except redis.RedisError as error:
        reason = mask_secrets(str(error))
        raise StartError(
            f"no Redis answers at {shown} ({reason}): start it, correct --redis-url, or leave it out to use the "
            "embedded server"
        ) from error


def check_arena_dir(directory: Path, cold_bytes: int, object_store_bytes: int, address: str | None) -> None:
    """Raises :class:`StartError` when the arena does not fit this machine's shared memory.

    Ray's object store takes its share of `/dev/shm` too, when Ray is started here.
    """
    _check_writable(directory, "--arena-dir")
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


def check_disk_dir(directory: Path, disk_bytes: int) -> None:
    """Raises :class:`StartError` when chunks can't be kept there."""
    _check_writable(directory, "--disk-dir")
    if disk_bytes > (free := shutil.disk_usage(directory).free):
        raise StartError(
            f"--disk-dir {directory} is too small: {_gib(disk_bytes)} needed (--disk-bytes), {_gib(free)} free; lower "
            "--disk-bytes, or choose another --disk-dir"
        )


def _check_writable(directory: Path, flag: str) -> None:
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise StartError(f"{flag} {directory} is not a directory that can be written to")
