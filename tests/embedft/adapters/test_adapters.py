"""Transfer and verification of adapters, on a real MiniLM adapter of random weights."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedft.adapters.card import model_card
from embedft.adapters.passport import CONFIG, PASSPORT, WEIGHTS, BaseIdentity, Passport, generation, lineage, read_passport
from embedft.adapters.store import AdapterStore
from embedft.adapters.transfer import TransferFailed, export_folder, import_folder, pull, push
from embedft.errors import AdapterExists, AdapterInvalid, BaseMismatch, UsageError
from embedft.verify import verify

Tensors = dict[str, np.ndarray]


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    from embedft.base import BaseSpec, source_folder

    other = Path(shutil.copytree(source_folder(BaseSpec("minilm")), tmp_path / "other"))
    tensors: Tensors = load_file(str(other / "model.safetensors"))
    tensors["embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"] + 1e-3
    save_file(tensors, str(other / "model.safetensors"))
    with pytest.raises(BaseMismatch, match=r"was trained on base minilm \([0-9a-f]{12}…\), but here is .*other \([0-9a-f]{12}…\)"):
        verify(adapter, base=other)


def test_missing_or_misshapen_tensors_are_named(adapter: Path) -> None:
    tensors: Tensors = load_file(str(adapter / WEIGHTS))
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, str(adapter / WEIGHTS))
    with pytest.raises(AdapterInvalid, match="the file has none"):
        verify(adapter)
    save_file(tensors | {gone: tensors[gone][:-1]}, str(adapter / WEIGHTS))
    with pytest.raises(AdapterInvalid, match=rf"{gone}: the base expects \(4, \d+\), the file has \(3, \d+\)"):
        verify(adapter)
    save_file(tensors | {"another": tensors[gone]}, str(adapter / WEIGHTS))
    with pytest.raises(AdapterInvalid, match="tensor another: the base expects none"):
        verify(adapter)


def test_a_generation_ignores_metrics_and_the_card_but_not_what_changes_answers(adapter: Path) -> None:
    before = generation(adapter)
    (adapter / "README.md").write_text("another card")
    passport = json.loads((adapter / PASSPORT).read_text())
    (adapter / PASSPORT).write_text(json.dumps({**passport, "metrics": {"x": 1}, "created": "later"}))
    assert generation(adapter) == before
    (adapter / PASSPORT).write_text(json.dumps({**passport, "prompts": {"query": "query: "}}))
    assert generation(adapter) != before


def test_a_generation_changes_with_the_config_the_base_and_every_field_that_changes_answers(adapter: Path) -> None:
    passport = json.loads((adapter / PASSPORT).read_text())
    changes = {
        "task": "causal_lm",
        "base": passport["base"] | {"fingerprint": "0" * 64},
        "method": "rslora",
        "side": "query",
        "prompts": {"query": "query: "},
        "pooling": "cls",
        "normalize": not passport["normalize"],
        "max_length": passport["max_length"] + 1,
        "dimensions": [384, 64],
        "template_hash": "0" * 64,
    }
    found = {generation(adapter)}
    for field, value in changes.items():
        (adapter / PASSPORT).write_text(json.dumps({**passport, field: value}))
        found.add(generation(adapter))
    (adapter / PASSPORT).write_text(json.dumps(passport))
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert len({*found, generation(adapter)}) == len(changes) + 2


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


def test_what_is_no_folder_is_not_imported(adapter: Path, store: AdapterStore) -> None:
    for path in (adapter / "passport.json", adapter / "nix"):
        with pytest.raises(UsageError, match=f"{path.name} is not a folder"):
            import_folder(store, path, name="x")


def test_a_folder_without_passport_is_named_as_its_owner_calls_it(adapter: Path, store: AdapterStore) -> None:
    (adapter / PASSPORT).unlink()
    plain = r"it holds no passport\.json, so it was not written by embedft: plain PEFT's is imported with --base, --task and --name$"
    for name, called in ((None, adapter.name), ("legal", "legal")):
        with pytest.raises(AdapterInvalid, match=rf"^adapter '{called}' cannot be used: {plain}"):
            import_folder(store, adapter, name=name)
    with pytest.raises(AdapterInvalid, match=f"^adapter '{adapter}' cannot be used: {plain}"):
        pull(store, str(adapter))
    assert not store.names()


def test_what_an_upload_that_was_cut_off_leaves_is_no_adapter(
    adapter: Path, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    put = LocalFileSystem.put_file

    def cut_off(files: LocalFileSystem, source: str, target: str) -> None:
        if target.endswith("probes.safetensors"):
            raise OSError("no route to host")
        put(files, source, target)

    import_folder(store, adapter, name="legal")
    for place in ("new", "old"):
        if place == "old":
            push(store, "legal", str(tmp_path / place))
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, "put_file", cut_off)
            with pytest.raises(TransferFailed, match="no route to host"):
                push(store, "legal", str(tmp_path / place))
        with pytest.raises(AdapterInvalid, match=r"holds no passport\.json"):
            pull(store, str(tmp_path / place), name="copy")
        push(store, "legal", str(tmp_path / place))
        assert pull(store, str(tmp_path / place), name="copy")[1] == store.current("legal")


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


def test_what_is_pulled_stays_in_its_folder(store: AdapterStore, tmp_path: Path) -> None:
    import fsspec

    files, root = fsspec.core.url_to_fs("memory://evil/adapter")
    files.pipe_file(f"{root}/../../outside", b"x")
    with pytest.raises(UsageError, match="does not belong in an adapter"):
        pull(store, "memory://evil/adapter")
    with pytest.raises(TransferFailed, match="there is nothing there"):
        pull(store, "memory://empty")
    assert not [*store.root.rglob("outside")]
    assert not store.names()


def test_the_card_says_how_good_the_adapter_is_and_how_it_must_be_used() -> None:
    figures = {name: {"mrr@10": value} for name, value in (("base", 0.5), ("bm25", 0.25), ("adapter", 0.75))}
    passport = Passport(
        name="a",
        task="embedding",
        base=BaseIdentity(model="owner/base", revision="v1", quantization="nf4", fingerprint="f" * 64),
        method="lora",
        r=4,
        alpha=8,
        side="query",
        prompts={"query": "find: "},
        pooling="cls",
        normalize=True,
        max_length=64,
        metrics={"metric": "mrr@10", **figures, "gain_ci95": [-0.01, 0.4]},
    )
    card = model_card(passport)
    for line in (
        'base_model: "owner/base"',
        "| Base | `owner/base` at `v1` |",
        "| Vectors | cls pooling, normalised |",
        '| Prompts | `{"query": "find: "}` |',
        "| Side | query |",
        "| | base | bm25 | adapter |",
        "| mrr@10 | 0.5000 | 0.2500 | 0.7500 |",
        "95 % interval -0.0100 to +0.4000",
        "It was trained on the base in nf4",
    ):
        assert line in card
    plain = passport.model_copy(update={"base": BaseIdentity(model="b", fingerprint="f" * 64), "metrics": {}})
    assert "Not evaluated" in model_card(plain)
    assert "It was trained on" not in model_card(plain)


def test_export_leaves_evaluation_texts_out_and_says_so(adapter: Path, store: AdapterStore, tmp_path: Path) -> None:
    (adapter / "eval").mkdir()
    (adapter / "eval" / "texts.jsonl").write_text('{"text": "private"}\n')
    import_folder(store, adapter, name="legal")
    assert export_folder(store, "legal", tmp_path / "out") == ["eval/texts.jsonl"]
    assert not (tmp_path / "out" / "eval" / "texts.jsonl").exists()
    assert export_folder(store, "legal", tmp_path / "whole", keep_texts=True) == []
    assert (tmp_path / "whole" / "eval" / "texts.jsonl").exists()
    assert push(store, "legal", str(tmp_path / "unasked"))[1] == ["eval/texts.jsonl"]
    for number, keep in enumerate((False, True)):
        pushed, left_out = push(store, "legal", str(tmp_path / f"pushed{number}"), keep_texts=keep)
        assert (pushed, left_out) == (store.current("legal"), [] if keep else ["eval/texts.jsonl"])
        assert (tmp_path / f"pushed{number}" / "eval" / "texts.jsonl").exists() == keep
        assert (tmp_path / f"pushed{number}" / "passport.json").is_file()
    push(store, "legal", str(tmp_path / "pushed1"))
    assert not (tmp_path / "pushed1" / "eval" / "texts.jsonl").exists()
    assert read_passport(tmp_path / "out").name == "a"
    with pytest.raises(AdapterExists):
        export_folder(store, "legal", tmp_path / "out")


def test_lineage_changes_with_everything_that_changes_a_vector() -> None:
    same = {"side": "both", "prompts": {}, "pooling": "mean", "max_length": 128, "dimensions": (), "normalize": True}
    changes = [
        {"side": "query"},
        {"prompts": {"query": "q"}},
        {"pooling": "cls"},
        {"max_length": 64},
        {"dimensions": (64,)},
        {"normalize": False},
    ]
    identities = [lineage("b", "g", **{**same, **change}) for change in [{}, *changes]]  # type: ignore[arg-type]
    assert len({*identities, lineage("b", None, **same), lineage("c", "g", **same)}) == len(changes) + 3  # type: ignore[arg-type]
