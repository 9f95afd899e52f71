"""What sentence-transformers' files in a base folder say of its vectors: pooling, normalisation, prompts, length. Loads no weights.

Whatever else they ask for is refused here: a vector that lacks a published Dense layer is another model's, and looks like this one's.
A cross-encoder's folder says nothing of vectors: who loads it for them refuses it (`scores_pairs`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from embedft.errors import BaseError

Pooling = Literal["mean", "cls", "lasttoken"]
_OURS = ("Transformer", "Pooling", "Normalize", "Dropout")  # the last does nothing outside its own training
_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # old versions name their settings by them
_CONFIG = "config_sentence_transformers.json"
FILES = ("modules.json", _CONFIG, "sentence_bert_config.json", "tokenizer_config.json", "1_Pooling/config.json")  # as it saves an adapter
_OUTPUT = {"module_output_name": "token_embeddings", "method_output_name": "last_hidden_state"}
_ENDLESS = 1 << 30  # what a tokenizer that knows no length says is far beyond it
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
        if kind == "Transformer" and module.get("path"):
            raise BaseError(_refusal(folder, f"its transformer lies in {module['path']}: copy that folder's files beside modules.json"))
        if kind == "Pooling":
            pooling = _pooling(folder, str(module.get("path", "")))
    if not scores_pairs(folder):
        if "Pooling" not in kinds:
            raise BaseError(_refusal(folder, "its modules.json has no Pooling, so it makes a vector of each token"))
        _check_transformer(folder)
        _check_comparison(folder, normalize="Normalize" in kinds)
    return Published(pooling, "Normalize" in kinds, _prompts(folder))


def scores_pairs(folder: Path) -> bool:
    """Whether its files call it a cross-encoder, which makes no vectors."""
    task = _settings(folder).get("transformer_task")
    return task == "sequence-classification" or _read(folder, _CONFIG, dict).get("model_type") == "CrossEncoder"


def longest(folder: Path, *, decoder: bool) -> int | None:
    """Tokens of a text that it reads, where its files say so: its settings, or, as version 6 saves them, its tokenizer's.

    The tokenizer of a language model that is no published embedder says what it was trained on, not what it reads.
    """
    given = _settings(folder).get("max_seq_length")
    if not given and ((folder / "modules.json").is_file() or not decoder):
        given = _read(folder, "tokenizer_config.json", dict).get("model_max_length")
    return int(given) if given and given < _ENDLESS else None


def _settings(folder: Path) -> dict[str, Any]:
    """The transformer's settings: of the files that may hold them the first that is there counts."""
    files = (_read(folder, f"sentence_{family}_config.json", dict) for family in _FAMILIES)
    return next((found for found in files if found), {})


def _check_transformer(folder: Path) -> None:
    """That a text's tokens go in as they are and their last states come out."""
    settings = _settings(folder)
    text = (settings.get("modality_config") or {}).get("text") or {}
    for name, ours in _OUTPUT.items():
        if (given := {**text, **settings}.get(name, ours)) != ours:
            raise BaseError(_refusal(folder, f"its {name} is {given}, and here it is {ours}"))
    for name in ("query_length", "document_length"):
        if settings.get(name):
            raise BaseError(_refusal(folder, f"it has a {name} of its own, and here queries and documents are of one length"))
    tokenizer = json.dumps(_read(folder, "tokenizer.json", dict).get("normalizer") if settings.get("do_lower_case") else "")
    if settings.get("do_lower_case") and not any(sign in tokenizer for sign in ('"type": "Lowercase"', '"lowercase": true')):
        raise BaseError(_refusal(folder, "it lower-cases texts (do_lower_case), which its tokenizer.json does not"))


def _check_comparison(folder: Path, *, normalize: bool) -> None:
    """That its vectors, all of their components, are compared by their cosine."""
    config = _read(folder, _CONFIG, dict)
    if config.get("truncate_dim"):
        raise BaseError(_refusal(folder, f"it keeps {config['truncate_dim']} components of a vector (truncate_dim), and here is all of it"))
    measure = config.get("similarity_fn_name") or "cosine"
    if measure != "cosine" and not (normalize and measure in ("dot", "euclidean")):
        raise BaseError(_refusal(folder, f"its vectors are compared by {measure} (similarity_fn_name), and here by their cosine"))


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
    given = cast("dict[str, str | None]", _read(folder, _CONFIG, dict).get("prompts") or {})
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
