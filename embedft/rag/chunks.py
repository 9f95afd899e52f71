"""Documents → chunks, by llama-index's node parsers: Markdown by sections, Python by definitions, all of it by sentences and size."""

import ast
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from embedft.rag.documents import Document
from embedft.rag.rows import Chunk
from embedft.words import UNSPACED

_PIECES = re.compile(rf"[{UNSPACED}]|[a-zA-Z0-9]{{1,6}}|[^\W_{UNSPACED}a-zA-Z0-9]{{1,3}}|[^\w\s]|_")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。？！])\s*|\n{2,}")


class Chunking(BaseModel):
    """In tokens, counted as a word-piece tokenizer roughly would: pieces of up to six English letters or of three others, punctuation
    marks, and each character of Chinese and Japanese."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=180, ge=16)
    overlap: int = Field(default=20, ge=0)

    @model_validator(mode="after")
    def _sound(self) -> "Chunking":
        if self.overlap >= self.size:
            raise ValueError(f"overlap {self.overlap} must be smaller than size {self.size}")
        return self


def chunks_of(documents: Sequence[Document], chunking: Chunking) -> Iterator[Chunk]:
    """`id`: the document's id, '#' and a number. What is embedded is the section's headings, then the text."""
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(
        chunk_size=chunking.size,
        chunk_overlap=chunking.overlap,
        tokenizer=_PIECES.findall,
        chunking_tokenizer_fn=sentences,  # its own reads NLTK's files, which NLTK refuses where the installer hard-linked them
    )
    for document in documents:
        number = 0
        for heading, text in _sections(document, chunking.size):
            for piece in splitter.split_text(text):
                if not piece.strip():
                    continue
                metadata: dict[str, Any] = {"section": heading} if heading else {}
                embedded = f"{heading}\n{piece}" if heading else None
                yield Chunk(f"{document.id}#{number}", document.id, piece, metadata, embedded)
                number += 1


def sentences(text: str) -> list[str]:
    """Split after sentence ends and blank lines; joined again they are the text."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if text[a:b]]


def _sections(document: Document, size: int) -> Iterator[tuple[str, str]]:
    """(headings, text) of each section."""
    if document.format in ("markdown", "html"):
        yield from _markdown(document.text)
    elif document.format == "python":
        yield from _python(document.text, size)
    else:
        yield "", document.text


def _markdown(text: str) -> Iterator[tuple[str, str]]:
    from llama_index.core import Document as LlamaDocument
    from llama_index.core.node_parser import MarkdownNodeParser
    from llama_index.core.schema import MetadataMode

    parser = MarkdownNodeParser.from_defaults(header_path_separator="\x1f")
    for node in parser.get_nodes_from_documents([LlamaDocument(text=text)]):
        above = [part for part in str(node.metadata.get("header_path", "")).split("\x1f") if part]
        yield " / ".join(above), node.get_content(metadata_mode=MetadataMode.NONE)


def _python(text: str, size: int) -> Iterator[tuple[str, str]]:
    """Each top-level function and class, and the rest between them; of a class longer than `size` each method by itself."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield "", text
        return
    lines = io.StringIO(text, newline="").readlines()  # str.splitlines also splits where Python does not, as at a form feed
    yield from _definitions(tree.body, lines, (0, len(lines)), above="", size=size)


def _definitions(
    body: Sequence[ast.stmt], lines: Sequence[str], span: tuple[int, int], *, above: str, size: int
) -> Iterator[tuple[str, str]]:
    done, last = span
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        end = node.end_lineno or start + 1
        if rest := "".join(lines[done:start]).strip():
            yield above, rest
        heading = f"{above} / " * bool(above) + f"{'class' if isinstance(node, ast.ClassDef) else 'def'} {node.name}"
        whole = "".join(lines[start:end])
        if isinstance(node, ast.ClassDef) and len(_PIECES.findall(whole)) > size:
            yield from _definitions(node.body, lines, (start, end), above=heading, size=size)
        else:
            yield heading, whole
        done = end
    if rest := "".join(lines[done:last]).strip():
        yield above, rest
