"""Training end to end on tiny bases: what is learnt, what is published, and exact resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.adapters.passport import read_passport
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder, load_base, load_model
from embedft.embedding.losses import LOSSES
from embedft.embedding.proof import evaluate_adapter
from embedft.embedding.train import train
from embedft.encode import Encoder, EncodeSettings
from embedft.errors import BaseError, DataError, MethodUnsupported, RecipeError, ResumeRefused, TrainingInterrupted
from embedft.methods import load_adapter
from embedft.recipe import EmbeddingRecipe, load_recipe, parse_recipe
from embedft.training.measure import AdapterResult, DryRunReport
from tests.fixtures_embedding import another, planted_rows, tiny_decoder, tiny_encoder, write_beir, write_rows

GAP = 0.15  # nDCG@10 that a trained tiny base gains at least; shuffled pairs must stay below it

Make = Callable[..., EmbeddingRecipe]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def bases(root: Path) -> dict[str, str]:
    return {
        "mean": str(tiny_encoder(root / "mean", pooling="mean")),
        "cls": str(tiny_encoder(root / "cls", pooling="cls", normalize=False)),
        "lasttoken": str(tiny_decoder(root / "decoder")),
    }


@pytest.fixture(scope="module")
def beir(root: Path) -> str:
    return write_beir(root / "beir", train=192, test=48)


@pytest.fixture(scope="module")
def make(bases: dict[str, str], beir: str) -> Make:
    def recipe(base: str = "mean", *, name: str = "tiny", data: dict[str, Any] | None = None, **sections: Any) -> EmbeddingRecipe:
        content: dict[str, Any] = {
            "task": "embedding",
            "name": name,
            "base": {"model": bases.get(base, base), "quantization": sections.pop("quantization", "none")},
            "data": {"train": beir} | (data or {}),
            "train": {"batch": 16, "lr": 5e-3, "epochs": 3, "max_length": 16} | sections.pop("train", {}),
            "eval": {"guard": None} | sections.pop("eval", {}),
        }
        made = parse_recipe(content | sections)
        assert isinstance(made, EmbeddingRecipe)
        return made

    return recipe


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def trained(recipe: EmbeddingRecipe, store: AdapterStore, **options: Any) -> AdapterResult:
    result = train(recipe, store=store, progress=False, **options)
    assert isinstance(result, AdapterResult)
    return result


def gain(result: AdapterResult) -> float:
    metrics: Any = result.metrics
    return metrics["adapter"]["ndcg@10"] - metrics["base"]["ndcg@10"]


def weights(store: AdapterStore, name: str = "tiny") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(store.folder(name) / "adapter_model.safetensors")


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
    """FACTS: an evaluation must leave 4-bit weights in the form that the next training step needs."""
    recipe = make("mean", quantization="nf4")
    base = load_base(BaseSpec(recipe.base.model, "nf4"), task="embedding")
    Encoder(base.model, base.folder, EncodeSettings("mean", True, 16)).encode(["one"])
    assert gain(trained(recipe, store)) > GAP


PADDED, PACKED, PART = {"dropout": 0.1}, {}, {"layers": 1}  # dropout keeps a model from running packed


RESUMED = [
    *((q, adapter, stop, {}) for q in ("none", "nf4") for adapter, stop in ((PADDED, 5), (PACKED, 5), (PART, 17), ({"side": "query"}, 14))),
    ("int8", {}, 5, {}),
    ("nf4", {}, 9, {"evaluate_every": 4}),
]


@pytest.mark.parametrize(("quantization", "adapter", "stop", "section"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    quantization: str,
    adapter: dict[str, Any],
    stop: int,
    section: dict[str, Any],
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from embedft.training.interrupt import InterruptGuard

    recipe = make("mean", quantization=quantization, adapter=adapter, train={"epochs": 2} | section)
    whole, broken = AdapterStore(tmp_path / "whole"), AdapterStore(tmp_path / "broken")
    trained(recipe, whole)
    on_step_end = InterruptGuard.on_step_end

    def stop_at_five(self: InterruptGuard, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == stop:
            self.stop()
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(InterruptGuard, "on_step_end", stop_at_five)
    with pytest.raises(TrainingInterrupted) as caught:
        trained(recipe, broken)
    monkeypatch.undo()
    assert "--resume" in caught.value.command
    saved = sorted(path.name for path in Path(caught.value.checkpoint).iterdir())
    assert "trainable.safetensors" in saved
    assert not any("model.safetensors" in name for name in saved), "the base is never written"
    trained(recipe, broken, resume=True)
    one, other = weights(whole), weights(broken)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert whole.current("tiny") == broken.current("tiny")
    with pytest.raises(ResumeRefused):
        trained(recipe, broken, resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from embedft.adapters.store import AdapterStore
from embedft.embedding.train import train
from embedft.recipe import load_recipe
from embedft.training.progress import ProgressETA

def killed(self, args, state, control, **rest):
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressETA.on_step_end = killed
train(load_recipe(sys.argv[1]), store=AdapterStore(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_killed_run_goes_on_to_the_same_adapter_and_only_under_the_same_recipe_data_and_threads(
    quantization: str, make: Make, beir: str, tmp_path: Path
) -> None:
    import torch

    given = make("mean", quantization=quantization, train={"epochs": 1, "checkpoint_every": 3}).model_dump(mode="json")
    copied = shutil.copytree(beir, tmp_path / "data")
    given["data"]["train"] = str(copied)
    (tmp_path / "tiny.yaml").write_text(json.dumps(given))
    recipe = load_recipe(tmp_path / "tiny.yaml")
    assert isinstance(recipe, EmbeddingRecipe)
    whole, broken = AdapterStore(tmp_path / "whole"), AdapterStore(tmp_path / "broken")
    trained(recipe, whole)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "tiny.yaml"), str(broken.root)]
    child = subprocess.run(argv, env=environment, capture_output=True, timeout=100, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    torch.set_num_threads(2)
    with pytest.raises(ResumeRefused, match="the run's threads was 1, is now 2"):
        trained(recipe, broken, resume=True)
    torch.set_num_threads(1)
    with pytest.raises(ResumeRefused, match=r"train\.lr was 0\.005, is now 0\.01"):
        trained(recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 0.01})}), broken, resume=True)
    rows = (copied / "queries.jsonl").read_text()
    (copied / "queries.jsonl").write_text(rows.replace('"text": "', '"text": "find ', 1))
    with pytest.raises(ResumeRefused, match="the data changed"):
        trained(recipe, broken, resume=True)
    (copied / "queries.jsonl").write_text(rows)
    trained(recipe, broken, resume=True)
    one, other = weights(whole), weights(broken)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_best_weights_on_the_dev_queries_are_published_and_patience_ends_the_run(
    quantization: str, make: Make, store: AdapterStore
) -> None:
    """FACTS: elsewhere, going back to the best weights overwrites an int8 base and fails silently on an NF4 one."""
    from embedft.embedding.data import load_data, split_dev
    from embedft.embedding.evaluate import evaluate_retrieval
    from embedft.verify import settings_of

    recipe = make(quantization=quantization, train={"epochs": 12, "lr": 3e-2, "evaluate_every": 5, "patience": 2})
    result = trained(recipe, store)
    best: Any = result.metrics["best"]
    scores = dict(best["history"])
    assert best["score"] == scores[best["step"]] == max(scores.values())
    assert list(scores)[-1] == best["step"] + 10 < 12 * 11, "two evaluations without a better one end it"
    examples, dev = split_dev(load_data(recipe.data, recipe.eval, scored=False)[0], None)
    assert not set(dev.queries.values()) & {row.query for row in examples.rows}
    folder = base_folder(BaseSpec(recipe.base.model, quantization))
    model = load_adapter(load_model(folder, task="embedding"), Path(result.path))
    encoder = Encoder(model, folder, settings_of(read_passport(Path(result.path))))
    assert evaluate_retrieval(encoder, dev).metrics["ndcg@10"] == pytest.approx(best["score"])


def test_trackers_get_the_loss_and_one_that_is_not_installed_is_named(
    make: Make, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(make(train={"epochs": 1, "trackers": ["tensorboard"]}), store)
    events = reader.EventAccumulator(str(store.root / "runs" / "tiny")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) >= 2
    assert all(loss > 0 for loss in losses)
    monkeypatch.setattr("embedft.training.arguments.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="mlflow is not installed: pip install mlflow"):
        trained(make(train={"trackers": ["mlflow"]}), store)


@pytest.mark.parametrize(
    ("name", "adapter", "dimensions"),
    [(name, PACKED, ()) for name in LOSSES]
    + [(name, PADDED, ()) for name in ("cached_mnrl", "gist", "kl")]
    + [("mnrl", PACKED, (16, 32)), ("cached_mnrl", PADDED, (32,)), ("kl", PACKED, (16,))],
)
def test_each_loss_falls_while_it_trains(
    name: str, adapter: dict[str, Any], dimensions: tuple[int, ...], make: Make, beir: str, root: Path, tmp_path: Path
) -> None:
    from embedft.embedding.batches import BatchPlan
    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, settings_for
    from embedft.methods import attach

    scored, taught, rows = LOSSES[name].takes == "scored", LOSSES[name].takes == "distilled", planted_rows(96)
    triplets: list[dict[str, Any]] = [
        row | {"negative": rows[another(i)]["document"]} | ({"scores": [9.0, -3.0]} if taught else {}) for i, row in enumerate(rows)
    ]
    pairs: list[dict[str, Any]] = [
        {"query": r["query"], "document": r[key], "score": float(key == "document")} for r in triplets for key in ("document", "negative")
    ]
    recipe = make(
        data={"train": write_rows(root / f"{name}.jsonl", pairs if scored else triplets), "eval": beir},
        loss={"name": name, "dimensions": dimensions},
        adapter=adapter,
        train={"lr": 1e-2},
    )
    examples, _ = load_data(recipe.data, recipe.eval, scored=scored, taught=taught)
    assert (examples.rows[0].score is not None) == scored
    base = load_base(BaseSpec(recipe.base.model), task="embedding")
    plan = BatchPlan(examples, batch=16, seed=7, exclusive=not scored)
    model = attach(base, recipe.adapter, task="embedding")
    trainer = make_trainer(model, base, settings_for(recipe, base), examples, recipe, plan=plan, output=tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) >= 3
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_of_the_cached_loss_are_those_of_the_plain_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, plan_for, settings_for
    from embedft.methods import attach

    monkeypatch.setattr("embedft.embedding.losses.MINI_BATCH", 3)
    found: list[dict[str, torch.Tensor]] = []
    for name in ("mnrl", "cached_mnrl"):
        recipe = make(loss={"name": name})
        examples, _ = load_data(recipe.data, recipe.eval, scored=False)
        base = load_base(BaseSpec(recipe.base.model), task="embedding")
        torch.manual_seed(1)
        model = attach(base, recipe.adapter, task="embedding")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        plan = plan_for(examples, recipe, loss=LOSSES[name], model=model)
        trainer = make_trainer(model, base, settings_for(recipe, base), examples, recipe, plan=plan, output=tmp_path)
        trainer.compute_loss(trainer.model, {"rows": torch.arange(16)}).backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert gradient.norm() > 0
        assert (gradient - found[1][key]).norm() <= 1e-6 * gradient.norm(), key


def test_a_query_only_adapter_leaves_documents_to_the_base(make: Make, bases: dict[str, str], store: AdapterStore) -> None:
    recipe = make(adapter={"side": "query"})
    result = trained(recipe, store)
    assert gain(result) > GAP
    assert read_passport(Path(result.path)).side == "query"
    again = evaluate_adapter(Path(result.path), recipe.data.train, store, base=bases["mean"])
    assert again["adapter"]["ndcg@10"] == pytest.approx(result.metrics["adapter"]["ndcg@10"])  # type: ignore[index]


def test_a_published_adapter_scores_the_same_when_evaluated_again(make: Make, bases: dict[str, str], store: AdapterStore) -> None:
    recipe = make(train={"epochs": 1})
    result = trained(recipe, store)
    again = evaluate_adapter("tiny", recipe.data.train, store, base=bases["mean"])
    for row in ("base", "bm25", "adapter", "gain_ci95"):
        assert again[row] == pytest.approx(result.metrics[row])
    with pytest.raises(BaseError):
        evaluate_adapter("tiny", recipe.data.train, store, base=bases["cls"])


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


def test_frozen_layers_have_no_dropout_while_the_adapter_trains(make: Make, bases: dict[str, str]) -> None:
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


def test_a_base_whose_tokenizer_files_disagree_is_refused(make: Make, root: Path, store: AdapterStore) -> None:
    folder = tiny_encoder(root / "odd", pooling="mean")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    content = (folder / "tokenizer.json").read_text()
    try:
        (folder / "tokenizer.json").write_text(content.replace('"unk_token": "[UNK]"', '"unk_token": "[PAD]"'))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        import embedft.embedding.train as module

        base = load_base(BaseSpec(str(folder)), task="embedding")
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(BaseError, match="disagree"):
            module._check_tokenizer(base, EncodeSettings("mean", True, 16))  # pyright: ignore[reportPrivateUsage]
    finally:
        (folder / "tokenizer.json").write_text(content)


def test_quantized_bases_are_one_folder_in_the_cache() -> None:
    assert os.path.realpath(base_folder(BaseSpec("minilm", "nf4"))) == os.path.realpath(
        load_base(BaseSpec("minilm", "nf4"), task="embedding").folder
    )
