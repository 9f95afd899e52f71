"""Training end to end on tiny bases: what is learnt, and what is published."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedft.adapters.passport import read_passport
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder, load_base, load_model
from embedft.cli import main
from embedft.embedding.proof import evaluate_adapter
from embedft.embedding.train import train
from embedft.encode import Encoder, EncodeSettings
from embedft.errors import BaseError, RecipeError
from embedft.methods import load_adapter
from embedft.training.measure import DryRunReport
from tests.embedft.embedding.runs import GAP, PADDED, Make, gain, trained
from tests.fixtures_embedding import planted_rows, write_beir, write_rows


@pytest.mark.parametrize("base", ["mean", "cls", "lasttoken"])
def test_every_kind_of_base_learns_and_plain_sentence_transformers_gives_the_same_vectors(
    base: str, make: Make, bases: dict[str, str], store: AdapterStore, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    result = trained(make(base, data={"prompts": {"query": "find : "}}), store)
    assert gain(result) > GAP
    low, high = result.metrics["gain_ci95"]  # type: ignore[misc]
    assert 0 < low <= gain(result) <= high
    passport = read_passport(Path(result.path))
    settings = EncodeSettings(base, base != "cls", 16, {"query": "find : ", "document": ""})  # type: ignore[arg-type]
    assert (passport.pooling, passport.normalize, passport.max_length, dict(passport.prompts)) == (
        base,
        base != "cls",
        16,
        dict(settings.prompts),
    )
    folder = Path(bases[base])
    ours = Encoder(load_adapter(load_model(folder, task="embedding"), Path(result.path)), folder, settings)
    moved = Path(shutil.copytree(result.path, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folder.name, "no machine's path is published"
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    plain = SentenceTransformer(str(moved), device="cpu")
    texts = [row["query"] for row in planted_rows(6)]
    theirs = plain.encode(texts, prompt="find : ")
    assert np.abs(ours.encode(texts, input_type="query") - theirs).max() < 1e-4


def test_shuffled_pairs_teach_nothing(make: Make, root: Path, beir: str, store: AdapterStore) -> None:
    shuffled = write_rows(root / "shuffled.jsonl", planted_rows(192, shuffled=True))
    assert gain(trained(make(data={"train": shuffled, "eval": beir}), store)) < GAP / 2


def test_minilm_in_nf4_learns_the_planted_task(make: Make, root: Path, store: AdapterStore) -> None:
    small = write_beir(root / "small", train=128, test=32)
    result = trained(make("minilm", quantization="nf4", data={"train": small}, train={"epochs": 1, "lr": 2e-3}), store)
    assert gain(result) > GAP
    passport = read_passport(Path(result.path))
    assert passport.base.quantization == "nf4"
    assert passport.base.fingerprint == load_base(BaseSpec("minilm", "nf4"), task="embedding").info.fingerprint


def test_a_tiny_nf4_base_evaluates_and_then_trains_on(make: Make, store: AdapterStore) -> None:
    """An evaluation must leave 4-bit weights in the form that the next training step needs."""
    recipe = make("mean", quantization="nf4")
    base = load_base(BaseSpec(recipe.base.model, "nf4"), task="embedding")
    Encoder(base.model, base.folder, EncodeSettings("mean", True, 16)).encode(["one"])
    assert gain(trained(recipe, store)) > GAP


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_best_weights_on_the_dev_queries_are_published_and_patience_ends_the_run(
    quantization: str, make: Make, store: AdapterStore
) -> None:
    """Elsewhere, going back to the best weights overwrites an int8 base and fails silently on an NF4 one."""
    from embedft.embedding.data import load_data, split_dev
    from embedft.embedding.evaluate import evaluate_retrieval
    from embedft.verify import settings_of

    recipe = make(quantization=quantization, train={"epochs": 12, "lr": 3e-2, "evaluate_every": 5, "patience": 2})
    result = trained(recipe, store)
    best: Any = result.metrics["best"]
    scores = dict(best["history"])
    assert best["score"] == scores[best["step"]] == max(scores.values())
    assert list(scores)[-1] == best["step"] + 10 < 12 * 11, "two evaluations without a better one end it"
    examples, dev = split_dev(*load_data(recipe.data, recipe.eval, scored=False), None)
    assert not set(dev.queries.values()) & {row.query for row in examples.rows}
    folder = base_folder(BaseSpec(recipe.base.model, quantization))
    model = load_adapter(load_model(folder, task="embedding"), Path(result.path))
    encoder = Encoder(model, folder, settings_of(read_passport(Path(result.path))))
    assert evaluate_retrieval(encoder, dev).metrics["ndcg@10"] == pytest.approx(best["score"])


def test_the_documents_of_a_query_only_adapter_are_encoded_once_for_all_dev_evaluations_and_the_cap_holds(
    make: Make, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedft.embedding import train as module

    given, evaluate = list[tuple[Any, Any]](), module.evaluate_retrieval
    record: Any = lambda encoder, data, **how: given.append((data, how["documents"])) or evaluate(encoder, data, **how)  # noqa: E731
    monkeypatch.setattr(module, "evaluate_retrieval", record)
    recipe = make(adapter={"side": "query"}, train={"max_steps": 6, "evaluate_every": 2}, eval={"queries": 10, "documents": 12})
    trained(recipe, store)
    assert len(given) == 3
    assert all(len(data.queries) == 10 and len(data.documents) == 12 for data, _ in given)
    assert all(vectors is given[0][1] is not None for _, vectors in given)


def test_trackers_get_the_loss_and_one_that_is_not_installed_is_named(
    make: Make, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(make(train={"epochs": 1, "trackers": ["tensorboard"]}), store)
    events = reader.EventAccumulator(str(store.root / "runs" / "tiny")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) >= 2
    assert all(loss > 0 for loss in losses)
    monkeypatch.setattr("embedft.training.trackers.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="mlflow is not installed: pip install mlflow"):
        trained(make(train={"trackers": ["mlflow"]}), store)


def test_a_query_only_adapter_leaves_documents_to_the_base(make: Make, bases: dict[str, str], store: AdapterStore) -> None:
    recipe = make(adapter={"side": "query"})
    result = trained(recipe, store)
    assert gain(result) > GAP
    assert read_passport(Path(result.path)).side == "query"
    again = evaluate_adapter(Path(result.path), recipe.data.train, store, base=bases["mean"])
    assert again["adapter"]["ndcg@10"] == pytest.approx(result.metrics["adapter"]["ndcg@10"])  # type: ignore[index]


def test_the_passport_says_what_it_was_trained_on_and_how(make: Make, bases: dict[str, str], store: AdapterStore, root: Path) -> None:
    from embedft.embedding.data import data_hash, load_data
    from embedft.model_folder import describe

    hashes = set[str | None]()
    for part in (None, 0, 16):
        asked = [row | {"query": f"{row['query']} asked {part}"} for row in planted_rows(8)]  # which no training row asks
        dev = {} if part is None else {"dev": write_rows(root / "own-dev.jsonl", asked)}
        settings = {"max_steps": 2} | ({"evaluate_every": 2} if dev else {})
        recipe = make(data=dev, train=settings, adapter={"side": "query"}, loss={"dimensions": [16, 32, 16]})
        passport = store.passport(trained(recipe, store).generation)
        hashes.add(passport.data_hash)
    assert len(hashes) == 3, "who chose the best step is part of the data"
    data = load_data(recipe.data, recipe.eval, scored=False)
    assert data_hash(*data) in hashes
    assert (passport.dimensions, passport.side, passport.recipe_hash) == ((64, 32, 16), "query", recipe.digest())
    assert passport.base.fingerprint == describe(Path(bases["mean"])).fingerprint


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before_and_another_seed_another(make: Make, tmp_path: Path) -> None:
    made: list[str] = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)
        made.append(trained(make(train={"max_steps": 2, "seed": seed}), AdapterStore(tmp_path / str(number))).generation)
    assert made[0] == made[1] != made[2]


def test_a_published_adapter_scores_the_same_when_evaluated_again(make: Make, bases: dict[str, str], store: AdapterStore) -> None:
    recipe = make(train={"epochs": 1})
    result = trained(recipe, store)
    again = evaluate_adapter("tiny", recipe.data.train, store, base=bases["mean"])
    for row in ("base", "bm25", "adapter", "gain_ci95"):
        assert again[row] == pytest.approx(result.metrics[row])
    with pytest.raises(BaseError):
        evaluate_adapter("tiny", recipe.data.train, store, base=bases["cls"])


@pytest.mark.parametrize("dev", [{}, {"evaluate_every": 2}], ids=["trained to its end", "best step"])
def test_of_the_file_that_it_was_trained_on_an_adapter_is_asked_what_was_kept_back(
    make: Make, root: Path, bases: dict[str, str], store: AdapterStore, capsys: pytest.CaptureFixture[str], dev: dict[str, int]
) -> None:
    """Asked the rows that it learnt, it would seem better than it is."""
    rows = planted_rows(96)
    file = write_rows(root / "one-file.jsonl", rows)
    result = trained(make(data={"train": file}, train={"max_steps": 4} | dev), store)
    again = evaluate_adapter("tiny", file, store, base=bases["mean"])
    assert again["queries"] == result.metrics["queries"] < 20
    assert again["adapter"] == pytest.approx(result.metrics["adapter"])
    assert f"only the {again['queries']} queries that were kept back are asked" in capsys.readouterr().err
    other = write_rows(root / "another-file.jsonl", rows[1:])
    assert evaluate_adapter("tiny", other, store, base=bases["mean"])["queries"] == 95
    assert "trained on" not in capsys.readouterr().err
    apart = write_rows(root / "judged.jsonl", planted_rows(10))
    trained(make(data={"train": file, "eval": apart}, train={"max_steps": 4} | dev), store)
    assert evaluate_adapter("tiny", file, store, base=bases["mean"])["queries"] == 96
    assert "it was trained on one-file.jsonl: this shows what it learnt" in capsys.readouterr().err


def test_the_evaluations_after_the_last_step_say_how_far_they_are(make: Make, root: Path, store: AdapterStore) -> None:
    rows = [{"query": f"why {i}?", "document": f"because of {i}"} for i in range(30)]
    guard = {"data": write_rows(root / "general.jsonl", rows), "drop": 9.0}
    told: list[tuple[int, int]] = []
    trained(make("mean", eval={"guard": guard}), store, encoded=lambda done, total: told.append((done, total)))
    assert [done for done, total in told if done == total] == sorted({total for _, total in told}, reverse=True)
    assert len({total for _, total in told}) == 2  # the evaluation's texts and the general set's


def test_who_trains_beside_a_server_is_told_how_it_gets_the_new_adapter(
    make: Make, store: AdapterStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(make("mean").resolved_yaml())
    command = ["train-embed", str(tmp_path / "tiny.yaml"), "--adapters", str(store.root)]
    assert main(command) == 0
    said, progress = capsys.readouterr()
    assert "serve it with: embedft serve" in said
    assert "embedding " in progress  # the evaluation's texts
    server = store.use()
    assert server is not None
    assert main(command) == 0
    assert "a server uses this store, and goes on with what it has until PUT /v1/adapters/tiny" in capsys.readouterr().out
    os.close(server)


def test_scores_of_every_query_are_kept_and_texts_only_when_asked(make: Make, store: AdapterStore) -> None:
    made = [make(name=f"t{int(texts)}", train={"max_steps": 2, "seed": 7 + texts}, eval={"keep_texts": texts}) for texts in (False, True)]
    folders = [Path(trained(recipe, store).path) / "eval" for recipe in made]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        assert len(rows) == 48
        assert set(rows[0]) == {"id", "base", "bm25", "adapter", "fused", "ranked"}
    assert not (folders[0] / "texts.jsonl").exists()
    assert set(json.loads((folders[1] / "texts.jsonl").read_text().splitlines()[0])) == {"id", "query"}


def test_a_dry_run_takes_real_steps_and_leaves_nothing(make: Make, store: AdapterStore) -> None:
    report = train(make(), store=store, dry_run=True, progress=False)
    assert isinstance(report, DryRunReport)
    assert report.steps == 36
    assert report.examples == 192
    assert report.trainable > 0
    assert report.seconds_per_step > 0
    assert not store.root.exists() or not any(path.is_file() for path in store.root.rglob("*"))


def test_training_ids_carry_the_prompts_of_inference(make: Make, bases: dict[str, str], tmp_path: Path) -> None:
    from embedft.embedding.batches import BatchPlan
    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, settings_for
    from embedft.methods import attach

    recipe = make(data={"prompts": {"query": "find : ", "document": ": "}}, adapter=PADDED)
    examples, _ = load_data(recipe.data, recipe.eval, scored=False)
    base = load_base(BaseSpec(bases["mean"]), task="embedding")
    settings = settings_for(recipe, base)
    plan = BatchPlan(examples, batch=4, seed=7)
    trainer = make_trainer(attach(base, recipe.adapter, task="embedding"), base, settings, examples, recipe, plan=plan, output=tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    preparer = Encoder(base.model, base.folder, settings).preparer
    rows = [examples.rows[i] for i in next(iter(plan))]
    assert batch["query_input_ids"].tolist() == preparer.prepare([row.query for row in rows], "query").ids
    assert batch["document_input_ids"].tolist() == preparer.prepare([row.document for row in rows], "document").ids
    assert batch["query_input_ids"][0].tolist() != preparer.prepare([rows[0].query]).ids[0]
    recipe = make(data={"prompts": {"query": "find : ", "document": ": "}})
    base = load_base(BaseSpec(bases["mean"]), task="embedding")
    trainer = make_trainer(attach(base, recipe.adapter, task="embedding"), base, settings, examples, recipe, plan=plan, output=tmp_path)
    texts, row = trainer.model.texts, next(iter(plan))[0]
    assert texts.ids[texts.columns["query"][row]] == tuple(preparer.prepare([examples.rows[row].query], "query").ids[0])
    assert texts.ids[texts.columns["document"][row]] == tuple(preparer.prepare([examples.rows[row].document], "document").ids[0])


def test_frozen_layers_have_no_dropout_while_the_adapter_trains_and_nothing_has_while_it_is_evaluated(
    make: Make, bases: dict[str, str]
) -> None:
    from torch import nn

    from embedft.embedding.tower import sentence_transformer
    from embedft.methods import attach

    recipe = make(adapter={"dropout": 0.3})
    base = load_base(BaseSpec(bases["mean"]), task="embedding")
    model = sentence_transformer(
        attach(base, recipe.adapter, task="embedding"), base.folder, EncodeSettings("mean", True, 16), hidden_size=64, side="both"
    )
    model.train()
    active = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training}
    assert active
    assert all("lora_dropout" in name for name in active)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    inner, texts = model[0].model, [row["query"] for row in planted_rows(4)]
    encoder = Encoder(inner, base.folder, EncodeSettings("mean", True, 16))
    between = encoder.encode(texts)
    assert active == {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training}
    inner.eval()
    assert np.array_equal(between, encoder.encode(texts)), "an evaluation between two steps drops nothing"


def test_a_base_is_quantized_once_and_then_found_in_the_cache(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import embedft.base as module

    monkeypatch.setenv("EMBEDFT_CACHE", str(tmp_path))
    made, quantize = list[Path](), module.quantize
    monkeypatch.setattr(module, "quantize", lambda source, out, **how: made.append(out) or quantize(source, out, **how))
    folders = {base_folder(BaseSpec(bases["mean"], "nf4")) for _ in range(2)} | {
        load_base(BaseSpec(bases["mean"], "nf4"), task="embedding").folder
    }
    assert folders == {*made}
    assert len(made) == 1
