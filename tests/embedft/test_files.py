"""Files that are whole or absent: what a power cut at any moment would leave, and what hashes and tables of tensors tell apart."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from embedft.files import HeaderInvalid, hash_tensors, publish_folder, replace_folder, staged_folder, tensor_table, write_jsonl, write_text


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is done to which inode, in order: "kept" once its bytes are on the disk, "named" once it takes a name."""
    done: list[tuple[str, int]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def named(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, other: Any) -> Any:
            done.append(("named", os.stat(one).st_ino))
            return step(one, other)

        return call

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(("kept", os.fstat(descriptor).st_ino)) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    return done


@pytest.mark.parametrize("replaced", [False, True])
def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, steps: list[tuple[str, int]], replaced: bool) -> None:
    out = tmp_path / "out"
    if replaced:
        out.mkdir()
        (out / "old").touch()
    with staged_folder(tmp_path) as stage:
        (stage / "deep").mkdir()
        for name in ("a", "deep/b"):
            (stage / name).write_text(name)
        inside = {path.stat().st_ino for path in (stage, *stage.rglob("*"))}
        (replace_folder if replaced else publish_folder)(stage, out)
    before = (
        steps[: steps.index(("named", out.stat().st_ino))] if not replaced else steps[:-1]
    )  # two folders are exchanged by a call of C's
    assert {inode for step, inode in before if step == "kept"} >= inside
    assert steps[-1] == ("kept", tmp_path.stat().st_ino), "the name itself, last"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / "deep" / "b").read_text() == "deep/b"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (out, out / "deep", out / "a")] == [0o755, 0o755, 0o644]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, steps: list[tuple[str, int]]) -> None:
    path = tmp_path / "names.json"
    for text in ("one", "two"):
        write_text(path, text)
        inode, folder = path.stat().st_ino, tmp_path.stat().st_ino
        assert steps == [("kept", inode), ("named", inode), ("kept", folder)]
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (text, 0o644)
        steps.clear()


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_same_rows_are_the_same_bytes_packed_too_whenever_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[bytes] = set()
    for now in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_jsonl(tmp_path / "rows.jsonl.gz", [{"a": "ü"}])
        found.add((tmp_path / "rows.jsonl.gz").read_bytes())
    assert len(found) == 1


def test_tensors_of_other_names_kinds_shapes_or_bytes_have_another_hash(tmp_path: Path) -> None:
    given = np.arange(6, dtype=np.int32)
    kinds = ({"a": given}, {"b": given}, {"a": given.view(np.float32)}, {"a": given.reshape(2, 3)}, {"a": given + 1})
    found = set[str]()
    for tensors in kinds:
        save_file(tensors, str(tmp_path / "x.safetensors"))
        found.add(hash_tensors([tmp_path / "x.safetensors"]))
    assert len({*found, hash_tensors([tmp_path / "x.safetensors"], then=[b"more"])}) == len(kinds) + 1


@pytest.mark.parametrize("offsets", [[0, 9], [-4, 4], [8, 4]])
def test_a_tensor_that_lies_outside_its_file_is_refused(tmp_path: Path, offsets: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(HeaderInvalid, match="lies outside the file"):
        tensor_table(tmp_path / "x")
