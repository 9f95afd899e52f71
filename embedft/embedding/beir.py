"""A BEIR folder: corpus.jsonl, queries.jsonl (or .jsonl.gz) and qrels/<split>.tsv. Returns plain texts; knows no training.

Source of the format: Thakur et al. 2021, arXiv 2104.08663. A document is its title, a space and its text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedft.errors import DataError
from embedft.files import write_jsonl
from embedft.records import READERS, lines_of, open_text, read_jsonl

_GRADE = re.compile(r" *-?[0-9]+ *")


@dataclass(frozen=True)
class Beir:
    """`relevant`: query id → document id → grade, only grades above 0; only queries that have one."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]


def is_beir(source: str) -> bool:
    return not source.startswith("hf://") and Path(source).is_dir()


def splits(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def read_beir(folder: Path, split: str, problems: list[str]) -> Beir:
    """Everything of one split. Raises DataError where a file is missing; bad lines go to `problems`."""
    documents = _texts(_file(folder, "corpus"), problems, titled=True)
    queries = _texts(_file(folder, "queries"), problems, titled=False)
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        raise DataError([f"{folder.name}/qrels: no {split}.tsv; it has {', '.join(splits(folder)) or 'no splits'}"])
    relevant: dict[str, dict[str, int]] = {}
    for query, document, grade in _qrels(qrels, documents, queries, problems):
        if grade > 0:
            relevant.setdefault(query, {})[document] = grade
    return Beir(documents, queries, relevant)


def _file(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith(tuple(READERS)))
    single = f", or one file of rows, such as its {files[0]} (data.also names further ones to train on)" if files else ""
    raise DataError([f"{folder.name}: no {stem}.jsonl; expected a BEIR folder with corpus.jsonl, queries.jsonl and qrels/{single}"])


def drop_unreadable(folder: Path) -> None:
    """Rewrite corpus and queries without the lines that `read_beir` does not take; a file that it takes whole stays as it is."""
    for stem in ("corpus", "queries"):
        path, problems, rows = _file(folder, stem), list[str](), list[Mapping[str, Any]]()
        _texts(path, problems, titled=stem == "corpus", rows=rows)
        if problems:
            write_jsonl(path, rows)


def _texts(path: Path, problems: list[str], *, titled: bool, rows: list[Mapping[str, Any]] | None = None) -> dict[str, str]:
    """Id → text; `rows` collects what it was read from."""
    texts: dict[str, str] = {}
    for row in read_jsonl(path, problems):
        identifier, text = row.values.get("_id"), row.values.get("text")
        title = row.values.get("title") if titled else None
        if not isinstance(identifier, str) or not identifier:
            problems.append(f"{row.where}: _id is {identifier!r}; expected non-empty text")
        elif identifier in texts:
            problems.append(f"{row.where}: _id {identifier!r} occurs twice; expected distinct ids")
        elif not isinstance(text, str) or not (text.strip() or title or titled):
            problems.append(f"{row.where}: text is {'empty' if isinstance(text, str) else repr(text)}; expected text")
        else:
            texts[identifier] = f"{title} {text}".strip() if title else text.strip()
            if rows is not None:
                rows.append(row.values)
    return texts


def _qrels(path: Path, documents: Mapping[str, str], queries: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, str, int]]:
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file, path, problems), start=1):
            fields = line.rstrip("\r\n").split("\t")
            where = f"qrels/{path.name}:{number}"
            if (number == 1 and not _GRADE.fullmatch(fields[-1])) or not line.strip():
                continue  # the header
            if len(fields) != 3 or not _GRADE.fullmatch(fields[2]):
                problems.append(f"{where}: expected query-id, corpus-id and a whole number, separated by tabs")
            elif fields[0] not in queries:
                problems.append(f"{where}: query {fields[0]!r} is not in queries.jsonl; expected one of its _ids")
            elif fields[1] not in documents:
                problems.append(f"{where}: document {fields[1]!r} is not in corpus.jsonl; expected one of its _ids")
            else:
                yield fields[0], fields[1], int(fields[2])
