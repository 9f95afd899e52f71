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
State = tuple[int, int, int] | None


class Aliases:
    """Name → {variant: share}. A variant is an adapter's name or `name@generation`; shares are whole numbers.

    Servers of one store share them: a change is made to what the file holds by then, and what others put there is seen at the next look.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        self.damaged: str | None = None
        self._all: Table = {}
        self._state: State = None
        self._look()

    @property
    def all(self) -> Table:
        """As the file has them: one stat of it. Where it cannot be read, or is gone with its store, as it had them last."""
        if self._state_now() not in (None, self._state):
            self._look()
        return self._all

    def put(self, name: str, variants: Mapping[str, int]) -> None:
        check_name(name)
        if not _sound(variants):
            raise InputInvalid("alias_invalid", f"an alias has 1 to {MAX_VARIANTS} variants, and one share above 0", "variants")
        self._change(lambda kept: {**kept, name: dict(variants)})

    def delete(self, name: str) -> None:
        if name not in (known := self.all):
            raise AdapterNotFound(name[:80], list(known))
        self._change(lambda kept: {other: variants for other, variants in kept.items() if other != name})

    def _look(self) -> None:
        self._state = self._state_now()
        try:
            self._all, self.damaged = self._read(), None
        except (OSError, ValueError, AttributeError, TypeError) as error:
            self.damaged = f"{FILE} in the store is damaged, so what it says is not served: {error}"

    def _state_now(self) -> State:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _read(self) -> Table:
        if not self._path.is_file():
            return {}
        found = json.loads(self._path.read_text(encoding="utf-8"))
        table: Table = {str(name): {str(one): int(share) for one, share in parts.items()} for name, parts in found.items()}
        if wrong := [name for name, variants in table.items() if not _sound(variants)]:
            raise ValueError(f"the shares of {wrong[0]!r} are none")
        return table

    def _change(self, change: Callable[[Table], Table]) -> None:
        """On disk first, under the store's lock: what a client was told is never lost. A damaged file is written anew."""
        with locked(self._path.with_name(".lock")):
            try:
                kept = self._read()
            except (ValueError, AttributeError, TypeError):
                kept = self._all
            changed = change(kept)
            write_text(self._path, json.dumps(changed, indent=2) + "\n")
            self._all, self.damaged, self._state = changed, None, self._state_now()


def _sound(variants: Mapping[str, int]) -> bool:
    return 1 <= len(variants) <= MAX_VARIANTS and sum(variants.values()) > 0 and min(variants.values()) >= 0


def pick(name: str, variants: Mapping[str, int], key: str | None) -> str:
    """The variant of the alias `name` that answers `key`, always the same for it; any, by the shares, without one."""
    total = sum(variants.values())
    drawn = int.from_bytes(hashlib.sha256(f"{name}\0{key}".encode()).digest()[:8]) % total if key else secrets.randbelow(total)
    for variant, share in variants.items():
        drawn -= share
        if drawn < 0:
            return variant
    raise AssertionError("shares that do not add up")
