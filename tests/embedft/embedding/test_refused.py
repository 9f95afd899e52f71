"""What a training of embeddings refuses, by name and before it takes time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from embedft.adapters.store import AdapterStore
from embedft.embedding.train import train
from embedft.errors import AdapterInvalid, BaseError, DataError, MethodUnsupported, RecipeError, UsageError
from tests.embedft.embedding.runs import PADDED, Make, trained
from tests.fixtures_embedding import disagree, planted_rows, tiny_encoder, write_rows


def test_faults_of_data_and_loss_are_told_before_a_model_loads(
    make: Make, store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedft.embedding.train.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(DataError, match="no document column"):
        train(make(data={"train": write_rows(root / "bad.jsonl", [{"query": "x"}])}), store=store)
    with pytest.raises(MethodUnsupported, match="the losses are mnrl"):
        train(make(loss={"name": "nmrl"}), store=store)
    with pytest.raises(DataError, match="no negative"):
        train(make(loss={"name": "triplet"}), store=store)
    for alone in ({"train": {"patience": 2}}, {"data": {"dev": str(root / "dev.jsonl")}}):
        with pytest.raises(RecipeError, match=r"go with train\.evaluate_every"):
            train(make(**alone), store=store)
    with pytest.raises(DataError, match=r"typo\.jsonl"):
        train(make(eval={"guard": {"data": str(root / "typo.jsonl")}}), store=store)


def test_a_run_that_diverges_publishes_nothing_and_says_so(make: Make, store: AdapterStore) -> None:
    with pytest.raises(AdapterInvalid, match="is not finite: its training diverged"):
        train(make(train={"lr": 1e30}), store=store)
    assert not store.names()


def test_rows_of_one_answer_are_refused_for_they_make_no_batch(make: Make, store: AdapterStore, root: Path, beir: str) -> None:
    same = [{"query": f"q{i}", "document": "the one answer"} for i in range(8)]
    with pytest.raises(DataError, match="no two training rows may share a batch"):
        train(make(data={"train": write_rows(root / "same.jsonl", same), "eval": beir}), store=store)


def test_rows_that_are_given_and_not_learned_from_are_told(
    make: Make, store: AdapterStore, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd = [{"query": f"q{i}", "document": "the one answer"} for i in range(30)]
    others = [{"query": f"p{i}", "document": f"another answer {i}"} for i in range(6)]
    train_rows = write_rows(root / "crowd.jsonl", [*crowd, *others])
    evaluation = write_rows(root / "crowd-test.jsonl", others[:2])
    train(make(data={"train": train_rows, "eval": evaluation}, train={"max_steps": 1}), store=store, dry_run=True)
    told = capsys.readouterr().err
    assert "tiny: 2 of 36 training rows are not used: the evaluation asks their queries" in told
    assert "of 34 rows an epoch teach nothing: too many rows have the same documents" in told
    also = [{"train": write_rows(root / "light.jsonl", planted_rows(8)), "weight": 0.05}]
    with pytest.raises(DataError, match=r"a weight of 0\.05 shows none of its rows in any epoch"):
        train(make(data={"also": also}), store=store, dry_run=True)


def test_texts_that_are_not_read_to_their_end_and_prompts_that_are_not_the_bases_own_are_told(
    make: Make, store: AdapterStore, root: Path, beir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row | {"document": f"{row['document']} {number} " * (6 if number % 4 == 0 else 1)} for number, row in enumerate(planted_rows(40))
    ]
    data = {"train": write_rows(root / "long.jsonl", rows), "eval": beir}
    train(make(data=data, train={"max_steps": 1, "max_length": 12}), store=store, dry_run=True)
    told = capsys.readouterr().err
    assert "tiny: 25% of the documents are longer than the 12 tokens that are read of them (the base by itself reads 32)" in told
    assert "prompts" not in told
    prompts = {"query": "find : ", "document": ""}
    train(make(data=data | {"prompts": prompts}, train={"max_steps": 1, "max_length": 64}), store=store, dry_run=True)
    told = capsys.readouterr().err
    assert "are longer than" not in told
    assert """tiny: what is told of the base, too, is with the recipe's prompts; its own are {"query": ""}""" in told


