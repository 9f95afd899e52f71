"""Rows → examples: which column is the query, which the document, and whether a row can be used. Reads no file itself."""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedft.records import Record

QUERY = ("query", "anchor", "question", "sentence1", "sentence_1")
DOCUMENT = ("document", "positive", "passage", "answer", "doc", "pos", "sentence2", "sentence_2")
NEGATIVE = ("negative", "negatives", "hard_negative", "hard_negatives", "neg")
SCORES = ("scores", "teacher_scores")
LABEL = ("label", "labels", "score", "similarity", "relevance")
EXPECTED = f"a query column ({', '.join(QUERY[:3])}) and a document column ({', '.join(DOCUMENT[:4])})"


@dataclass(frozen=True)
class Example:
    """One query with one relevant document; `score` only where the loss takes scored pairs.

    `scores`: a teacher's, of the document and then of each negative; only where the loss distils. `weight`: of its data set.
    """

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    score: float | None = None
    scores: tuple[float, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Columns:
    """Which column plays which part; found by name, never by position, so swapped columns are the same data."""

    query: str
    document: str
    negatives: tuple[str, ...]
    label: str | None
    scores: str | None = None


def parse(rows: Iterable[Record], problems: list[str], *, scored: bool, taught: bool = False) -> Iterator[Example]:
    """Usable rows as examples; what is wrong with the others goes to `problems`.

    `scored`: the loss needs a score column. `taught`: it needs a teacher's scores of the document and of each negative.
    """
    found: dict[tuple[str, ...], Columns | None] = {}
    for row in rows:
        names = tuple(row.values)
        if names not in found:
            found[names] = _columns(row, problems, scored=scored, taught=taught)
        columns = found[names]
        if columns is not None:
            faults = list(_faults(row, columns))
            problems.extend(f"{row.where}: {fault}" for fault in faults)
            if not faults:
                yield _example(row.values, columns)


def columns_of(row: Record, problems: list[str]) -> Columns | None:
    """Which column is what, whatever a loss makes of it; None where query and document are not one column each."""
    names = list(row.values)
    queries, documents = _matching(names, QUERY), _matching(names, DOCUMENT)
    before = len(problems)
    for part, matching in (("query", queries), ("document", documents)):
        if not matching:
            problems.append(f"{row.where}: no {part} column among {', '.join(names) or 'no columns'}; expected {EXPECTED}")
        elif len(matching) > 1:
            problems.append(f"{row.where}: columns {', '.join(matching)} all name the {part}; expected one: drop or rename the others")
    if len(problems) > before:
        return None
    negatives = tuple(name for name in names if _base_name(name) in NEGATIVE)
    label, scores = (next(iter(_matching(names, known)), None) for known in (LABEL, SCORES))
    return Columns(queries[0], documents[0], negatives, label, scores)


def _columns(row: Record, problems: list[str], *, scored: bool, taught: bool) -> Columns | None:
    """Noted once for each set of columns, at the first row that has it."""
    names, before = list(row.values), len(problems)
    found, labels = columns_of(row, problems), _matching(list(row.values), LABEL)
    if labels and not scored:
        problems.append(
            f"{row.where}: column {labels[0]!r} would be ignored: every row of pairs counts as relevant; "
            "keep the relevant rows and drop the column, or use a loss that takes scores (cosent, angle)"
        )
    if scored and len(labels) != 1:
        problems.append(f"{row.where}: this loss takes scored pairs; expected exactly one of the columns {', '.join(LABEL)}")
    teacher = _matching(names, SCORES) if taught else []
    if taught and len(teacher) != 1:
        problems.append(f"{row.where}: this loss distils a teacher; expected a column {' or '.join(SCORES)}: a list of numbers")
    if found is None or len(problems) > before:
        return None
    return replace(found, label=found.label if scored else None, scores=found.scores if taught else None)


def _matching(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return [name for name in names if name.strip().lower() in known]


def plays_a_part(name: str) -> bool:
    """Whether a column of this name says anything to a training."""
    return name.strip().lower() in (*QUERY, *DOCUMENT, *SCORES, *LABEL) or _base_name(name) in NEGATIVE


def _base_name(name: str) -> str:
    """negative_3 and negative3 are negatives too."""
    return name.strip().lower().rstrip("0123456789").rstrip("_")


def _faults(row: Record, columns: Columns) -> Iterator[str]:
    for name in (columns.query, columns.document):
        value = row.values[name]
        if not isinstance(value, str):
            yield no_text(name, value)
        elif not value.strip():
            yield f"{name} is empty; expected text"
    for name in columns.negatives:
        for value in as_list(row.values[name], column=name):
            if not isinstance(value, str) or not value.strip():
                yield f"{name} holds {_kind(value) if not isinstance(value, str) else 'empty text'}; expected text or a list of texts"
            elif value == row.values[columns.document]:
                yield f"{name} is the document itself; expected a document that does not answer the query"
    if columns.label and _number(row.values[columns.label]) is None:
        yield f"{columns.label} is {row.values[columns.label]!r}; expected a number"
    if columns.scores:
        expected = 1 + sum(len(as_list(row.values[name], column=name)) for name in columns.negatives)
        numbers = [_number(value) for value in as_list(row.values[columns.scores], column=columns.scores)]
        if len(numbers) != expected or None in numbers or expected < 2:
            yield f"{columns.scores} is {row.values[columns.scores]!r}; expected {max(2, expected)} numbers: document, then negatives"


def _example(values: Mapping[str, Any], columns: Columns) -> Example:
    negatives = tuple(text for name in columns.negatives for text in as_list(values[name], column=name))
    score = _number(values[columns.label]) if columns.label else None
    scores = tuple(float(value) for value in as_list(values[columns.scores], column=columns.scores)) if columns.scores else ()
    texts = tuple(text.strip() for text in negatives)
    return Example(values[columns.query].strip(), values[columns.document].strip(), texts, score, scores)


def as_list(value: Any, *, column: str) -> list[Any]:
    """What the column holds of a row. A CSV file has no lists: under a plural name it is read as what JSON or Python writes for one."""
    if value is None:
        return []
    if isinstance(value, str) and column.strip().lower().endswith("s") and (written := _written(value.strip())) is not None:
        return written
    return list(value) if isinstance(value, list | tuple) else [value]


def _written(text: str) -> list[Any] | None:
    """A list of texts or of numbers that was written as text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(part, str | int | float) for part in found):
            return found
    return None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def no_text(name: str, value: Any) -> str:
    """What is wrong with a column `name` that holds no str."""
    return f"{name} is {_kind(value)}; expected text"


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
