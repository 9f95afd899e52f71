"""AdapterStore: content-addressed adapters under names. What an object's path answers never changes; names are pointers.

ROOT/objects/<generation>/     an adapter folder; replaced only whole, where it is damaged or its probes or metrics change
ROOT/names/<name>.json         {"generation", "history": [generation, …]}, newest last
ROOT/held/<name>.json          {"generation"}: trained under that name, and held back from it
"""

import filecmp
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from embedft.adapters.passport import PASSPORT, TEXTS, Passport, generation, read_passport
from embedft.errors import AdapterInvalid, AdapterNotFound, GenerationConflict, UsageError
from embedft.files import (
    abandoned_stages,
    hold,
    in_use,
    locked,
    publish_folder,
    replace_folder,
    restore_folders,
    staged_folder,
    unfinished,
    write_text,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
GENERATION = re.compile(r"[0-9a-f]{12,64}")
MAX_FILES, MAX_BYTES = 10_000, 8 << 30
_USED = ".used"  # whoever serves from a store shares its lock
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


def default_root() -> Path:
    """$EMBEDFT_ADAPTERS, or adapters/ in the working directory."""
    return Path(os.environ.get("EMBEDFT_ADAPTERS", "adapters"))


class AdapterStore:
    """Adapters on disk. Safe against other processes and against a crash at any moment."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).resolve()
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file; expected the folder of an adapter store")
        self._objects, self._names, self._held = self.root / "objects", self.root / "names", self.root / "held"
        if unfinished(self._objects):
            with self._locked():
                pass

    @contextmanager
    def stage(self) -> Generator[Path]:
        """A folder on the store's own disk to write an adapter in; `put` takes it, otherwise it vanishes."""
        with staged_folder(self._objects) as folder:
            yield folder

    def put(self, staged: Path, name: str, *, expected: str | None = None, renew: bool = True) -> str:
        """Take a staged folder as the newest generation of `name` and return that generation (64 hex).

        `expected` is compare-and-swap: GenerationConflict unless `name` is there now.
        Where the store has that generation, the staged folder takes its place if it is damaged, or with `renew` if any file differs.
        """
        check_name(name)
        check_folder(staged, name)
        identity = generation(staged)
        with self._locked():
            self._take(staged, identity, renew=renew)
            self._point(name, identity, expected=expected)
        return identity

    def add(self, staged: Path, *, renew: bool = True) -> str:
        """Take a staged folder as an object without a name (`collect` may delete it) and return its generation; `renew` as in `put`."""
        identity = generation(staged)
        with self._locked():
            self._take(staged, identity, renew=renew)
        return identity

    @contextmanager
    def trial(self, staged: Path, *, renew: bool = True) -> Generator[str]:
        """As `add`. Where the block fails, what `staged` took the place of is there again (on Linux; elsewhere it is gone)."""
        identity = generation(staged)
        with self._locked():
            replaced = self._take(staged, identity, renew=renew)
        try:
            yield identity
        except BaseException:
            if replaced and staged.is_dir():  # they have changed places
                with self._locked():
                    replace_folder(staged, self._objects / identity)
            raise

    def hold(self, staged: Path, name: str) -> str:
        """Keep a staged folder that was made for `name` without moving the name to it; the last one held is kept. Its generation."""
        check_name(name)
        identity = generation(staged)
        with self._locked():
            self._take(staged, identity, renew=True)
            self._held.mkdir(parents=True, exist_ok=True)
            write_text(self._held / f"{name}.json", json.dumps({"generation": identity}) + "\n")
        return identity

    def held(self, name: str) -> str | None:
        """The generation that is held back from `name`. AdapterInvalid where that cannot be told."""
        path = self._held / f"{name}.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["generation"]) if path.is_file() else None
        except (ValueError, KeyError, TypeError):
            raise AdapterInvalid(name, f"the store's note held/{path.name} is damaged: remove it with `embedft adapters remove`") from None

    def all_held(self) -> dict[str, str]:
        """Name → the generation held back from it, sorted by name; some of these names point at nothing."""
        return {path.stem: self.held(path.stem) or "" for path in sorted(self._held.glob("*.json"))}

    def point(self, name: str, generation: str, *, expected: str | None = None) -> str:
        """Let `name` be a generation that the store already holds (a rollback). Returns the full generation.

        A name that is there already is not written again: that would fail on a disk that cannot be written to.
        """
        check_name(name)
        with suppress(AdapterNotFound, AdapterInvalid):
            if expected is None and self.current(name) == (identity := self.folder(generation).name):
                return identity
        with self._locked():
            identity = self.folder(generation).name
            self._point(name, identity, expected=expected)
        return identity

    def names(self) -> dict[str, str]:
        """Name → current generation, sorted by name. A pointer that is damaged or cannot be read is left out: see `damaged`."""
        found: dict[str, str] = {}
        for path in self._pointers():
            with suppress(AdapterInvalid, OSError):
                found[path.stem] = self._read(path)[-1]
        return found

    def damaged(self) -> dict[str, str]:
        """Name → what is wrong with its pointer and how to mend it."""
        reasons: dict[str, str] = {}
        for path in self._pointers():
            try:
                self._read(path)
            except AdapterInvalid as error:
                reasons[path.stem] = str(error)
            except FileNotFoundError:  # removed just now
                continue
            except OSError as error:
                reasons[path.stem] = f"the store's pointer {path.name} cannot be read: {error.strerror}"
        return reasons

    def _pointers(self) -> list[Path]:
        return [path for path in sorted(self._names.glob("*.json")) if NAME.fullmatch(path.stem)]

    def history(self, name: str) -> list[str]:
        """Generations that `name` has pointed at, oldest first. AdapterNotFound."""
        check_name(name)
        path = self._names / f"{name}.json"
        if not path.is_file():
            raise AdapterNotFound(name, list(self.names()))
        return self._read(path)

    def current(self, name: str) -> str:
        """The generation that `name` points at. AdapterNotFound."""
        return self.history(name)[-1]

    def folder(self, name_or_generation: str) -> Path:
        """The folder behind a name or a generation (12 to 64 hex digits). AdapterNotFound."""
        if NAME.fullmatch(name_or_generation) and (self._names / f"{name_or_generation}.json").is_file():
            return self._objects / self.current(name_or_generation)
        if GENERATION.fullmatch(name_or_generation):
            found = [path for path in self._objects.glob(f"{name_or_generation}*") if path.is_dir()]
            if len(found) == 1:
                return found[0]
        raise AdapterNotFound(name_or_generation, list(self.names()))

    def passport(self, name_or_generation: str) -> Passport:
        return read_passport(self.folder(name_or_generation), name=name_or_generation)

    def remove(self, name: str) -> None:
        """Forget `name`, damaged or not, and what is held back from it. Its objects stay until `collect`. AdapterNotFound."""
        check_name(name)
        if name not in self.damaged() and not (self._held / f"{name}.json").is_file():
            self.history(name)
        with self._locked():
            for folder in (self._names, self._held):
                (folder / f"{name}.json").unlink(missing_ok=True)

    def use(self) -> int | None:
        """A descriptor, for whoever serves from this store to close at its end: what has no name is not collected until then."""
        self.root.mkdir(parents=True, exist_ok=True)
        return in_use(self.root / _USED)

    @property
    def used(self) -> bool:
        """Whether a process serves from it."""
        path = self.root / _USED
        if not path.exists() or (descriptor := hold(path)) is None:
            return path.exists()
        os.close(descriptor)
        return False

    def collect(self) -> list[str]:
        """Delete objects that no name points at, now or in its history, and none holds; returns their generations.

        None while a server uses the store: it may have fetched or mixed them. What a crash left half-written an hour ago goes too.
        """
        with self._locked():
            if self.used:
                return []
            if broken := self.damaged():
                raise AdapterInvalid(next(iter(broken)), "nothing is deleted while its pointer is damaged: mend or remove it first")
            kept = self._wanted()
            unused = [path for path in self._objects.glob("[0-9a-f]*") if path.name not in kept]
            for path in (*unused, *abandoned_stages(self._objects)):
                shutil.rmtree(path)
        return [path.name for path in unused]

    def discard(self, generation: str) -> None:
        """Delete one object, unless a name points at it, now or in its history, or holds it."""
        with self._locked():
            if not self.damaged() and generation not in self._wanted():
                shutil.rmtree(self._objects / generation, ignore_errors=True)

    def _wanted(self) -> set[str]:
        """Generations that a name points at, now or in its history, or holds."""
        return {identity for name in self.names() for identity in self.history(name)} | set(self.all_held().values())

    @contextmanager
    def _locked(self) -> Generator[None]:
        with locked(self.root / ".lock"):
            restore_folders(self._objects)
            yield

    def _take(self, staged: Path, identity: str, *, renew: bool) -> bool:
        """Whether it took the place of another. What is not whole takes none of what is."""
        there = self._objects / identity
        if not there.is_dir():
            publish_folder(staged, there)
            return False
        if (renew and _alike(there, staged)) or (_whole(there, identity) and not (renew and _whole(staged, identity))):
            return False
        replace_folder(staged, there)
        return True

    def _point(self, name: str, identity: str, *, expected: str | None) -> None:
        self._names.mkdir(parents=True, exist_ok=True)
        path = self._names / f"{name}.json"
        try:
            history = self._read(path) if path.is_file() else []
        except AdapterInvalid:  # pointing it again is what mends it
            history = []
        if expected is not None and (not history or not history[-1].startswith(expected)):
            raise GenerationConflict(name, expected=expected, current=history[-1] if history else None)
        if not history or history[-1] != identity:
            history.append(identity)
        write_text(path, json.dumps({"generation": identity, "history": history}, indent=2) + "\n")

    def _read(self, path: Path) -> list[str]:
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["history"]
            if history and all(GENERATION.fullmatch(item) for item in history):
                return history
        except (ValueError, KeyError, TypeError):
            pass
        mend = "point it again with `embedft adapters import --name`, or `embedft adapters remove` it"
        raise AdapterInvalid(path.stem, f"the store's pointer {path.name} is damaged: {mend}")


def _whole(folder: Path, identity: str) -> bool:
    """Whether its content is what its generation says, and its probes can be read."""
    from embedft.adapters.probes import read_probes

    try:
        read_probes(folder)
        return generation(folder) == identity
    except AdapterInvalid:
        return False


def _alike(old: Path, new: Path) -> bool:
    """Whether all files are the same; evaluation texts, which an export leaves out, may be missing in `new`."""
    had, given = ({path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (old, new))
    with suppress(OSError):
        return had - given <= {Path("eval", TEXTS)} and all(filecmp.cmp(old / path, new / path, shallow=False) for path in given)
    return False


def adapter_folder(named: str | Path, store: AdapterStore | None) -> Path:
    """The folder of an adapter: `named` itself, or what `store` has under that name, which a folder of other things does not hide.

    UsageError, AdapterNotFound.
    """
    given, name = Path(named), str(named)
    if given.is_dir() and ((given / PASSPORT).is_file() or store is None or name not in store.names()):
        return given
    if store is None:
        raise UsageError(f"adapter {name!r} is no folder, and no adapter store was given to find it in")
    return store.folder(name)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise AdapterInvalid(name, "a name is 1 to 64 letters, digits, '.', '_' or '-', and begins with a letter or digit")


def check_folder(folder: Path, name: str) -> None:
    """Refuse links, devices, pickles and sizes beyond reason, before a byte of it is interpreted."""
    count = size = 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise AdapterInvalid(name, f"{path.name} is a link or no plain file")
        if path.suffix.lower() in _PICKLES:
            raise AdapterInvalid(name, f"{path.name} is a pickle; only safetensors is read: convert it with save_file")
        count, size = count + 1, size + path.stat().st_size
    if count > MAX_FILES or size > MAX_BYTES:
        raise AdapterInvalid(name, f"{count} files, {size} bytes: more than {MAX_FILES} files or {MAX_BYTES} bytes")
