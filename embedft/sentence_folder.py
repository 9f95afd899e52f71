"""What sentence-transformers' files in a base folder say of its vectors: pooling, normalisation, prompts, length. Loads no weights.

Whatever else they ask for is refused here: a vector that lacks a published Dense layer is another model's, and looks like this one's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from embedft.errors import BaseError

Pooling = Literal["mean", "cls", "lasttoken"]
_OURS = ("Transformer", "Pooling", "Normalize", "Dropout")  # the last does nothing outside its own training
_DOCUMENT = ("document", "passage", "corpus")  # sentence-transformers' names for it, the first that is there counts


@dataclass(frozen=True)
class Published:
    """How a base's own vectors are made. `prompts`: query and document, where it has them."""

    pooling: Pooling
    normalize: bool
    prompts: Mapping[str, str]


def published(folder: Path, *, decoder: bool) -> Published:
    """A folder without modules.json is pooled by its kind, and normalised. BaseError where its vectors are made by what is not here."""
    if not (folder / "modules.json").is_file():
        return Published("lasttoken" if decoder else "mean", True, _prompts(folder))
    modules = cast("list[dict[str, Any]]", _read(folder, "modules.json", list))
    kinds: list[str] = []
    pooling: Pooling = "mean"
    for module in modules:
        origin, _, kind = str(module.get("type")).rpartition(".")
        if kind not in _OURS or not origin.startswith("sentence_transformers"):
            raise BaseError(_refusal(folder, f"its modules.json has {module.get('type')}, which no engine here computes"))
        kinds.append(kind)
        if kind == "Pooling":
            pooling = _pooling(folder, str(module.get("path", "")))
    return Published(pooling, "Normalize" in kinds, _prompts(folder))


def longest(folder: Path) -> int | None:
    """Tokens of a text that it reads, where its files say so."""
    given = _read(folder, "sentence_bert_config.json", dict).get("max_seq_length")
    return int(given) if given else None


def _pooling(folder: Path, path: str) -> Pooling:
    config = _read(folder, f"{path}/config.json", dict)
    given = config.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given
    if modes is None:  # a flag for each, as versions before 6 write them
        flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [flag.removesuffix("s").removesuffix("_token") for flag in flags]
    if len(modes or ["mean"]) > 1 or (modes and modes[0] not in get_args(Pooling)):
        raise BaseError(_refusal(folder, f"it pools by {' and '.join(map(str, modes))}, and here is {', '.join(get_args(Pooling))}"))
    if config.get("include_prompt") is False:
        raise BaseError(_refusal(folder, "it leaves the prompt's tokens out when it pools, which no engine here does"))
    return cast("Pooling", modes[0]) if modes else "mean"


def _prompts(folder: Path) -> dict[str, str]:
    given = cast("dict[str, str | None]", _read(folder, "config_sentence_transformers.json", dict).get("prompts") or {})
    found = {"query": given.get("query"), "document": next((given[name] for name in _DOCUMENT if given.get(name) is not None), None)}
    return {kind: text for kind, text in found.items() if text}


def _read(folder: Path, name: str, kind: type) -> Any:
    """The JSON of a file, empty where there is none. BaseError where it is no such thing."""
    path = folder / name
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise BaseError(f"{folder.name}/{name} is damaged: expected a JSON {'object' if kind is dict else 'list'}")
    return found


def _refusal(folder: Path, why: str) -> str:
    return f"{folder.name} cannot be a base as it was published: {why}; a copy without modules.json is its bare transformer"
