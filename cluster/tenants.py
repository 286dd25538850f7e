"""API keys: whose request is this? The file holds hashes; keys are long and random, so that one round is enough."""

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
    """Who a request is for. Tenants share no chunk: the name is part of their cache salt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.@-]{1,128}$")
    max_concurrent: int | None = Field(None, ge=1, description="answers under way at once")
    max_resident_bytes: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, ge=1, description="hot K/V that its requests may come to hold at once"
    )

    def own(self, asked: str) -> str:
        """What its cache salt or session of this name is called among those of all tenants."""
        return f"{self.name}{TENANT_MARK}{asked}"


class Anybody(Tenant):
    """Where no keys are asked for."""

    name: str = ""

    def own(self, asked: str) -> str:
        return asked


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Tenant


def entry(key_sha256: str, tenant: str) -> str:
    """The line of a keys file for a key with this hash, of the tenant of this name.

    Raises:
        StartError: no tenant can have that name.
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
    """The keys of a file, or nobody's."""

    def __init__(self, entries: Sequence[tuple[str, Tenant]] | None) -> None:
        self._entries = entries

    @classmethod
    def load(cls, file: Path | None) -> "Tenants":
        """The keys in ``file``; without one, everybody may come.

        Raises:
            StartError: it can't be read, or is not a list of hashes and tenants.
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
        """Whose ``Authorization`` header this is. Takes as long for any key, known or not.

        Raises:
            AuthenticationError: no key, or none of ours.
        """
        if self._entries is None:
            return Anybody()
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
    """A client's key, if it has a file of one. Raises :class:`AuthenticationError` when that can't be read."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(f"--api-key-file {file} can't be read: {error}") from error


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers of a client with this key, if it has one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def new_key() -> tuple[str, str]:
    """A fresh key, and its hash for the file."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, _digest(key)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
