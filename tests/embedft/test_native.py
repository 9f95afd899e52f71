"""C of our own: compiled once, kept, and done without where it cannot be."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from embedft import native

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    native._library.cache_clear()
    return path


def again(source: Path) -> "native.ctypes.CDLL | None":
    native._library.cache_clear()  # as a process of its own
    return native.library(source, off="OFF")


def test_it_is_compiled_once_and_again_when_it_changed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = native.library(source, off="OFF")
    assert loaded is not None
    assert loaded.answer() == 42
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("compiled a second time"))
    assert again(source) is not None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "cache"))
    source.write_text(SOURCE.replace("42", "43"))
    loaded = again(source)
    assert loaded is not None
    assert loaded.answer() == 43


def test_without_a_compiler_and_with_one_that_fails_torch_is_left_to_do_it(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.INFO, "embedft.native"):
        assert native.library(source, off="OFF") is None
        assert "answer: not built" in caplog.text
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", "")
        assert again(source) is None
        assert "answer: no C compiler" in caplog.text


def test_a_compiler_may_have_arguments_and_what_it_complains_of_is_told(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc') or 'gcc'} -pipe")
    assert native.library(source, off="OFF") is not None
    source.write_text("this is no C\n")
    assert again(source) is None
    assert "answer: not built" in caplog.text
    assert "error" in caplog.text


def test_a_user_without_a_home_has_a_folder_of_its_own(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(source.parent))
    assert native.library(source, off="OFF") is not None
    folder = source.parent / f"embedft-native-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.getuid", lambda: 4711)  # whoever made that name first
    (source.parent / "embedft-native-4711").mkdir()
    assert again(source) is None


def test_its_identity_changes_with_all_that_decides_its_bits(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity() -> str:
        native._library.cache_clear()
        return native.identity(source, off="OFF")

    first = identity()
    source.write_text(SOURCE.replace("42", "43"))
    second = identity()
    monkeypatch.setattr(native, "processor", lambda: "flags : of another one")
    third = identity()
    monkeypatch.setenv("OFF", "0")
    assert len({first, second, third, "torch"}) == 4
    assert identity() == "torch"


def test_it_can_be_switched_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFF", "0")
    assert native.library(source, off="OFF") is None
    monkeypatch.setenv("OFF", "1")
    assert native.library(source, off="OFF") is not None
