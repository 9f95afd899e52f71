"""The regular expressions in an adapter's config: PEFT and vLLM match them with every layer's name, and Python's engine goes through all
the ways that one could match, holding every thread meanwhile. So one that a stranger wrote is measured before anybody tries it."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from embedft.adapters.passport import CONFIG
from embedft.errors import AdapterInvalid

MAX_BYTES = 1 << 20  # of a config
MAX_PATTERNS = 4096
MAX_WAYS = 1 << 27
NAME_LENGTH = 64  # of a layer: so many ways there are to end what repeats without end
_ENDLESS = MAX_WAYS + 1


def check_config(folder: Path, name: str) -> None:
    """PEFT's config is a JSON object of a size to expect, and its patterns are matched in no time. AdapterInvalid."""
    path = folder / CONFIG
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise AdapterInvalid(name, f"its {CONFIG} has {size} bytes: at most {MAX_BYTES}")
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(name, f"its {CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterInvalid(name, f"its {CONFIG} is no object")
    found = [*_patterns(config)]
    if len(found) > MAX_PATTERNS:
        raise AdapterInvalid(name, f"its {CONFIG} has {len(found)} patterns: at most {MAX_PATTERNS}")
    total = 0
    for option, pattern in found:
        try:
            total += ways_of(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterInvalid(name, f"{option} {pattern[:80]!r} in its {CONFIG} is no regular expression: {error}") from None
        if total > MAX_WAYS:  # all together: each is matched with every layer's name
            why = f"{option} {pattern[:80]!r} in its {CONFIG} may take hours to be matched: it repeats what repeats, or too much"
            raise AdapterInvalid(name, f"{why}; write the names of the layers")


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, regular expression) as PEFT puts them together."""
    for option in ("target_modules", "exclude_modules"):
        if isinstance(given := config.get(option), str):
            yield option, given
    for option in ("rank_pattern", "alpha_pattern"):
        if isinstance(given := config.get(option), dict):
            yield from ((option, rf"(.*\.)?({key})$") for key in given)
    layers = config.get("layers_pattern")
    for given in layers if isinstance(layers, list) else [layers]:
        if isinstance(given, str):
            yield "layers_pattern", rf".*\.{given}\.(\d+)\."


def ways_of(pattern: str) -> int:
    """At most so many ways are gone through before a pattern does not match a layer's name; above MAX_WAYS where nobody can tell."""
    return _ways(re._parser.parse(pattern))  # pyright: ignore


def _ways(parsed: Iterable[Any]) -> int:
    ways = 1
    for kind, given in parsed:
        ways *= _ways_of_one(str(kind), given)
        if ways > MAX_WAYS:
            return _ENDLESS
    return ways


def _ways_of_one(kind: str, given: Any) -> int:
    if kind.endswith("_REPEAT"):
        least, most, inner = given
        within = _ways(inner)
        if int(most) <= 1:
            return within + 1
        return _ENDLESS if within > 1 else min(int(most) - int(least) + 1, NAME_LENGTH)
    if kind == "BRANCH":
        return 1 if _exclusive(given[1]) else sum(map(_ways, given[1]))
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in given[1:] if part is not None)
    inner = given[-1] if isinstance(given, tuple) else given
    return _ways(inner) if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP") else 1


def _exclusive(branches: Iterable[Any]) -> bool:
    """Whether each of them is a plain text, and none the beginning of another: then one can match at most."""
    texts: list[tuple[int, ...]] = []
    for branch in branches:
        if any(str(kind) != "LITERAL" for kind, _ in branch):
            return False
        texts.append(tuple(code for _, code in branch))
    texts.sort()  # a text stands right before those that begin with it
    return all(later[: len(earlier)] != earlier for earlier, later in itertools.pairwise(texts))
