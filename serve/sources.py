"""Where an adapter may come from: the store's own names and generations, and folders under its root. Nothing else."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from embedft.adapters.passport import PASSPORT
from embedft.adapters.store import GENERATION, AdapterStore, check_folder
from embedft.adapters.transfer import check_contents
from embedft.errors import AdapterInvalid, AdapterNotFound, InputInvalid

NO_PASSPORT = "it has no passport: name the `base` it was trained on, and plain PEFT makes its probes"


@dataclass(frozen=True)
class Found:
    """An immutable object of the store: `folder` is objects/<generation>. `copied`: into the store just now, where no name keeps it."""

    generation: str
    folder: Path
    copied: bool = False


def find(store: AdapterStore, name: str, source: str | None, kept: ExitStack) -> Found:
    """Resolve `source` for `name`: None or 'store', a name, a generation (12 to 64 hex digits), a folder under the store's root.

    A folder is copied into the store first, without a name; what it took the place of there comes back where `kept` is left by an error.
    Raises AdapterNotFound, AdapterInvalid, InputInvalid source_refused.
    """
    wanted = name if source in (None, "store") else str(source)
    try:
        folder = store.folder(wanted)
        if not folder.is_dir():
            raise AdapterNotFound(wanted[:80], list(store.names()))
        return Found(folder.name, folder)
    except AdapterNotFound:
        if source in (None, "store"):
            raise
    folder = contained(store.root, wanted)
    if folder.parent == store.root / "objects":
        return Found(folder.name, folder)
    if not (folder / PASSPORT).is_file():
        raise AdapterInvalid(name, NO_PASSPORT)
    check_folder(folder, name)
    stage = kept.enter_context(store.stage())
    shutil.copytree(folder, stage, dirs_exist_ok=True)
    check_contents(stage, name)
    identity = kept.enter_context(store.trial(stage))
    return Found(identity, store.folder(identity), copied=True)


def contained(root: Path, source: str) -> Path:
    """`source` as a folder under `root`, reached through no link and no `..`; else InputInvalid."""
    refused = InputInvalid("source_refused", "a source is a name or generation in the store, or a folder under its root", "source")
    if "\0" in source or "://" in source or len(source) > 1024:
        raise refused
    given = Path(source)
    if ".." in given.parts:
        raise refused
    path = root / given
    try:
        inside = path.relative_to(root)
        if path.resolve(strict=True) != path or not path.is_dir() or inside.parts[:1] in ((), ("names",), ("held",)):
            raise refused
        if inside.parts[0] == "objects" and not (len(inside.parts) == 2 and GENERATION.fullmatch(inside.parts[1])):
            raise refused  # what another process is writing, or a part of an adapter
    except (OSError, ValueError):
        raise refused from None
    return path
