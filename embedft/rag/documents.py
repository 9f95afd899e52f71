"""Files → texts: Markdown, plain text, HTML, PDF and Python sources. What cannot be read is named with its reason."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

from embedft.errors import DocumentsUnusable
from embedft.files import passed_over, path_text

Format = Literal["markdown", "text", "html", "pdf", "python"]
FORMATS: dict[str, Format] = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".rst": "text",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
    ".py": "python",
}
MAX_BYTES = 32 << 20
_SPACES = re.compile(r"\s+")
_LINE_END = re.compile(r"\r\n?")


@dataclass(frozen=True)
class Document:
    """`id`: the path below the folder that was asked for, with slashes. HTML is Markdown by now."""

    id: str
    text: str
    format: Format


@dataclass(frozen=True)
class Reading:
    """`skipped`: 'path: reason' of files of a known kind, and of links to folders, that could not be read. `other`: files of kinds that are
    not read, as `others` counts them by their endings."""

    documents: tuple[Document, ...]
    skipped: tuple[str, ...]
    others: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def other(self) -> int:
        return sum(self.others.values())


class _Unreadable(Exception):
    pass


def read_documents(source: Path, *, max_bytes: int = MAX_BYTES) -> Reading:
    """All documents of a file or a folder, in the order of their paths. DocumentsUnusable where none can be read."""
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DocumentsUnusable([f"{source}: there is no such file or folder"]) from None
    except OSError as error:
        raise DocumentsUnusable([f"{source}: {_why(error)}"]) from None
    root = source if S_ISDIR(mode) else source.parent
    documents, skipped, others = list[Document](), list[str](), Counter[str]()
    for path in _files(source, skipped) if root is source else [source]:
        name = path_text(path.relative_to(root))
        if path.suffix.lower() not in FORMATS:
            others[path.suffix.lower() or "no ending"] += 1
            if path == source:
                skipped.append(f"{name}: files of kind {path.suffix or 'none'!r} are not read; these are: {', '.join(FORMATS)}")
            continue
        try:
            documents.append(Document(name, _read(path, root, max_bytes), FORMATS[path.suffix.lower()]))
        except _Unreadable as error:
            skipped.append(f"{name}: {error}")
        except OSError as error:
            skipped.append(f"{name}: {_why(error)}")
    skipped.sort()
    if not documents:
        raise DocumentsUnusable(
            skipped or [f"{source}: no document in it ({others.total()} other files); these kinds are read: {', '.join(FORMATS)}"]
        )
    return Reading(tuple(documents), tuple(skipped), dict(others.most_common()))


def _files(source: Path, skipped: list[str]) -> list[Path]:
    """In the order of their paths, without what is hidden; folders that cannot be listed go to `skipped`, and links to others."""

    def closed(error: OSError) -> None:
        skipped.append(f"{path_text(Path(error.filename).relative_to(source))}: {_why(error)}")

    found = list[Path]()
    for folder, below, names in os.walk(source, onerror=closed):
        below[:] = [name for name in below if not passed_over(name)]
        links = [path for name in below if (path := Path(folder, name)).is_symlink() and not _walked(path, source)]
        skipped += [f"{path_text(path.relative_to(source))}: a link to a folder that is not read from here" for path in links]
        found += [Path(folder, name) for name in names if not passed_over(name)]
    return sorted(found)


def _walked(link: Path, source: Path) -> bool:
    """Whether the folder that a link leads to is read where it lies."""
    place, root = link.resolve(), source.resolve()
    return place.is_relative_to(root) and not any(map(passed_over, place.relative_to(root).parts))


def _why(error: OSError) -> str:
    return f"it cannot be read ({error.strerror})"


def _read(path: Path, root: Path, max_bytes: int) -> str:
    if path.is_symlink() and not path.exists():
        raise _Unreadable("a link that leads to no file")
    if not path.resolve().is_relative_to(root.resolve()):
        raise _Unreadable("a link that leads out of the folder")
    if not path.is_file():
        raise _Unreadable("no plain file")
    size = path.stat().st_size
    if size > max_bytes:
        raise _Unreadable(f"{size / 2**20:.0f} MiB, more than {max_bytes / 2**20:.0f}: split it, or allow more with --max-mib")
    if path.suffix.lower() == ".pdf":
        text = _pdf(path)
    else:
        content = path.read_bytes()
        if b"\0" in content:
            raise _Unreadable("it is binary, not text")
        try:
            text = _LINE_END.sub("\n", content.decode("utf-8-sig"))  # Markdown's headings and blank lines are known by it
        except UnicodeDecodeError as error:
            raise _Unreadable(f"not UTF-8 (byte {error.start}): convert it") from None
        if FORMATS[path.suffix.lower()] == "html":
            text = _html(text)
    if not text.strip():
        raise _Unreadable("no text in it" + (": scanned pages need OCR first" if path.suffix.lower() == ".pdf" else ""))
    return text


def _pdf(path: Path) -> str:
    try:
        import pypdf
    except ImportError:
        raise _Unreadable("PDF needs pypdf: pip install 'embedft[rag]'") from None
    try:
        reader = pypdf.PdfReader(str(path))
        if reader.is_encrypted and not reader.decrypt(""):
            raise _Unreadable("the PDF is encrypted: save it without a password")
        text = "\n\n".join(page.extract_text() or "" for page in reader.pages)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a font's table may name half a character
    except _Unreadable:
        raise
    except Exception as error:  # pypdf lets many types through
        raise _Unreadable(f"the PDF is damaged ({str(error)[:100]})") from None


def _html(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return parser.result()


class _Text(HTMLParser):
    """Visible text; headings and code as Markdown's, so that chunks know their section."""

    hidden = frozenset({"script", "style", "noscript", "template", "svg", "title"})  # not head: its end may be left out
    blocks = frozenset(
        ("p", "div", "section", "article", "li", "ul", "ol", "table", "tr", "pre", "blockquote", "hr", "br", "dt", "dd", "main", "figure")
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = self._pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self._hidden += tag in self.hidden
        if tag == "pre":
            self._pre += 1
            self._fence(outermost=self._pre == 1)
        elif tag[0] == "h" and tag[1:].isdigit():
            self._parts.append(f"\n\n{'#' * int(tag[1:])} ")
        elif tag in self.blocks:
            self._parts.append("\n")
        elif tag in ("td", "th"):
            self._say(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.hidden))
        if tag == "pre" and self._pre:
            self._pre -= 1
            self._fence(outermost=not self._pre)
        elif tag in self.blocks or (tag[0] == "h" and tag[1:].isdigit()):
            self._parts.append("\n")

    def _fence(self, *, outermost: bool) -> None:
        """Around code, lest its comments be headings."""
        if outermost and not self._hidden:
            self._parts.append("\n```\n")

    def handle_data(self, data: str) -> None:
        if self._pre and not self._hidden:
            self._parts.append(data)
        elif not self._hidden:
            self._say(_SPACES.sub(" ", data))

    def _say(self, text: str) -> None:
        """Space at the seams too: tags do not part words, and never are there two in a row."""
        after_space = not self._parts or self._parts[-1][-1:].isspace()
        if text := text.lstrip() if after_space else text:
            self._parts.append(text)

    def result(self) -> str:
        lines = [line.rstrip() for line in "".join(self._parts).splitlines()]
        return "\n".join(line for place, line in enumerate(lines) if line or (place and lines[place - 1])).strip() + "\n"
