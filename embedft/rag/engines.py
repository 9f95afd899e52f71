"""What RAG asks of an engine, whether it runs in this process or behind a URL. Knows no index and no llama-index."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedft.encode import InputType

Rows = NDArray[np.float32]
Chat = Sequence[Mapping[str, str]]  # [{"role": …, "content": …}, …]


@dataclass(frozen=True)
class Vectors:
    """`rows` (n, d). `lineage` is theirs; `documents` the lineage of the document vectors that they may be compared with.

    `made_by`: what the engine calls the base or adapter, such as legal@3f9c…; `truncated`: inputs that lost tokens.
    """

    rows: Rows
    lineage: str
    documents: str
    made_by: str
    truncated: int = 0


class Embedder(Protocol):
    """Texts → vectors by the base (`adapter` None) or an adapter."""

    def embed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors: ...

    async def aembed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors: ...

    def document_lineage(self, adapter: str | None) -> tuple[str, str]:
        """(lineage of the documents' vectors, who makes them)."""
        ...


class Reader(Protocol):
    """A conversation → its next turn by the base (`adapter` None) or an adapter; `options` are OpenAI's: max_tokens, temperature, …"""

    def chat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str: ...

    async def achat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str: ...

    def stream(self, messages: Chat, *, adapter: str | None, **options: Any) -> Iterator[str]: ...

    def astream(self, messages: Chat, *, adapter: str | None, **options: Any) -> AsyncIterator[str]: ...


class Labelled(list[float]):
    """One query vector that says where it comes from; passes through llama-index's dataclasses as it is."""

    def __init__(self, row: Sequence[float], *, lineage: str, documents: str, made_by: str) -> None:
        super().__init__(row)
        self.lineage, self.documents, self.made_by = lineage, documents, made_by

    @classmethod
    def of(cls, vectors: Vectors) -> "list[Labelled]":
        labels = {"lineage": vectors.lineage, "documents": vectors.documents, "made_by": vectors.made_by}
        return [cls(row, **labels) for row in vectors.rows.tolist()]
