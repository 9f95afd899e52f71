"""Who asks: tenants, their keys (only hashes are kept) and what each may use. Knows no route and no queue.

A key is 256 random bits, so a plain sha256 of it can be neither guessed nor looked up; a slow hash would add nothing.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from embedft.errors import NotAuthorized, UsageError
from embedft.strict_yaml import read_yaml
from serve.fields import told
from serve.limiter import Buckets

ENVIRONMENT = "EMBEDFT_KEYS"  # the keys file's content, where there is no file
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TenantLimits(_Part):
    """None: no limit of this tenant's own. Tokens are those of prompts and answers together."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrency: PositiveInt | None = None


class TenantEntry(_Part):
    """One tenant of the keys file. `adapters`, `bases` and `indexes` are names in which `*` stands for anything.

    `priority` is its weight where requests wait: 2 gets twice the tokens of 1.
    """

    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    key_sha256: Digest | tuple[Digest, ...]
    admin: bool = False
    adapters: tuple[str, ...] = ()
    bases: tuple[str, ...] = ("*",)
    indexes: tuple[str, ...] = ()
    limits: TenantLimits = TenantLimits()
    priority: Annotated[int, Field(ge=1, le=100)] = 1


class KeysFile(_Part):
    tenants: tuple[TenantEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> "KeysFile":
        names = [entry.tenant for entry in self.tenants]
        digests = [digest for entry in self.tenants for digest in _digests(entry)]
        if len(set(names)) != len(names) or len(set(digests)) != len(digests):
            raise ValueError("two tenants of one name, or one key twice")
        if not any(entry.admin for entry in self.tenants):
            raise ValueError("no tenant has admin: true, so nobody could change what is served")
        return self


@dataclass(eq=False)
class Tenant:
    """One who asks. `running` counts its requests under way, `held` the bytes of their bodies."""

    name: str
    admin: bool = False
    adapters: tuple[str, ...] = ("*",)
    bases: tuple[str, ...] = ("*",)
    indexes: tuple[str, ...] = ("*",)
    limits: TenantLimits = field(default_factory=TenantLimits)
    weight: int = 1
    running: int = 0
    held: int = 0
    buckets: Buckets = field(default_factory=Buckets)

    def may_use(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.adapters)

    def may_ask(self, base: str) -> bool:
        return self.admin or _matches(base, self.bases)

    def may_search(self, index: str) -> bool:
        return self.admin or _matches(index, self.indexes)


class Tenants:
    """All tenants by their keys. `keyed` False: no keys, one local user; then `token` is what changes need."""

    def __init__(self, entries: Sequence[TenantEntry] = (), *, token: str = "", salt_secret: bytes | None = None) -> None:
        self.keyed = bool(entries)
        self.local = Tenant("local")
        self._token = hashlib.sha256(token.encode()).digest() if token else None
        self._salt = salt_secret or secrets.token_bytes(32)
        self._known: list[tuple[bytes, Tenant]] = []
        for entry in entries:
            buckets = Buckets(entry.limits.requests_per_minute, entry.limits.tokens_per_minute)
            tenant = Tenant(
                entry.tenant, entry.admin, entry.adapters, entry.bases, entry.indexes, entry.limits, entry.priority, buckets=buckets
            )
            self._known += [(bytes.fromhex(digest), tenant) for digest in _digests(entry)]

    def identify(self, authorization: str) -> Tenant:
        """The tenant of an `Authorization` header. NotAuthorized. Every key is compared, in constant time, whichever fits."""
        if not self.keyed:
            return self.local
        given = _hashed(authorization)
        found: Tenant | None = None
        for digest, tenant in self._known:
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise NotAuthorized("no such key: send yours as `Authorization: Bearer …`")
        return found

    def is_admin(self, authorization: str, tenant: Tenant) -> bool:
        """Whether changes are allowed: by an admin's key, or without keys by the token that was printed at the start."""
        if self.keyed:
            return tenant.admin
        return self._token is not None and hmac.compare_digest(self._token, _hashed(authorization))

    def salt(self, tenant: Tenant) -> str:
        """What an engine mixes into its prefix cache's keys, so that no tenant can tell by time what another has asked."""
        return hmac.new(self._salt, tenant.name.encode(), hashlib.sha256).hexdigest()[:32]


def read_keys(path: Path | None) -> tuple[TenantEntry, ...]:
    """The tenants of the keys file, else of $EMBEDFT_KEYS, else none. UsageError with all that is wrong."""
    where = str(path) if path else f"${ENVIRONMENT}"
    try:
        text = path.read_text(encoding="utf-8") if path else os.environ.get(ENVIRONMENT, "")
        content: Any = read_yaml(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{where} cannot be read: {str(error).splitlines()[0]}") from None
    if path is None and content is None:
        return ()
    try:
        return KeysFile.model_validate(content).tenants
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)  # a key pasted for its hash is not repeated
        problems = [f"{'.'.join(map(str, item['loc'])) or 'keys'}: {told(item, KeysFile)}" for item in found]
        raise UsageError(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems)) from None


def new_key() -> tuple[str, str]:
    """(a fresh key, its sha256 for the keys file)."""
    key = f"ef-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def entry_for(tenant: str, digest: str, *, admin: bool, adapters: Sequence[str]) -> dict[str, Any]:
    """The keys file's entry, as plain data. UsageError where the name is none."""
    try:
        entry = TenantEntry(tenant=tenant, key_sha256=digest, admin=admin, adapters=tuple(adapters))
    except ValidationError:
        raise UsageError(f"{tenant!r} is no tenant's name: 1 to 64 letters, digits, '.', '_' or '-'") from None
    return entry.model_dump(mode="json", exclude_unset=True, exclude_defaults=True)


def _hashed(authorization: str) -> bytes:
    scheme, _, given = authorization.partition(" ")
    return hashlib.sha256(given.strip().encode() if scheme.lower() == "bearer" else b"").digest()


def _digests(entry: TenantEntry) -> tuple[str, ...]:
    return (entry.key_sha256,) if isinstance(entry.key_sha256, str) else entry.key_sha256


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return "*" in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
