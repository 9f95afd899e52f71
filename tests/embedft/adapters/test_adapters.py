"""The store, transfer and verification of adapters, on a real MiniLM adapter of random weights."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedft.adapters.passport import CONFIG, PASSPORT, WEIGHTS, generation, lineage, read_passport
from embedft.adapters.probes import PROBES, Probe, RecordedProbes, choose, compare, read_probes, write_probes
from embedft.adapters.store import AdapterStore
from embedft.adapters.transfer import export_folder, import_folder, pull, push
from embedft.errors import AdapterExists, AdapterInvalid, AdapterNotFound, BaseMismatch, GenerationConflict
from embedft.files import write_text
from embedft.verify import verify
from tests.embedft.adapter_fixtures import make_adapter

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("made") / "a")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def damaged(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    tensors: Tensors = load_file(str(folder / WEIGHTS))
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, str(folder / WEIGHTS))
    return folder


def test_an_untouched_adapter_passes_its_probes(adapter: Path) -> None:
    report = verify(adapter)
    assert report.passed
    assert report.error < 1e-5
    assert report.signal > 0.1


@pytest.mark.parametrize("kind", ["query", "key", "value", "intermediate.dense", "attention.output.dense"])
def test_an_adapter_with_any_module_type_zeroed_is_refused(adapter: Path, kind: str) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * 0 if f"{kind}.lora_B" in name else tensor))
    assert not report.passed
    assert "differs from the trainer's" in report.reason


def test_an_adapter_scaled_by_0_8_is_refused(adapter: Path) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * np.float32(0.8) if "lora_B" in name else tensor))
    assert not report.passed
    assert 0.1 < report.error < 0.4


def test_an_adapter_that_does_nothing_is_refused(adapter: Path) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor))
    assert not report.passed
    assert "changes nothing" in report.reason


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    from embedft.base import BaseSpec, source_folder

    other = Path(shutil.copytree(source_folder(BaseSpec("minilm")), tmp_path / "other"))
    tensors: Tensors = load_file(str(other / "model.safetensors"))
    tensors["embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"] + 1e-3
    save_file(tensors, str(other / "model.safetensors"))
    with pytest.raises(BaseMismatch, match="was trained on base"):
        verify(adapter, base=other)


def test_missing_or_misshapen_tensors_are_named(adapter: Path) -> None:
    tensors: Tensors = load_file(str(adapter / WEIGHTS))
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, str(adapter / WEIGHTS))
    with pytest.raises(AdapterInvalid, match="the file has none"):
        verify(adapter)


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


def test_a_generation_ignores_metrics_and_the_card_but_not_what_changes_answers(adapter: Path) -> None:
    before = generation(adapter)
    (adapter / "README.md").write_text("another card")
    passport = json.loads((adapter / PASSPORT).read_text())
    (adapter / PASSPORT).write_text(json.dumps({**passport, "metrics": {"x": 1}, "created": "later"}))
    assert generation(adapter) == before
    (adapter / PASSPORT).write_text(json.dumps({**passport, "prompts": {"query": "query: "}}))
    assert generation(adapter) != before


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


def test_collect_deletes_only_what_nothing_names_or_leases(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    assert store.collect() == []
    store.remove("legal")
    assert store.collect(leased={identity}) == []
    assert store.collect() == [identity]
    with pytest.raises(AdapterNotFound):
        store.folder("legal")


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


def test_what_a_crash_left_half_written_is_collected_a_day_later(adapter: Path, store: AdapterStore) -> None:
    identity = import_folder(store, adapter, name="legal")
    old, new = (store.root / "objects" / name for name in (".stage-old", ".stage-new"))
    for stage in (old, new):
        stage.mkdir()
        (stage / "half").write_text("x")
    for path in (old / "half", old, new):  # a file of the new one was written just now
        os.utime(path, (0, 0))
    assert store.collect() == []
    assert {path.name for path in (store.root / "objects").iterdir()} == {identity, ".stage-new"}


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


def test_links_and_pickles_are_refused(adapter: Path, store: AdapterStore, tmp_path: Path) -> None:
    (adapter / "extra.bin").write_bytes(b"x")
    with pytest.raises(AdapterInvalid, match="pickle"):
        import_folder(store, adapter)
    (adapter / "extra.bin").unlink()
    os.symlink(tmp_path, adapter / "link")
    with pytest.raises(AdapterInvalid, match="link"):
        import_folder(store, adapter)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!", (10**10).to_bytes(8, "little") + b"{}"]
)
def test_a_weights_file_with_a_false_header_is_refused(adapter: Path, store: AdapterStore, content: bytes) -> None:
    (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterInvalid, match="header"):
        import_folder(store, adapter)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "largest"])
def test_weights_that_are_not_finite_are_refused(adapter: Path, store: AdapterStore, dtype: str, value: str) -> None:
    import torch
    from safetensors.torch import save_file as save

    kind: torch.dtype = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(tensor).to(kind) for name, tensor in load_file(str(adapter / WEIGHTS)).items()}
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = torch.finfo(kind).max if value == "largest" else float(value)
    save(tensors, str(adapter / WEIGHTS))
    if value == "largest":
        import_folder(store, adapter)
        return
    with pytest.raises(AdapterInvalid, match=f"{name} is not finite"):
        import_folder(store, adapter)
    assert not store.names()


def test_push_and_pull_round_trip_bit_for_bit(adapter: Path, store: AdapterStore, tmp_path: Path) -> None:
    import_folder(store, adapter, name="legal")
    for place in (str(tmp_path / "elsewhere"), "memory://adapters/legal"):
        pushed, left_out = push(store, "legal", place)
        assert left_out == []
        other = AdapterStore(tmp_path / f"other{len(place)}")
        assert pull(other, place, name="copy") == ("copy", pushed)
        for path in store.folder("legal").rglob("*"):
            if path.is_file():
                assert (other.folder("copy") / path.relative_to(store.folder("legal"))).read_bytes() == path.read_bytes()


def test_export_leaves_evaluation_texts_out_and_says_so(adapter: Path, store: AdapterStore, tmp_path: Path) -> None:
    (adapter / "eval").mkdir()
    (adapter / "eval" / "texts.jsonl").write_text('{"text": "private"}\n')
    import_folder(store, adapter, name="legal")
    assert export_folder(store, "legal", tmp_path / "out") == ["eval/texts.jsonl"]
    assert not (tmp_path / "out" / "eval" / "texts.jsonl").exists()
    for number, keep in enumerate((False, True)):
        pushed, left_out = push(store, "legal", str(tmp_path / f"pushed{number}"), keep_texts=keep)
        assert (pushed, left_out) == (store.current("legal"), [] if keep else ["eval/texts.jsonl"])
        assert (tmp_path / f"pushed{number}" / "eval" / "texts.jsonl").exists() == keep
        assert (tmp_path / f"pushed{number}" / "passport.json").is_file()
    assert read_passport(tmp_path / "out").name == "a"
    with pytest.raises(AdapterExists):
        export_folder(store, "legal", tmp_path / "out")


def test_probes_that_were_tampered_with_are_refused(adapter: Path) -> None:
    (adapter / PROBES).write_bytes(b"nonsense")
    with pytest.raises(AdapterInvalid, match="malformed"):
        read_probes(adapter)


def test_the_probes_kept_are_those_that_show_the_least_visible_module() -> None:
    probes = [Probe((index,)) for index in range(4)]
    effects = [np.ones(2, np.float32)] * 4
    without = {
        "seen everywhere": [np.zeros(2, np.float32)] * 4,
        "seen in two": [np.full(2, 1 - share, np.float32) for share in (0.01, 0.3, 0.02, 0.4)],
    }
    recorded = choose(probes, [np.full(2, index, np.float32) for index in range(4)], effects, without, keep=2)
    assert [array[0] for array in recorded.base] == [probe.ids[0] for probe in recorded.probes]
    assert {probe.ids[0] for probe in recorded.probes} == {1, 3}
    assert recorded.tolerance == pytest.approx(0.1)


def test_a_signal_within_the_engines_noise_fails() -> None:
    effect = (np.full(4, 0.1, np.float32),)
    recorded = RecordedProbes((Probe((1,)),), (), effect, {}, 0.1)
    base, again = [np.zeros(4, np.float32)], [np.full(4, 0.05, np.float32)]
    assert not compare(recorded, base=base, adapted=list(effect), base_again=again).passed
    assert compare(recorded, base=base, adapted=list(effect), base_again=base).passed


def test_an_engine_may_differ_by_its_rounding_which_its_base_shows_but_never_by_more_than_a_tenth(tmp_path: Path) -> None:
    base, effect = np.ones(100, np.float32), np.full(100, 0.1, np.float32)
    write_probes(tmp_path, RecordedProbes((Probe((1,)),), (base,), (effect,), {}, 0.02))
    recorded = read_probes(tmp_path)
    assert np.array_equal(recorded.base[0], base)
    for moved, off, passed in ((0.0, 0.05, False), (0.003, 0.05, True), (0.003, 0.07, False), (0.5, 0.09, True), (0.5, 0.11, False)):
        plain = [base + np.float32(moved)]
        report = compare(recorded, base=plain, adapted=[plain[0] + effect * np.float32(1 + off)], base_again=plain)
        assert report.passed == passed, (moved, off, report)
    assert "EMBEDFT_DTYPE" in report.reason


def test_lineage_changes_with_everything_that_changes_a_vector() -> None:
    same = {"side": "both", "prompts": {}, "pooling": "mean", "max_length": 128, "dimensions": (), "normalize": True}
    changes = [{"prompts": {"query": "q"}}, {"pooling": "cls"}, {"max_length": 64}, {"dimensions": (64,)}, {"normalize": False}]
    identities = [lineage("b", "g", **{**same, **change}) for change in [{}, *changes]]  # type: ignore[arg-type]
    assert len({*identities, lineage("b", None, **same), lineage("c", "g", **same)}) == len(changes) + 3  # type: ignore[arg-type]
