"""Aliases: names that split traffic between adapters or generations, sticky by a key. Kept in the store's folder."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from embedft.adapters.store import check_name
from embedft.errors import AdapterNotFound, InputInvalid
from embedft.files import locked, write_text

FILE = "aliases.json"
MAX_VARIANTS = 16
Table = dict[str, dict[str, int]]


class Aliases:
    """Name → {variant: share}. A variant is an adapter's name or `name@generation`; shares are whole numbers.

    Servers of one store share them: a change is made to what the file holds by then, and brings here what others put there.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        self.all: Table = {}
        self.damaged: str | None = None
        try:
            self.all = self._read()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            self.damaged = f"{FILE} in the store is damaged, so no alias is served: {error}"

    def put(self, name: str, variants: Mapping[str, int]) -> None:
        check_name(name)
        if not 1 <= len(variants) <= MAX_VARIANTS or sum(variants.values()) <= 0 or min(variants.values()) < 0:
            raise InputInvalid("alias_invalid", f"an alias has 1 to {MAX_VARIANTS} variants, and one share above 0", "variants")
        self._change(lambda kept: {**kept, name: dict(variants)})

    def delete(self, name: str) -> None:
        if name not in self.all:
            raise AdapterNotFound(name[:80], list(self.all))
        self._change(lambda kept: {other: variants for other, variants in kept.items() if other != name})

    def pick(self, name: str, key: str | None) -> str:
        """The variant that answers `key`, always the same for it; any, by the shares, without one."""
        variants = self.all[name]
        total = sum(variants.values())
        drawn = int.from_bytes(hashlib.sha256(f"{name}\0{key}".encode()).digest()[:8]) % total if key else secrets.randbelow(total)
        for variant, share in variants.items():
            drawn -= share
            if drawn < 0:
                return variant
        raise AssertionError("shares that do not add up")

    def _read(self) -> Table:
        if not self._path.is_file():
            return {}
        found = json.loads(self._path.read_text(encoding="utf-8"))
        return {str(name): {str(one): int(share) for one, share in parts.items()} for name, parts in found.items()}

    def _change(self, change: Callable[[Table], Table]) -> None:
        """On disk first, under the store's lock: what a client was told is never lost. A damaged file is written anew."""
        with locked(self._path.with_name(".lock")):
            try:
                kept = self._read()
            except (ValueError, AttributeError, TypeError):
                kept = self.all
            changed = change(kept)
            write_text(self._path, json.dumps(changed, indent=2) + "\n")
        self.all, self.damaged = changed, None
