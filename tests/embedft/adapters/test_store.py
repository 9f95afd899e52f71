"""The store: names, generations, what a crash leaves, what is collected."""

import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from embedft.adapters.passport import CONFIG, PASSPORT, WEIGHTS, generation, read_passport
from embedft.adapters.probes import PROBES, RecordedProbes, read_probes, write_probes
from embedft.adapters.store import AdapterStore, adapter_folder
from embedft.adapters.transfer import import_folder
from embedft.errors import AdapterInvalid, AdapterNotFound, GenerationConflict, UsageError
from embedft.files import write_text
from tests.embedft.adapter_fixtures import damaged


def test_the_store_keeps_generations_and_names_point_at_them(made: Path, store: AdapterStore, tmp_path: Path) -> None:
    first = import_folder(store, made, name="legal")
    second_folder = damaged(Path(shutil.copytree(made, tmp_path / "second")), lambda name, tensor: tensor * np.float32(1.5))
    second = import_folder(store, second_folder, name="legal")
    assert first != second
    assert store.names() == {"legal": second}
    assert store.history("legal") == [first, second]
    assert generation(store.folder(first)) == first
    assert store.folder(second[:12]) == store.folder("legal")
    store.point("legal", first)
    assert store.current("legal") == first


def test_a_folder_of_other_things_does_not_hide_the_adapter_of_its_name(
    adapter: Path, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_folder(store, adapter, name="notes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    assert adapter_folder("notes", store) == store.folder("notes")
    assert adapter_folder("notes", None) == Path("notes")
    shutil.copytree(adapter, "notes", dirs_exist_ok=True)
    assert adapter_folder("notes", store) == Path("notes")
    with pytest.raises(AdapterNotFound, match="there are notes"):
        adapter_folder("nots", store)
    with pytest.raises(UsageError, match="'nots' is no folder, and no adapter store was given"):
        adapter_folder("nots", None)


def test_a_name_is_pointed_where_it_points_though_nothing_can_be_written(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    (store.root / ".lock").unlink()
    (store.root / ".lock").mkdir()  # it can be locked no more, as on a disk that is mounted for reading
    assert store.point("legal", identity[:12]) == identity
    with pytest.raises(OSError, match="lock"):
        store.point("other", identity)


def test_compare_and_swap_refuses_a_stale_expectation(adapter: Path, store: AdapterStore) -> None:
    current = import_folder(store, adapter, name="legal")
    with store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        with pytest.raises(GenerationConflict):
            store.put(stage, "legal", expected="0" * 12)
    assert store.current("legal") == current


def test_a_failed_put_leaves_nothing_behind(adapter: Path, store: AdapterStore) -> None:
    (adapter / CONFIG).unlink()
    with pytest.raises(AdapterInvalid):
        import_folder(store, adapter)
    assert store.names() == {}
    assert not list((store.root / "objects").iterdir())


def test_a_damaged_pointer_hides_no_other_adapter_and_can_be_mended(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    import_folder(store, adapter, name="medical")
    (store.root / "names" / "medical.json").write_text('{"generation": ')
    assert store.names() == {"legal": identity}
    assert "point it again" in store.damaged()["medical"]
    with pytest.raises(AdapterInvalid, match="nothing is deleted while"):
        store.collect()
    import_folder(store, adapter, name="medical")
    assert (store.names(), store.damaged()) == ({"legal": identity, "medical": identity}, {})


def test_a_pointer_that_cannot_be_read_hides_no_other_adapter(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    (store.root / "names" / "medical.json").mkdir()  # what it is to a reader without the right, too: an OSError
    assert store.names() == {"legal": identity}
    assert "cannot be read" in store.damaged()["medical"]
    assert str(store.root) not in store.damaged()["medical"]
    with pytest.raises(AdapterInvalid, match="nothing is deleted while"):
        store.collect()


def test_a_damaged_note_of_what_is_held_back_is_named_and_can_be_removed(adapter: Path, store: AdapterStore) -> None:
    import_folder(store, adapter, name="legal")
    with store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        store.hold(stage, "medical")
    (store.root / "held" / "medical.json").write_text("{")
    with pytest.raises(AdapterInvalid, match=r"held/medical\.json"):
        store.collect()
    store.remove("medical")
    assert store.collect() == []


def test_collect_deletes_only_what_nothing_names_and_nothing_while_a_server_uses_the_store(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    assert store.collect() == []
    store.remove("legal")
    servers = [store.use(), AdapterStore(store.root).use()]
    for server in servers:
        assert server is not None
        assert store.used
        assert store.collect() == []
        os.close(server)
    assert not store.used
    assert store.collect() == [identity]
    with pytest.raises(AdapterNotFound):
        store.folder("legal")


def test_what_a_name_once_pointed_at_is_kept_for_a_rollback(made: Path, store: AdapterStore, tmp_path: Path) -> None:
    first = import_folder(store, made, name="legal")
    second_folder = damaged(Path(shutil.copytree(made, tmp_path / "second")), lambda name, tensor: tensor * np.float32(1.5))
    second = import_folder(store, second_folder, name="legal")
    assert import_folder(store, second_folder, name="legal") == second
    assert store.history("legal") == [first, second], "the same once more is no step"
    for identity in (first, second):
        store.discard(identity)
    assert store.collect() == []
    assert generation(store.folder(store.point("legal", first[:12]))) == first
    store.remove("legal")
    store.discard(first)
    assert store.collect() == [second]


def test_a_name_that_should_be_there_and_is_not_is_a_conflict(adapter: Path, store: AdapterStore) -> None:
    with store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        with pytest.raises(GenerationConflict):
            store.put(stage, "legal", expected=generation(adapter))
    assert store.names() == {}


@pytest.mark.parametrize("bound", ["MAX_FILES", "MAX_BYTES"])
def test_a_folder_beyond_reason_is_refused(adapter: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    files = [path for path in adapter.rglob("*") if path.is_file()]
    most = len(files) if bound == "MAX_FILES" else sum(path.stat().st_size for path in files)
    monkeypatch.setattr(f"embedft.adapters.store.{bound}", most)
    import_folder(store, adapter)
    monkeypatch.setattr(f"embedft.adapters.store.{bound}", most - 1)
    with pytest.raises(AdapterInvalid, match="more than"):
        import_folder(store, adapter)


@pytest.mark.parametrize("renew", [True, False])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, PASSPORT, PROBES])
def test_a_damaged_object_is_mended_by_putting_the_good_folder_again(adapter: Path, store: AdapterStore, file: str, renew: bool) -> None:
    identity = import_folder(store, adapter, name="legal")
    broken = store.folder("legal") / file
    half = broken.read_bytes()[: broken.stat().st_size // 2]
    broken.write_bytes(half)
    with broken.open("rb") as reader, store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        assert store.put(stage, "legal", renew=renew) == identity
        assert reader.read() == half  # who has the old one open goes on with it
    assert {path.name: path.read_bytes() for path in store.folder("legal").iterdir()} == {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }
    assert [path.name for path in (store.root / "objects").iterdir()] == [identity]


def test_corrected_probes_and_passport_of_the_same_generation_take_their_place(adapter: Path, store: AdapterStore) -> None:
    (adapter / "eval").mkdir()
    (adapter / "eval" / "texts.jsonl").write_text("{}")
    identity = import_folder(store, adapter, name="legal")
    (adapter / "eval" / "texts.jsonl").unlink()  # as an export leaves it out
    unchanged = store.folder("legal").stat().st_ino
    import_folder(store, adapter, name="legal")
    assert store.folder("legal").stat().st_ino == unchanged
    probes = read_probes(adapter)
    write_probes(adapter, RecordedProbes(probes.probes, probes.base, probes.effect, {}, 0.05))
    read_passport(adapter).model_copy(update={"metrics": {"ndcg": 0.5}}).write(adapter)
    with store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        assert store.add(stage, renew=False) == identity
    assert store.folder("legal").stat().st_ino == unchanged
    assert import_folder(store, adapter, name="legal") == identity
    assert read_probes(store.folder("legal")).tolerance == 0.05
    assert store.passport("legal").metrics == {"ndcg": 0.5}


@pytest.mark.parametrize("step", ["the old one moved away", "the new one moved in"])
def test_a_replacement_that_was_cut_off_leaves_the_object_whole(adapter: Path, store: AdapterStore, tmp_path: Path, step: str) -> None:
    """What is on disk after a crash at either step."""
    identity = import_folder(store, adapter, name="legal")
    objects = store.root / "objects"
    if step == "the old one moved away":
        store.folder("legal").rename(objects / f".old-{identity}")
    else:
        shutil.copytree(adapter, objects / f".old-{identity}")
    again = AdapterStore(store.root)
    assert generation(again.folder("legal")) == identity
    assert [path.name for path in objects.iterdir()] == [identity]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_an_object_that_is_replaced_is_there_at_every_moment(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    folder, over, looks, missed = store.folder("legal"), threading.Event(), 0, 0

    def look() -> None:
        nonlocal looks, missed
        while not over.is_set():
            looks, missed = looks + 1, missed + (not os.path.exists(folder))

    looking = threading.Thread(target=look)
    looking.start()
    for count in range(100):
        read_passport(adapter).model_copy(update={"metrics": {"count": count}}).write(adapter)
        assert import_folder(store, adapter, name="legal") == identity
    over.set()
    looking.join()
    assert store.passport("legal").metrics == {"count": 99}
    assert missed == 0 < looks
    assert [path.name for path in (store.root / "objects").iterdir()] == [identity]


def test_where_folders_cannot_be_exchanged_one_is_moved_after_the_other(
    adapter: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = import_folder(store, adapter, name="legal")
    monkeypatch.setattr("embedft.files.ctypes.CDLL", lambda _: object())
    read_passport(adapter).model_copy(update={"metrics": {"ndcg": 0.5}}).write(adapter)
    assert import_folder(store, adapter, name="legal") == identity
    assert store.passport("legal").metrics == {"ndcg": 0.5}
    assert [path.name for path in (store.root / "objects").iterdir()] == [identity]


def test_what_a_crash_left_half_written_is_collected_and_not_what_is_being_written_whatever_the_clock(
    adapter: Path, store: AdapterStore
) -> None:
    identity = import_folder(store, adapter, name="legal")
    old, new = (store.root / "objects" / name for name in (".stage-old", ".stage-new"))
    for stage in (old, new):
        stage.mkdir()
        (stage / "half").write_text("x")
    os.utime(old, (0, 0))
    with store.stage() as used:
        os.utime(used, (0, 0))  # as if the clock had jumped
        assert store.collect() == []
        assert {path.name for path in (store.root / "objects").iterdir()} == {identity, ".stage-new", used.name}


def test_collect_waits_for_what_is_just_being_held(adapter: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    collecting = threading.Thread(target=lambda: deleted.extend(store.collect()))

    def slow(path: Path, text: str) -> None:
        collecting.start()
        collecting.join(timeout=0.3)
        write_text(path, text)

    monkeypatch.setattr("embedft.adapters.store.write_text", slow)
    with store.stage() as stage:
        shutil.copytree(adapter, stage, dirs_exist_ok=True)
        identity = store.hold(stage, "legal")
    collecting.join()
    assert (deleted, store.held("legal")) == ([], identity)
    assert store.folder(identity).is_dir()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 65, "ａ", "a\nb", "a@b"])
def test_names_that_could_leave_the_store_are_refused(adapter: Path, store: AdapterStore, name: str) -> None:
    if name:
        with pytest.raises(AdapterInvalid):
            import_folder(store, adapter, name=name)
    with pytest.raises((AdapterNotFound, AdapterInvalid)):
        store.folder(name)
