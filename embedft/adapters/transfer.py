"""Adapters in and out of a store: import and export of folders, push and pull to any fsspec place or the hub, bit for bit."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedft.adapters.passport import CONFIG, PASSPORT, TEXTS, WEIGHTS, read_passport
from embedft.adapters.patterns import check_config
from embedft.adapters.store import AdapterStore, check_folder
from embedft.errors import AdapterExists, AdapterInvalid, EmbedftError, UsageError
from embedft.files import HeaderInvalid, not_finite, publish_folder, staged_folder, tensor_table


class TransferFailed(EmbedftError):
    """The other end did not take or give the adapter; nothing here was changed."""

    code = "transfer_failed"


def import_folder(store: AdapterStore, source: Path, *, name: str | None = None) -> str:
    """Copy an adapter folder into the store, validated first; returns its generation. AdapterInvalid says what is wrong."""
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder")
    called = name or read_passport(source).name
    check_folder(source, called)  # before its bytes are copied
    with store.stage() as stage:
        _copy(source, stage)
        check_contents(stage, called)
        return store.put(stage, called)


def export_folder(store: AdapterStore, name: str, out: Path, *, keep_texts: bool = False) -> list[str]:
    """Copy the current generation of `name` to `out`, which must not exist; returns the files left out because they carry texts."""
    if out.exists():
        raise AdapterExists(f"{out} exists already: name a new folder")
    source = store.folder(name)
    left_out: list[str] = []
    with staged_folder(out.resolve().parent) as stage:
        _copy(source, stage)
        if not keep_texts and (stage / "eval" / TEXTS).is_file():
            (stage / "eval" / TEXTS).unlink()
            left_out.append(f"eval/{TEXTS}")
        publish_folder(stage, out)
    return left_out


def push(store: AdapterStore, name: str, place: str, *, keep_texts: bool = False) -> tuple[str, list[str]]:
    """Upload the current generation of `name` to `place` (a folder, hf://user/repo or any fsspec URL); returns the generation, and
    the files left out because they carry texts. Those of an earlier push are taken away there."""
    source, generation = store.folder(name), store.current(name)
    texts = [] if keep_texts else [f"eval/{TEXTS}"]
    try:
        if place.startswith("hf://"):
            _hub().create_repo(place[5:], exist_ok=True)
            _hub().upload_folder(repo_id=place[5:], folder_path=str(source), ignore_patterns=texts, delete_patterns=texts)
        else:
            _upload(*_filesystem(place), source, without=texts)
    except EmbedftError:
        raise
    except Exception as error:  # fsspec's backends and the hub raise what they like
        raise TransferFailed(f"pushing {name!r} to {place} failed: {error}") from error
    return generation, [path for path in texts if (source / path).is_file()]


def _upload(files: Any, root: str, source: Path, *, without: Sequence[str]) -> None:
    """The passport goes first and comes last: what an upload that was cut off leaves, half of it an older adapter's, is none."""
    for old in (PASSPORT, *without):
        if files.exists(f"{root}/{old}"):
            files.rm_file(f"{root}/{old}")
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    for name in sorted(set(names) - set(without), key=lambda name: (name == PASSPORT, name)):
        target = f"{root}/{name}"
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        files.put_file(str(source / name), target)


def pull(store: AdapterStore, place: str, *, name: str | None = None) -> tuple[str, str]:
    """Download an adapter from where `push` put it (hf://user/repo@revision too) into the store; returns its name and generation."""
    with store.stage() as stage:
        try:
            if place.startswith("hf://"):
                repo, _, revision = place[5:].partition("@")
                _hub().snapshot_download(repo, revision=revision or None, local_dir=str(stage))
                shutil.rmtree(stage / ".cache", ignore_errors=True)
            else:
                files, root = _filesystem(place)
                _download(files, root, stage)
        except EmbedftError:
            raise
        except Exception as error:
            raise TransferFailed(f"pulling from {place} failed: {error}") from error
        called = name or read_passport(stage, name=place).name
        check_contents(stage, called)
        return called, store.put(stage, called)


def check_contents(folder: Path, name: str) -> None:
    """A passport, PEFT's two files and readable tensors: what any adapter must have before an engine hears of it."""
    check_folder(folder, name)
    read_passport(folder, name=name)
    check_weights(folder, name)


def check_weights(folder: Path, name: str) -> None:
    """PEFT's two files: a config whose patterns end, and tensors that can be read and hold nothing but numbers. AdapterInvalid."""
    for required in (CONFIG, WEIGHTS):
        if not (folder / required).is_file():
            below = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/{required}"))
            hint = f": {', '.join(below[:3])} in it has one; name that folder" if below else ""
            raise AdapterInvalid(name, f"its folder lacks {required}{hint}")
    check_config(folder, name)
    try:
        table = tensor_table(folder / WEIGHTS)
        if not table:
            raise AdapterInvalid(name, f"{WEIGHTS} holds no tensors")
        if broken := not_finite(folder / WEIGHTS, table):
            raise AdapterInvalid(name, f"tensor {broken} is not finite: its training diverged (lower train.lr), or the file is damaged")
    except HeaderInvalid as error:
        raise AdapterInvalid(name, str(error)) from None


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True)


def _hub() -> Any:
    import huggingface_hub

    return huggingface_hub


def _filesystem(place: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{place}: {error}") from None
    return files, str(root).rstrip("/")


def _download(files: Any, root: str, stage: Path) -> None:
    found: list[str] = files.find(root)
    if not found:
        raise FileNotFoundError("there is nothing there")
    for remote in found:
        relative = Path(remote.removeprefix(root).lstrip("/"))
        if relative.is_absolute() or ".." in relative.parts:
            raise UsageError(f"a file named {relative} does not belong in an adapter")
        (stage / relative).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(remote, str(stage / relative))
