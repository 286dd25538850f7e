"""API keys and their tenants. The file holds SHA-256 hashes; keys are long and random, so they need no slow hash."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from forecache.cluster.config import parse_bytes, yaml_fault
from forecache.cluster.errors import AuthenticationError, StartError
from forecache.workers.memory.arena.ledger import TENANT_MARK

KEY_PREFIX = "fc-"


class Tenant(BaseModel):
    """The owner of an API key, and its limits. Tenants share no chunks, because the name is part of the cache salt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.@-]{1,128}$")
    max_concurrent: int | None = Field(None, ge=1, description="answers under way at once")
    max_resident_bytes: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, ge=1, description="hot K/V that its requests may come to hold at once"
    )

    def scoped_name(self, name: str) -> str:
        """``name`` of a cache salt or session, made unique among all tenants."""
        return f"{self.name}{TENANT_MARK}{name}"


class Anonymous(Tenant):
    """The only tenant of a server without API keys."""

    name: str = ""

    def scoped_name(self, name: str) -> str:
        return name


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Tenant


def entry(key_sha256: str, tenant: str) -> str:
    """The line of a keys file for a key of ``tenant`` with this hash.

    Raises:
        StartError: the name is not allowed.
    """
    try:
        made = _Entry(key_sha256=key_sha256, tenant=Tenant(name=tenant))
    except ValidationError as error:
        raise StartError(
            f"--tenant {tenant!r} is no name of a tenant: 1 to 128 letters, digits and any of . _ @ -"
        ) from error
    flow = yaml.safe_dump(made.model_dump(exclude_none=True), default_flow_style=True, width=10_000)
    return f"- {flow.strip()}"


class Tenants:
    """Finds the tenant of a request by its API key. ``entries``: (SHA-256 of a key, its tenant); None: no keys."""

    def __init__(self, entries: Sequence[tuple[str, Tenant]] | None) -> None:
        self._entries = entries

    @classmethod
    def load(cls, file: Path | None) -> "Tenants":
        """Read the keys in ``file``. Without a file, requests need no key.

        Raises:
            StartError: the file can't be read, is not a list of hashes and tenants, or is empty.
        """
        if file is None:
            return cls(None)
        try:
            values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
            entries = TypeAdapter(list[_Entry]).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise StartError(f"--api-keys-file {file} can't be used: {where or 'it'}: {first['msg']}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise StartError(f"--api-keys-file {file} can't be used: {yaml_fault(error)}") from error
        if not entries:
            raise StartError(f"--api-keys-file {file} holds no key: add one with `forecache keys new`")
        return cls([(entry.key_sha256, entry.tenant) for entry in entries])

    def of(self, authorization: str | None) -> Tenant:
        """The tenant of an ``Authorization`` header. Takes equally long for known and unknown keys.

        Raises:
            AuthenticationError: the header has no key, or an unknown one.
        """
        if self._entries is None:
            return Anonymous()
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = None
        for digest, tenant in self._entries:
            if hmac.compare_digest(digest, given):
                found = tenant
        if scheme.lower() != "bearer" or found is None:
            raise AuthenticationError("a valid API key is needed: send it as `Authorization: Bearer KEY`")
        return found


def read_key(file: Path | None) -> str | None:
    """The API key in ``file``; None without a file. Raises :class:`AuthenticationError` if it can't be read."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(f"--api-key-file {file} can't be read: {error}") from error


def authorization(api_key: str | None) -> dict[str, str]:
    """The HTTP headers of a client with ``api_key``; empty without one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def new_key() -> tuple[str, str]:
    """A new random key, and its hash for the keys file."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, _digest(key)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
