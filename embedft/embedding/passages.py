"""A bare corpus → its passages: a BEIR folder, rows with a text, or Markdown and text files by their sections. Asks no model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedft.embedding.beir import is_beir
from embedft.embedding.pairs import no_text
from embedft.errors import DataError
from embedft.files import passed_over, path_text
from embedft.records import read_records

_FENCE = ("```", "~~~")


@dataclass(frozen=True)
class Passage:
    """`title` '' where there is none."""

    identifier: str
    title: str
    text: str


def read_passages(corpus: str) -> list[Passage]:
    """Passages with text, in the corpus' order."""
    problems: list[str] = []
    path = Path(corpus)
    if is_beir(corpus) and not any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz")):
        meant = (below for below in path.rglob("*") if not any(map(passed_over, below.relative_to(path).parts)))
        return _of_files(path, sorted(below for below in meant if _is_text(below)))
    if _is_text(path):
        return _of_files(path.parent, [path])
    source = next((str(path / name) for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).is_file()), corpus)
    passages: dict[str, Passage] = {}
    bare: set[tuple[str, ...]] = set()  # sets of columns without a text: told once each
    for row in read_records(source, problems):
        text, title, identifier = (row.values.get(name) for name in ("text", "title", "_id"))
        identifier = row.where if identifier is None else str(identifier)
        if "text" not in row.values:
            if (columns := tuple(row.values)) not in bare:
                problems.append(f"{row.where}: no text among {', '.join(columns)}; expected columns text and, where there is one, title")
            bare.add(columns)
        elif not isinstance(text, str):
            problems.append(f"{row.where}: {no_text('text', text)}")
        elif not isinstance(title, str | None):
            problems.append(f"{row.where}: {no_text('title', title)}")
        elif identifier in passages:
            problems.append(f"{row.where}: _id {identifier!r} occurs twice; expected distinct ids")
        elif text.strip() or title:
            passages[identifier] = Passage(identifier, (title or "").strip(), text.strip())
    if problems:
        raise DataError(problems)
    if not passages:
        raise DataError([f"{path.name}: no passages; expected a BEIR folder, rows with a column text, or a folder of .md and .txt files"])
    return list(passages.values())


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in {".md", ".txt"} and path.is_file()


def _of_files(folder: Path, paths: Sequence[Path]) -> list[Passage]:
    """Each section of each of these .md and .txt files; a Markdown heading is its section's title."""
    passages: list[Passage] = []
    problems: list[str] = []
    for path in paths:
        title, lines, code = "", list[str](), False
        name = path_text(path.relative_to(folder))

        def close(title: str, lines: list[str], name: str = name) -> None:
            if body := "\n".join(lines).strip():
                passages.append(Passage(f"{name}#{len(passages)}", title, body))

        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            problems.append(f"{name}: not UTF-8 (byte {error.start}): convert it")
            continue
        for line in content.splitlines():
            code ^= line.lstrip().startswith(_FENCE)
            if path.suffix.lower() == ".md" and not code and (heading := re.match(r"#{1,6}\s+(.*)", line)):
                close(title, lines)
                title, lines = heading.group(1).strip(" #`*"), []
            else:
                lines.append(line)
        close(title, lines)
    if problems:
        raise DataError(problems)
    if not passages:
        raise DataError([f"{folder.name}: no .md or .txt file with text in it"])
    return passages
