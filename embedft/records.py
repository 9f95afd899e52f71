"""Files of rows → mappings with a place to point at. Knows no column by name.

JSONL(.gz), JSON, CSV(.gz), Parquet and hub datasets. What cannot be read is noted in `problems`, and reading goes on.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from embedft.errors import DataError

DELIMITERS = {";": "semicolon", "\t": "tab"}  # which are not read, and known by a header without a comma
Item = TypeVar("Item")
HALF = "holds half a character (a lone surrogate, as of a text cut inside an emoji); expected Unicode"
HUB = "hf://name[:config][@revision][#split]"


@dataclass(frozen=True)
class Record:
    """`where` is file:line (a Parquet or hub row counts from 1)."""

    where: str
    values: Mapping[str, Any]


def read_records(source: str, problems: list[str], *, split: str = "train") -> Iterator[Record]:
    """Rows of a file, or of a hub dataset's `split` where `source` names none. Raises DataError where there is nothing to read at all."""
    if source.startswith("hf://"):
        yield from _hub(source, split)
        return
    path = Path(source)
    if path.is_dir():
        raise DataError([f"{path}: a folder; expected a file, or for retrieval a BEIR folder: corpus.jsonl, queries.jsonl and qrels/"])
    if not path.exists():
        raise DataError([f"{path}: there is no such file"])
    yield from _reader(path)(path, problems)


def _reader(path: Path) -> Callable[[Path, list[str]], Iterator[Record]]:
    suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffixes not in READERS:
        kind = f"{suffixes} is" if suffixes else "without an ending it is"
        raise DataError([f"{path.name}: {kind} not a kind of file that is read here; expected one of {', '.join(READERS)}, or {HUB}"])
    return READERS[suffixes]


def read_jsonl(path: Path, problems: list[str]) -> Iterator[Record]:
    """One JSON object a line; empty lines are skipped."""
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file, path, problems), start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                values = json.loads(line.rstrip())  # else an object left open is at fault in the next line
            except json.JSONDecodeError as error:
                problems.append(f"{where}: not JSON ({error.msg} at column {error.colno}); expected one JSON object a line")
                continue
            except RecursionError:
                problems.append(f"{where}: nested too deep; expected one JSON object a line")
                continue
            if "\\u" in line and not _is_unicode(values):
                problems.append(f"{where}: {HALF}")
            elif isinstance(values, dict):
                yield Record(where, cast("dict[str, Any]", values))
            else:
                problems.append(f"{where}: a JSON {type(values).__name__}; expected an object")


def lines_of(file: IO[str], path: Path, problems: list[str]) -> Iterator[str]:
    """The lines up to one that cannot be decoded or unpacked, which is noted."""
    try:
        yield from file
    except UnicodeDecodeError:
        problems.append(_where_not_utf8(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problems.append(f"{path.name}: stops being readable: {error}; expected a whole gzip file")


def _where_not_utf8(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{path.name}: UTF-16; convert it to UTF-8"
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        return f"{path.name}:{line}: not UTF-8 (byte {byte:#04x}), and nothing is read from there on; convert the file"
    return f"{path.name}: not UTF-8; convert it"


def _is_unicode(value: Any) -> bool:
    """Whether all texts in it are whole characters: JSON may hold half of one, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(path: Path, problems: list[str]) -> Iterator[Record]:
    """One list of objects."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text)
    except UnicodeDecodeError as error:
        problems.append(f"{path.name}: not UTF-8 (byte {error.start}): convert it")
        return
    except json.JSONDecodeError as error:
        problems.append(f"{path.name}: not JSON: {error}; expected a list of objects")
        return
    except RecursionError:
        problems.append(f"{path.name}: nested too deep; expected a list of objects")
        return
    if not isinstance(values, list):
        problems.append(f"{path.name}: a JSON {type(values).__name__}; expected a list of objects")
        return
    for number, value in enumerate(cast("list[Any]", values), start=1):
        if "\\u" in text and not _is_unicode(value):
            problems.append(f"{path.name}[{number}]: {HALF}")
        elif isinstance(value, dict):
            yield Record(f"{path.name}[{number}]", cast("dict[str, Any]", value))
        else:
            problems.append(f"{path.name}[{number}]: a JSON {type(value).__name__}; expected an object")


def open_text(path: Path) -> IO[str]:
    """UTF-8 text (a byte order mark is skipped), through gzip where the name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig", newline="")


def read_csv(path: Path, problems: list[str]) -> Iterator[Record]:
    """Comma-separated with a header line. `where` is the line on which the row ends."""
    csv.field_size_limit(1 << 27)
    with open_text(path) as file:
        lines = lines_of(file, path, problems)
        header = next(lines, "")
        if "," not in header and (mark := next((name for sign, name in DELIMITERS.items() if sign in header), None)):
            problems.append(f"{path.name}: its fields are delimited by a {mark}; expected a comma: write it again with commas")
            return
        reader = csv.DictReader(chain([header], lines), strict=True)  # else a quote left open swallows the rest of the file
        try:
            names = reader.fieldnames or ()
            if twice := next((name for place, name in enumerate(names) if name and name in names[:place]), None):
                problems.append(f"{path.name}:1: two columns are named {twice!r}; expected a name for each: rename or drop one")
                return
            for values in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in values or None in values.values():
                    problems.append(f"{where}: not as many fields as the header has; expected {len(names)}")
                else:
                    yield Record(where, values)
        except csv.Error as error:
            problems.append(f"{path.name}:{reader.line_num + 1}: not CSV: {error}")  # where the row begins


def _parquet(path: Path, problems: list[str]) -> Iterator[Record]:
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
            yield Record(f"{path.name}:{number}", values)


def _hub(source: str, split: str) -> Iterator[Record]:
    import datasets

    rest, _, named = source.removeprefix("hf://").partition("#")
    rest, _, revision = rest.partition("@")
    name, _, config = rest.partition(":")
    split = named or split
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError([f"{source}: the hub did not give split {split!r}: {reason}"]) from None
    for number, values in enumerate(rows, start=1):
        yield Record(f"{name}:{split}:{number}", values)


def first(rows: Iterator[Record], limit: int | None) -> Iterator[Record]:
    return islice(rows, limit)


def sample(items: Sequence[Item], count: int | None, *, key: Callable[[Item], str]) -> list[Item]:
    """`count` of the items (None: all), in their order, chosen by the hash of their keys: a file that is sorted gives no other picture."""
    if count is None or count >= len(items):
        return list(items)
    ranked = sorted(range(len(items)), key=lambda number: hashlib.sha256(key(items[number]).encode()).digest())
    return [items[number] for number in sorted(ranked[:count])]


READERS: Mapping[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": _json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": _parquet,
}
