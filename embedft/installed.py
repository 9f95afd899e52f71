"""What the installed Python packages say about themselves: source files, functions and README sections. Knows no task and no model."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from importlib import metadata
from pathlib import Path

STDLIB = "stdlib"
MAX_FILE_BYTES = 400_000
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "_pyrepl"}
_VENDORED_FOLDERS = {"_vendor", "vendor", "vendored", "third_party", "externals"}
_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|CC0|Unlicense|Zlib|HPND)\b", re.I)
_RESTRICTED = re.compile(r"\b(A?GPL|LGPL|L?GPLv\d|MPL|Mozilla|EUPL|Proprietary|Commercial|NVIDIA|Intel)\b", re.I)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True, slots=True)
class Function:
    """One documented function or method of an installed package."""

    package: str  # top-level import name, or "stdlib"
    name: str
    signature: str  # "def name(a, b=1)", one line
    summary: str  # the docstring's first sentence, one line
    code: str  # dedented source without the docstring
    arguments: tuple[str, ...]  # named parameters in order, without self and cls


@dataclass(frozen=True, slots=True)
class Section:
    """One section of an installed distribution's README."""

    distribution: str
    title: str
    text: str


def bucket(text: str, *, buckets: int) -> int:
    """A number in [0, buckets) that depends on the text alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % buckets


def package_root(package: str) -> Path | None:
    """The folder of an installed top-level package ("stdlib" for the standard library's), or None."""
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    for key in ("purelib", "platlib"):
        root = Path(sysconfig.get_path(key)) / package
        if root.is_dir() and any(root.glob("*.py")):
            return root
    return None


def source_files(package: str) -> list[Path]:
    """The package's own .py files in a fixed order: no tests, nothing vendored, nothing huge."""
    root = package_root(package)
    if root is None:
        return []
    found: list[tuple[str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        own = (_SKIPPED_FOLDERS | _VENDORED_FOLDERS).isdisjoint(relative.parts) and not path.name.startswith(("test_", "conftest"))
        if own and path.stat().st_size <= MAX_FILE_BYTES:
            found.append((relative.as_posix(), path))
    return [path for _, path in sorted(found)]


def read_source(path: Path) -> str:
    """The file's text with unix line ends; empty where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return ""


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def functions(package: str) -> Iterator[Function]:
    """Every documented function of the package, in file order."""
    for path in source_files(package):
        yield from functions_in(read_source(path), package=package)


def functions_in(source: str, *, package: str) -> Iterator[Function]:
    """Every documented function of one file's text; none if it does not parse."""
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for node in _definitions(tree.body):
        found = _function(node, lines, package=package)
        if found is not None:
            yield found


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of modules and classes, under `if` and `try` too; none that is local to a function. Quicker than ast.walk."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(node.body)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str], *, package: str) -> Function | None:
    docstring = ast.get_docstring(node)
    first = node.body[0]
    if not docstring or len(node.body) < 2 or first.end_lineno is None or node.end_lineno is None or first.lineno == node.lineno:
        return None
    summary = first_sentence(docstring)
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
    arguments = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in {"self", "cls"})
    return Function(
        package=package,
        name=node.name,
        signature=f"def {node.name}({ast.unparse(node.args)})",
        summary=summary,
        code=textwrap.dedent("\n".join(kept)).strip("\n"),
        arguments=arguments,
    )


@functools.cache
def _imports() -> dict[str, list[str]]:
    return {name: sorted(set(owners)) for name, owners in metadata.packages_distributions().items()}


def _field(info: metadata.PackageMetadata, name: str) -> str:
    return str(info[name] or "") if name in info else ""


def permissive(distribution: metadata.Distribution) -> bool:
    """Whether the distribution's own metadata names a permissive licence and no other kind."""
    info = distribution.metadata
    stated = [_field(info, "License-Expression"), _field(info, "License")[:200]]
    stated += [c for c in info.get_all("Classifier") or [] if c.startswith("License")]
    text = " ".join(stated)
    return bool(_PERMISSIVE.search(text)) and not _RESTRICTED.search(text)


def permissive_packages() -> list[str]:
    """Importable packages whose every owning distribution is permissively licensed, the standard library first."""
    names = [STDLIB]
    for name, owners in sorted(_imports().items()):
        if name.startswith("_") or name in {"embedft", "serve"} or package_root(name) is None:
            continue
        if all(permissive(metadata.distribution(owner)) for owner in owners):
            names.append(name)
    return names


_MARKDOWN = re.compile(r"^(#{1,4})\s+(.+?)\s*#*$")
_UNDERLINE = re.compile(r"^([=\-~^\"'*+#])\1{2,}\s*$")


def sections(distribution: metadata.Distribution) -> Iterator[Section]:
    """The README's sections with their titles: Markdown `#` headings and RST (or setext) underlined ones."""
    info = distribution.metadata
    body = _field(info, "Description") or (str(info.get_payload()) if isinstance(info, Message) else "")
    name = str(distribution.metadata["Name"]).lower()
    title, kept, fenced = "", [], False
    lines = body.replace("\r\n", "\n").split("\n")
    for position, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        heading = None if fenced else _heading(lines, position)
        if heading is not None:
            yield from _section(name, title, kept)
            title, kept = heading, []
        elif fenced or not (_UNDERLINE.match(line) and position and _heading(lines, position - 1)):
            kept.append(line)
    yield from _section(name, title, kept)


def _heading(lines: Sequence[str], position: int) -> str | None:
    line = lines[position]
    markdown = _MARKDOWN.match(line)
    if markdown:
        return markdown.group(2)
    below = lines[position + 1] if position + 1 < len(lines) else ""
    text = line.strip()
    flush = bool(text) and not line.startswith((" ", "\t", "|", "+")) and not _UNDERLINE.match(line)
    return text if flush and _UNDERLINE.match(below) and len(below.strip()) >= len(text) - 1 else None


def _section(distribution: str, title: str, lines: Sequence[str]) -> Iterator[Section]:
    kept = list(lines)
    while kept and (not kept[-1].strip() or _UNDERLINE.match(kept[-1])):  # the next heading's overline
        kept.pop()
    text = "\n".join(kept).strip()
    if title and text:
        yield Section(distribution, title, text)
