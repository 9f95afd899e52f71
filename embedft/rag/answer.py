"""A question and its chunks → a prompt with numbered passages, and an answer that cites them. Knows no engine's inside."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedft.rag.engines import Embedder, Labelled, Reader
from embedft.rag.index import Found, VectorIndex
from embedft.rag.search import Stages, search
from embedft.words import words

PROMPT = "Passages:\n{passages}\n\nQuestion: {question}"
PASSAGE_CHARACTERS = 1200


@dataclass(frozen=True)
class Source:
    """A passage that the answer may cite as [number]."""

    number: int
    document: str
    chunk: str
    score: float
    text: str
    section: str = ""


def sources_of(found: Sequence[Found]) -> list[Source]:
    return [
        Source(number, hit.chunk.document, hit.chunk.id, round(hit.score, 6), hit.chunk.text, str(hit.chunk.metadata.get("section", "")))
        for number, hit in enumerate(found, start=1)
    ]


def messages_of(question: str, sources: Sequence[Source]) -> list[dict[str, str]]:
    """The one user turn that is put to the reader."""
    passages = "\n".join(f"[{source.number}] {' '.join(source.text.split())[:PASSAGE_CHARACTERS]}" for source in sources)
    return [{"role": "user", "content": PROMPT.format(passages=passages or "(none)", question=question)}]


def cited(answer: str, sources: Sequence[Source]) -> list[int]:
    """Numbers of the passages that the answer names as [n], else of the one that shares most of its words."""
    known = {source.number for source in sources}
    named = [int(number) for number in re.findall(r"\[(\d+)\]", answer) if int(number) in known]
    if named:
        return list(dict.fromkeys(named))
    said = set(words(answer))
    shares = [(len(said.intersection(words(source.text))), -source.number) for source in sources]
    best = max(shares, default=(0, 0))
    return [-best[1]] if best[0] else []


def faithfulness(answer: str, sources: Sequence[Source]) -> float:
    """The share of the answer's distinct words that stand in the passages; 1 for an answer without words."""
    said = set(words(answer))
    if not said:
        return 1.0
    return len(said.intersection(word for source in sources for word in words(source.text))) / len(said)


def retrieve(index: VectorIndex, question: str, embedder: Embedder, *, adapter: str | None, stages: Stages) -> list[Source]:
    """The sources for one question. Raises what embedding and searching raise."""
    vector = None
    if stages.fusion != "sparse":
        vector = Labelled.of(embedder.embed([question], input_type="query", adapter=adapter))[0]
    return sources_of(search(index, question, vector, stages))


def stream_answer(question: str, sources: Sequence[Source], reader: Reader, *, adapter: str | None, **options: Any) -> Iterator[str]:
    yield from reader.stream(messages_of(question, sources), adapter=adapter, **options)
