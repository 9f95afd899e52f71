"""The passport: what an adapter was trained on and how it must be used; its generation and its vectors' lineage. Loads no model."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedft.errors import AdapterInvalid
from embedft.files import HeaderInvalid, hash_json, hash_tensors

PASSPORT = "passport.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TEXTS = "texts.jsonl"  # in eval/: the only file that carries training or evaluation texts
Side = Literal["both", "query"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BaseIdentity(_Part):
    """The base trained on: `model` a built-in's name or a hub id; fingerprints of 64 hex digits."""

    model: str
    revision: str | None = None
    quantization: str = "none"
    fingerprint: str
    parent: str | None = None

    @property
    def said(self) -> str:
        return base_said(self.model, self.quantization, self.fingerprint)


class ProbeRecord(_Part):
    """How the probes were recorded. `sensitivity`: module type → relative change of the effect when that type is dropped."""

    kind: Literal["embedding", "causal_lm"]
    count: int
    tolerance: float
    sensitivity: dict[str, float] = {}


class Passport(_Part):
    """`r` and `alpha` are 0 where the method has none."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str
    task: Literal["embedding", "causal_lm"]
    base: BaseIdentity
    method: str
    r: int
    alpha: float
    side: Side = "both"
    prompts: dict[str, str] = {}
    pooling: Literal["mean", "cls", "lasttoken"] | None = None
    normalize: bool | None = None
    max_length: int
    dimensions: tuple[int, ...] = ()
    template_hash: str | None = None
    data_hash: str | None = None
    recipe_hash: str | None = None
    metrics: dict[str, Any] = {}
    probes: ProbeRecord | None = None
    versions: dict[str, str] = {}
    created: str = ""
    unproven: bool = False

    def write(self, folder: Path) -> None:
        content = self.model_dump(mode="json", by_alias=True)
        (folder / PASSPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def base_said(model: str, quantization: str, fingerprint: str) -> str:
    """A base as messages name it: minilm in nf4 (3f9c2a1b7d40…)."""
    return f"{model}{'' if quantization == 'none' else f' in {quantization}'} ({fingerprint[:12]}…)"


# Passport fields that change what an adapter answers; metrics and dates do not.
_OUTPUT_FIELDS = ("task", "method", "side", "prompts", "pooling", "normalize", "max_length", "dimensions", "template_hash")


def read_passport(folder: Path, *, name: str | None = None) -> Passport:
    """The passport of an adapter folder. AdapterInvalid where it is absent or malformed."""
    path = folder / PASSPORT
    called = name or folder.name
    if not path.is_file():
        plain = ": plain PEFT's is imported with --base, --task and --name" if (folder / CONFIG).is_file() else ""
        raise AdapterInvalid(called, f"it holds no {PASSPORT}, so it was not written by embedft{plain}")
    try:
        return Passport.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).replace("\n", " ")[:200]
        raise AdapterInvalid(called, f"its {PASSPORT} is malformed: {first}") from None


def generation(folder: Path) -> str:
    """sha256 (64 hex) over the adapter's weights, its PEFT config and the passport fields that change outputs."""
    passport = read_passport(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fields = passport.model_dump(mode="json", include=set(_OUTPUT_FIELDS))
        return hash_tensors([folder / WEIGHTS], then=[hash_json([config, passport.base.fingerprint, fields]).encode()])
    except (OSError, HeaderInvalid, ValueError) as error:
        raise AdapterInvalid(passport.name, f"its weights or config cannot be read: {error}") from None


def lineage(
    base_fingerprint: str,
    generation: str | None,
    *,
    side: Side,
    prompts: Mapping[str, str],
    pooling: str,
    max_length: int,
    dimensions: Sequence[int],
    normalize: bool,
) -> str:
    """sha256 (64 hex): the identity of a vector. Two vectors may be compared only where their lineage is the same.

    `generation` None is the base. Callers get it through embedft.vectors, which knows whose vectors a query-only adapter's documents are.
    """
    return _lineage(base_fingerprint, generation, side, tuple(prompts.items()), pooling, max_length, tuple(dimensions), normalize)


@lru_cache(maxsize=4096)
def _lineage(
    base: str,
    generation: str | None,
    side: Side,
    prompts: tuple[tuple[str, str], ...],
    pooling: str,
    max_length: int,
    dimensions: tuple[int, ...],
    normalize: bool,
) -> str:
    return hash_json([base, generation, side, dict(prompts), pooling, max_length, list(dimensions), normalize])
