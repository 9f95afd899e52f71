"""Files of rows → mappings with a place to point at. Knows no column by name.

JSONL(.gz), CSV, Parquet and hub datasets. What cannot be read is noted in `problems`, and reading goes on.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from embedft.errors import DataError

FORMATS = ".jsonl, .jsonl.gz, .csv, .parquet, a BEIR folder or hf://name[:config][@revision]"


@dataclass(frozen=True)
class Row:
    """`where` is file:line (a Parquet or hub row counts from 1)."""

    where: str
    values: Mapping[str, Any]


def read_rows(source: str, problems: list[str], *, split: str = "train") -> Iterator[Row]:
    """Rows of a file or of a hub dataset's `split`. Raises DataError where there is nothing to read at all."""
    if source.startswith("hf://"):
        yield from _hub(source, split)
        return
    path = Path(source)
    reader = _reader(path)
    if not path.is_file():
        raise DataError([f"{path.name}: there is no such file; expected {FORMATS}"])
    yield from reader(path, problems)


def _reader(path: Path) -> Callable[[Path, list[str]], Iterator[Row]]:
    suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffixes not in READERS:
        raise DataError([f"{path.name}: {suffixes or 'no'} format is not known; expected {FORMATS}"])
    return READERS[suffixes]


def read_jsonl(path: Path, problems: list[str]) -> Iterator[Row]:
    """One JSON object a line; empty lines are skipped."""
    with open_text(path) as file:
        for number, line in enumerate(_lines(file, path, problems), start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"{where}: not JSON ({error.msg} at column {error.colno}); expected one JSON object a line")
                continue
            if isinstance(values, dict):
                yield Row(where, cast("dict[str, Any]", values))
            else:
                problems.append(f"{where}: a JSON {type(values).__name__}; expected an object")


def _lines(file: IO[str], path: Path, problems: list[str]) -> Iterator[str]:
    try:
        yield from file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        problems.append(f"{path.name}: stops being readable: {error}; expected UTF-8 text")


def open_text(path: Path) -> IO[str]:
    """UTF-8 text (a byte order mark is skipped), through gzip where the name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig", newline="")


def read_csv(path: Path, problems: list[str]) -> Iterator[Row]:
    """Comma-separated with a header line. `where` is the line on which the row ends."""
    csv.field_size_limit(1 << 27)
    with open_text(path) as file:
        reader = csv.DictReader(_lines(file, path, problems))
        for values in reader:
            where = f"{path.name}:{reader.line_num}"
            if None in values or None in values.values():
                problems.append(f"{where}: not as many fields as the header has; expected {len(reader.fieldnames or ())}")
            else:
                yield Row(where, values)


def _parquet(path: Path, problems: list[str]) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        problems.append(f"{path.name}: not a Parquet file: {error}")
        return
    number = 0
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path.name}:{number}", values)


def _hub(source: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, revision = source.removeprefix("hf://").partition("@")
    name, _, config = name.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError([f"{source}: the hub did not give split {split!r}: {reason}"]) from None
    for number, values in enumerate(rows, start=1):
        yield Row(f"{source}:{split}:{number}", values)


def first(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    return islice(rows, limit)


READERS: Mapping[str, Callable[[Path, list[str]], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": _parquet,
}
