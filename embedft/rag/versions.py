"""A folder of versions, one of which is current: written beside it, checked by hash, switched to in one step. Knows no FAISS, no SQLite.

FOLDER/current                the version in use: replaced in one step
FOLDER/versions/<version>/    meta.json and what it lists: immutable once published
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from embedft.errors import IndexInvalid
from embedft.files import abandoned_stages, locked, publish_folder, staged_folder, write_text
from embedft.rag.ann import Kind

OURS = {"versions", "work", "maps", ".lock", ".building"}  # beside `current`: what a build that was interrupted leaves, too


class Meta(BaseModel):
    """What a version says of itself. `rows` counts the dead ones too; `files` name → (bytes, sha256)."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    lineage: str
    made_by: str
    adapter: str | None = None
    dimension: int
    rows: int
    chunks: int
    kind: Kind
    settings: dict[str, Any]
    bm25: bool
    notes: dict[str, Any] = {}
    files: dict[str, tuple[int, str]] = {}


def current_version(folder: Path) -> str | None:
    """What `current` says, which may be damaged; None where there is none."""
    path = folder / "current"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def _occupied(folder: Path) -> bool:
    """Whether something that is not ours is in it."""
    return folder.is_dir() and any(path.name not in OURS for path in folder.iterdir())


def require_ours(folder: Path) -> None:
    """IndexInvalid where there is no current version, but something that is not ours."""
    if current_version(folder) is None and _occupied(folder):
        raise IndexInvalid(folder.name, "it is no index of embedft: no `current`")


def read_meta(place: Path, name: str, *, verify: bool) -> Meta:
    """A version's record, its files checked by size, and with `verify` by hash. IndexInvalid."""
    try:
        meta = Meta.model_validate_json((place / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pydantic's is a ValueError, and so is what a damaged name or text raises
        raise IndexInvalid(name, f"meta.json of version {place.name} cannot be read ({str(error).splitlines()[0]}): index again") from None
    for relative, (size, digest) in meta.files.items():
        path = place / relative
        if not path.is_file() or path.stat().st_size != size:
            raise IndexInvalid(name, f"{relative} is missing or was cut: index again")
        if verify and _sha256(path) != digest:
            raise IndexInvalid(name, f"{relative} is not what was written: index again")
    return meta


def write_meta(stage: Path, meta: Meta) -> None:
    """The record of a version whose other files are all written."""
    files = {str(path.relative_to(stage)): (path.stat().st_size, _sha256(path)) for path in stage.rglob("*") if path.is_file()}
    whole = meta.model_copy(update={"files": files})
    (stage / "meta.json").write_text(whole.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")


def publish(folder: Path, write: Callable[[Path], None], *, before: str | None, lineage: str) -> str:
    """Let `write` fill the next version and switch to it. Returns its name; the one before stays for readers that are about to open it.

    IndexInvalid where the current version is no longer `before`.
    """
    with locked(folder / ".lock"):
        if current_version(folder) != before:
            raise IndexInvalid(folder.name, "another process changed it meanwhile: open it again and repeat")
        versions = folder / "versions"
        for stage in abandoned_stages(versions, seconds=0):  # whoever stages here holds the lock
            shutil.rmtree(stage, ignore_errors=True)
        with staged_folder(versions) as stage:
            write(stage)
            number = 1 + max((int(name) for path in versions.iterdir() if (name := path.name.partition("-")[0]).isdecimal()), default=0)
            version = f"{number:06d}-{lineage[:8]}"
            publish_folder(stage, versions / version)
        write_text(folder / "current", version + "\n")
        for path in versions.iterdir():
            if path.name not in (version, before) and path.name[0] != ".":
                shutil.rmtree(path, ignore_errors=True)  # a reader that has it open keeps its files until it closes them
    return version


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