def test_a_row_without_the_negative_that_a_loss_needs_is_named_by_its_query(make: Make, store: AdapterStore, root: Path, beir: str) -> None:
    rows: list[dict[str, Any]] = [row | {"negative": f"no {i}"} for i, row in enumerate(planted_rows(8))]
    rows[5] |= {"negative": None, "query": "the one that has none"}
    data = {"train": write_rows(root / "bare.jsonl", rows), "eval": beir}
    with pytest.raises(DataError, match=r"1 of 8 rows have no negative \(the first asks 'the one that has none'\); .*data mine"):
        train(make(data=data, loss={"name": "triplet"}), store=store)


def test_a_loss_that_compares_no_rows_takes_rows_of_one_answer(make: Make, store: AdapterStore, root: Path, beir: str) -> None:
    same = [{"query": f"q{i}", "document": "the one answer", "negative": f"another {i}"} for i in range(8)]
    data = {"train": write_rows(root / "triplets.jsonl", same), "eval": beir}
    trained(make(data=data, loss={"name": "triplet"}, train={"batch": 4, "epochs": 1}), store)


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"train": {"batch": 1}}, RecipeError, r"train\.batch is 1; expected 2 or more"),
        ({"adapter": {"targets": ["pooler.dense"]}}, MethodUnsupported, "on the pooler alone"),
        ({"adapter": {"method": "eva", "r": 60}, "train": {"batch": 2}}, MethodUnsupported, "tokens in a batch"),
        ({"adapter": {"method": "pissa", "r": 65}}, MethodUnsupported, "lower it"),
        ({"adapter": {"method": "olora", "r": 65}}, MethodUnsupported, "lower it"),
        ({"data": {"weight": 0.001}}, DataError, "show 0 of"),
    ],
)
def test_what_cannot_teach_is_refused_by_name(
    make: Make, store: AdapterStore, sections: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        trained(make(**sections), store)
    assert not store.names()


def test_half_a_character_is_told_with_its_row(make: Make, store: AdapterStore, root: Path) -> None:
    path = root / "half.jsonl"
    path.write_text('{"query": "a \\ud83d", "document": "b"}\n{"query": "c", "document": "d"}\n')
    with pytest.raises(DataError, match=r"half\.jsonl:1: holds half a character"):
        trained(make(data={"train": str(path)}), store)


def test_frozen_states_that_the_disk_refuses_are_an_error_and_no_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedft.embedding.fast import _file  # pyright: ignore[reportPrivateUsage]

    kept = _file(tmp_path / "run" / "below.bin", 1000, torch.float32)
    assert (kept.shape, (tmp_path / "run" / "below.bin").stat().st_blocks * 512 >= 4000) == ((1000,), True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UsageError, match="its disk refuses them"):
        _file(tmp_path / "run" / "below.bin", 1000, torch.float32)
    assert not (tmp_path / "run" / "below.bin").exists()


@pytest.mark.parametrize("adapter", [PADDED, {}])
def test_a_max_length_without_room_for_a_text_is_refused_before_anything_is_trained(
    make: Make, store: AdapterStore, adapter: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"max_length of 1 leaves nothing of a text .*\(train\.max_length"):
        train(make("mean", adapter=adapter, train={"max_length": 1}), store=store)
    assert not (store.root / ".training").exists()


def test_an_optimizer_beside_a_methods_own_is_refused_before_anything_is_read(make: Make, store: AdapterStore) -> None:
    with pytest.raises(MethodUnsupported, match=r"leave train\.optimizer out"):
        train(make("mean", adapter={"method": "lora_fa"}, train={"optimizer": "paged_adamw"}, data={"train": "nowhere.jsonl"}), store=store)
    assert not (store.root / ".training").exists()


def test_a_base_whose_tokenizer_files_disagree_is_refused(make: Make, root: Path, store: AdapterStore) -> None:
    folder = tiny_encoder(root / "odd", pooling="mean")
    disagree(folder)
    with pytest.raises(BaseError, match="disagree"):
        train(make(str(folder)), store=store)
