"""Vectors by one base or adapter: prompts, truncation and dimensions as in training. Knows no HTTP of clients."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embedft.encode import EncodeSettings, TextPreparer
from embedft.errors import InputInvalid
from embedft.vectors import unit, vector_kind
from serve.engine import BASE, Engine
from serve.resident import Resident

InputType = Literal["query", "document"]
INLINE_CHARACTERS = 4_000  # more text than this is tokenised in a thread
KEPT_PREPARERS = 128


@dataclass(frozen=True)
class Way:
    """How the vectors of one group are made. `model` is what the engine is asked for, `label` what the client is told."""

    engine: Engine
    resident: Resident | None
    model: str
    settings: EncodeSettings
    lineage: str
    dimensions: int | None

    @property
    def label(self) -> str:
        return BASE if self.model == BASE else self.model


@dataclass(frozen=True)
class Vectors:
    """`rows`: (inputs, dimensions) float32."""

    rows: NDArray[np.float32]
    tokens: int
    truncated: int


def way_of(engine: Engine, resident: Resident | None, *, input_type: InputType | None, dimensions: int | None) -> Way:
    """Apply the passport's rules. InputInvalid: input_type_required, dimensions_unsupported."""
    kind = vector_kind(
        engine.info,
        resident.passport if resident else None,
        resident.generation if resident else None,
        input_type=input_type,
        dimensions=dimensions,
        max_length=engine.max_length,
        name=resident.name if resident else "",
    )
    model = resident.id if resident and kind.by_adapter else BASE
    return Way(engine, resident, model, kind.settings, kind.lineage, kind.dimensions)


class Preparers:
    """TextPreparers kept by what they depend on, which most adapters of a base share: each holds a tokenizer (6 MB for MiniLM's),
    and reading its file takes longer than a request may."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, frozenset[tuple[str, str]]], TextPreparer] = OrderedDict()

    async def of(self, way: Way) -> TextPreparer:
        key = (way.engine.name, way.settings.max_length, frozenset(way.settings.prompts.items()))
        found = self._kept.get(key)
        if found is None:
            found = await asyncio.to_thread(way.engine.preparer, way.settings)
            self._kept[key] = found
            while len(self._kept) > KEPT_PREPARERS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return found


async def embed(
    way: Way, inputs: Sequence[str] | Sequence[list[int]], preparers: Preparers, *, input_type: InputType | None, truncate: bool
) -> Vectors:
    """The vectors of `inputs` (texts, or token ids taken as they are) by one way. InputInvalid where they do not fit it."""
    ids, truncated = await _ids(way, inputs, preparers, input_type=input_type, truncate=truncate)
    rows = await way.engine.asked(lambda client: client.vectors(way.model, ids))
    if way.dimensions:
        rows = _cut(rows, way.dimensions, normalize=way.settings.normalize)
    return Vectors(rows, sum(map(len, ids)), truncated)


async def _ids(
    way: Way, inputs: Sequence[str] | Sequence[list[int]], preparers: Preparers, *, input_type: InputType | None, truncate: bool
) -> tuple[list[list[int]], int]:
    texts = [item for item in inputs if isinstance(item, str)]
    if not texts:
        return _own_ids(way, [item for item in inputs if not isinstance(item, str)], input_type), 0
    preparer = await preparers.of(way)
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        prepared = preparer.prepare(texts, input_type, truncate=truncate)
    else:
        prepared = await asyncio.to_thread(preparer.prepare, texts, input_type, truncate=truncate)
    return prepared.ids, prepared.truncated


def _own_ids(way: Way, rows: list[list[int]], input_type: InputType | None) -> list[list[int]]:
    if input_type and way.settings.prompts.get(input_type):
        raise InputInvalid("input_type_needs_text", f"the {input_type} prompt goes before a text: send texts, not token ids", "input")
    if any(len(row) > way.settings.max_length for row in rows):
        raise InputInvalid("input_too_long", f"an input has more than {way.settings.max_length} tokens", "input")
    return rows


def _cut(rows: NDArray[np.float32], dimensions: int, *, normalize: bool) -> NDArray[np.float32]:
    kept = rows[:, :dimensions]
    return unit(kept) if normalize else kept
