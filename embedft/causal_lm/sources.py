"""A file or a hub data set → records with the place each came from. Knows no format of rows."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from embedft.errors import DataError


def records(source: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, record) of each row of JSONL(.gz), JSON, CSV, Parquet or `hf://name[:config][@revision]` (split `train`,
    or `hf://…#split`). A row that cannot be read comes as (place, what is wrong). Raises DataError if nothing can be.
    """
    if source.startswith("hf://"):
        yield from _hub(source)
        return
    path = Path(source)
    reader = next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise DataError([f"{path.name}: not a kind of file that is read here; expected one of {', '.join(READERS)}"])
    if not path.is_file():
        raise DataError([f"{path}: there is no such file"])
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError([f"{path.name}: not readable: {error}"]) from None


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", _object(line)


def _object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno}), expected one object a line"
    return cast("dict[str, Any]", value) if isinstance(value, dict) else f"a {type(value).__name__}, expected an object"


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError([f"{path.name}:{error.lineno}: not JSON: {error.msg}"]) from None
    if not isinstance(rows, list):
        raise DataError([f"{path.name}: a {type(rows).__name__}, expected a list of objects"])
    for number, row in enumerate(cast("list[Any]", rows), 1):
        yield f"{path.name}[{number}]", row if isinstance(row, dict) else f"a {type(row).__name__}, expected an object"


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                short = [key for key, value in row.items() if value is None]
                if None in row or short:
                    yield place, f"not as many fields as the header, expected {len(reader.fieldnames or [])}"
                else:
                    yield place, dict(row)
        except csv.Error as error:
            yield f"{path.name}:{reader.line_num}", f"not CSV: {error}"


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError([f"{path.name}: not Parquet: {error}"]) from None
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path.name}:row {number}", row


def _hub(source: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import datasets

    rest, _, split = source.removeprefix("hf://").partition("#")
    rest, _, revision = rest.partition("@")
    name, _, config = rest.partition(":")
    try:
        table: Any = datasets.load_dataset(name, config or None, revision=revision or None, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError([f"{source}: the hub did not give it: {str(error).splitlines()[0][:200]}"]) from None
    for number, row in enumerate(table, 1):
        yield f"{name}:{split or 'train'}:row {number}", dict(row)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any] | str]]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
