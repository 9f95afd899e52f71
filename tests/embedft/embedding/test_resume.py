"""Stopped and killed runs go on to bitwise the same adapter, or say why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterInvalid, ResumeRefused, TrainingInterrupted
from embedft.recipe import EmbeddingRecipe
from embedft.recipe_file import load_recipe
from tests.embedft.embedding.runs import PACKED, PADDED, PART, Make, trained, weights
from tests.fixtures_embedding import tiny_encoder, write_rows

RESUMED: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    *((q, adapter, stop, {}) for q in ("none", "nf4") for adapter, stop in ((PADDED, 5), (PACKED, 5), (PART, 17), ({"side": "query"}, 14))),
    ("int8", {}, 5, {}),
    ("nf4", {}, 9, {"evaluate_every": 4}),
]
LOW = [("none", PADDED), ("none", PACKED), ("nf4", PACKED), ("int8", {})]
DTYPES = [
    *(pytest.param(*each, "float32") for each in RESUMED),
    *(pytest.param(quantization, adapter, 5, {}, "bfloat16", marks=pytest.mark.bf16) for quantization, adapter in LOW),
]


@pytest.mark.parametrize(("quantization", "adapter", "stop", "section", "dtype"), DTYPES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    quantization: str,
    adapter: dict[str, Any],
    stop: int,
    section: dict[str, Any],
    dtype: str,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from embedft.training.interrupt import InterruptGuard

    monkeypatch.setenv("EMBEDFT_DTYPE", dtype)
    recipe = make("mean", quantization=quantization, adapter=adapter, train={"epochs": 2} | section)
    whole, broken = AdapterStore(tmp_path / "whole"), AdapterStore(tmp_path / "broken")
    trained(recipe, whole)
    on_step_end = InterruptGuard.on_step_end

    def stop_in_time(self: InterruptGuard, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == stop:
            self.stop()
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(InterruptGuard, "on_step_end", stop_in_time)
    with pytest.raises(TrainingInterrupted) as caught:
        trained(recipe, broken)
    monkeypatch.setattr(InterruptGuard, "on_step_end", on_step_end)
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


LATE = [
    ({"max_steps": 5}, {}),
    ({"max_steps": 5}, {"method": "adalora"}),
    ({"epochs": 12, "lr": 3e-2, "evaluate_every": 5, "patience": 2}, {}),
]


@pytest.mark.parametrize(("section", "adapter"), LATE)
def test_what_goes_wrong_after_the_last_step_costs_no_training(
    section: dict[str, Any], adapter: dict[str, Any], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedft.training.progress import ProgressETA

    recipe = make(train=section, adapter=adapter)
    whole, broken = AdapterStore(tmp_path / "whole"), AdapterStore(tmp_path / "broken")
    metrics = trained(recipe, whole).metrics
    broken.root.mkdir()
    (broken.root / "objects").touch()  # nothing can be published
    with pytest.raises(OSError, match="objects"):
        trained(recipe, broken)
    (broken.root / "objects").unlink()
    monkeypatch.setattr(ProgressETA, "on_step_end", lambda *_, **__: pytest.fail("another step was trained"))
    assert trained(recipe, broken, resume=True).metrics.get("best") == metrics.get("best")
    one, other = weights(whole), weights(broken)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert whole.current("tiny") == broken.current("tiny")


def test_a_run_begun_afresh_keeps_what_an_earlier_one_had_trained_and_says_where(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedft.training.run import open_run

    options: Any = {"root": tmp_path, "data_hash": ""}

    def begun(base: str) -> Path:
        run = open_run(make(), base_fingerprint=base, resume=False, **options)
        (run.folder / "checkpoint-3").mkdir()
        (run.folder / "checkpoint-3" / "complete").touch()
        return run.folder

    folder = begun("one")
    assert capsys.readouterr().err == ""
    begun("two")
    assert f"(checkpoint-3) is kept in {folder}~1: delete it, or move it back to {folder}" in capsys.readouterr().err
    begun("three")
    assert {json.loads((Path(f"{folder}~{number}") / "run.json").read_text())["base"] for number in (1, 2)} == {"one", "two"}
    shutil.rmtree(folder)
    Path(f"{folder}~1").rename(folder)
    assert open_run(make(), base_fingerprint="one", resume=True, **options).checkpoint == folder / "checkpoint-3"


def test_a_run_that_never_reached_a_checkpoint_leaves_nothing(make: Make, tmp_path: Path) -> None:
    from embedft.training.run import open_run

    options: Any = {"root": tmp_path, "data_hash": "", "base_fingerprint": "", "resume": False}
    (open_run(make(), **options).folder / "checkpoint-3").mkdir()
    folder = open_run(make(), **options).folder
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("adapter", [PADDED, PACKED])
def test_a_run_whose_weights_are_no_numbers_leaves_nothing_to_resume_and_says_so(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: dict[str, Any]
) -> None:
    store = AdapterStore(tmp_path)
    recipe = make(train={"max_steps": 4, "lr": 1e30}, adapter=adapter)
    with pytest.raises(AdapterInvalid, match=r"training diverged \(lower train\.lr\)"):
        trained(recipe, store)
    assert "nothing of this run is kept, for --resume would end the same" in capsys.readouterr().err
    with pytest.raises(ResumeRefused, match="no checkpoint"):
        trained(recipe, store, resume=True)


def test_a_run_goes_on_only_under_the_versions_that_it_began_with(make: Make, tmp_path: Path) -> None:
    from embedft.training.run import open_run

    options: Any = {"root": tmp_path, "data_hash": "", "base_fingerprint": ""}
    run = open_run(make(), resume=False, **options)
    (run.folder / "checkpoint-3").mkdir()
    (run.folder / "checkpoint-3" / "complete").touch()
    assert open_run(make(), resume=True, **options).checkpoint == run.folder / "checkpoint-3"
    facts = json.loads((run.folder / "run.json").read_text())
    for what in ("data_hash", "base_fingerprint"):
        with pytest.raises(ResumeRefused, match=f"the {what.partition('_')[0]} changed"):
            open_run(make(), resume=True, **options | {what: "another"})
    versions = ("embedft", "torch", "transformers", "peft", "tokenizers", "bitsandbytes", "sentence-transformers")
    for name in (*versions, "dtype", "device", "threads", "processor", "attention", "gelu"):
        changed = facts | {"machine": facts["machine"] | {name: "0.1"}}
        (run.folder / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ResumeRefused, match=f"the run's {name} was '0.1', is now"):
            open_run(make(), resume=True, **options)


def test_a_run_does_not_go_on_under_other_prompts_that_its_base_was_given_meanwhile(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedft.training.interrupt import InterruptGuard

    base = tiny_encoder(tmp_path / "base", pooling="mean")
    prompts = base / "config_sentence_transformers.json"
    before = prompts.read_text()
    recipe, store = make(str(base), train={"max_steps": 4}), AdapterStore(tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(InterruptGuard, "on_step_begin", lambda self, *_, **__: self.stop(), raising=False)
        with pytest.raises(TrainingInterrupted):
            trained(recipe, store)
    prompts.write_text(json.dumps(json.loads(before) | {"prompts": {"query": "find: ", "document": ""}}))
    with pytest.raises(ResumeRefused, match=r"the base's own prompts\.query was '', is now 'find: '"):
        trained(recipe, store, resume=True)
    with pytest.raises(ResumeRefused, match=r"data\.prompts\.query was None, is now 'find: '"):
        trained(make(str(base), train={"max_steps": 4}, data={"prompts": {"query": "find: "}}), store, resume=True)
    prompts.write_text(before)
    trained(recipe, store, resume=True)


def test_a_run_does_not_go_on_with_another_general_set(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedft.training.interrupt import InterruptGuard

    general = write_rows(tmp_path / "general.jsonl", [{"query": f"why {i}?", "document": f"because of {i}"} for i in range(30)])
    recipe, store = make(train={"max_steps": 4}, eval={"guard": {"data": general, "drop": 9.0}}), AdapterStore(tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(InterruptGuard, "on_step_begin", lambda self, *_, **__: self.stop(), raising=False)
        with pytest.raises(TrainingInterrupted):
            trained(recipe, store)
    before = Path(general).read_text()
    write_rows(Path(general), [{"query": f"where {i}?", "document": f"here, at {i}"} for i in range(30)])
    with pytest.raises(ResumeRefused, match="the data changed"):
        trained(recipe, store, resume=True)
    Path(general).write_text(before)
    assert trained(recipe, store, resume=True).metrics["guard"]["queries"] == 30


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from embedft.adapters.store import AdapterStore
from embedft.embedding.train import train
from embedft.recipe_file import load_recipe
from embedft.training.progress import ProgressETA

def killed(self, args, state, control, **rest):
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressETA.on_step_end = killed
for folder in map(Path, sys.argv[1:]):
    if os.fork() == 0:
        train(load_recipe(folder / "tiny.yaml"), store=AdapterStore(folder / "broken"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""  # one interpreter for all runs: to import what trains takes longer than to train


@pytest.fixture(scope="module")
def killed(make: Make, beir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By quantization: a folder with the recipe, the data and, in `broken`, what a run left that was killed in its seventh step."""
    folders: dict[str, Path] = {}
    for quantization in ("none", "int8"):
        folders[quantization] = folder = tmp_path_factory.mktemp(quantization)
        given = make("mean", quantization=quantization, train={"epochs": 1, "checkpoint_every": 3}).model_dump(mode="json")
        given["data"]["train"] = str(shutil.copytree(beir, folder / "data"))
        (folder / "tiny.yaml").write_text(json.dumps(given))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    argv = [sys.executable, "-c", KILLED, *map(str, folders.values())]
    child = subprocess.run(argv, env=environment, capture_output=True, timeout=200, check=False)
    assert child.returncode == 0, child.stderr.decode()[-2000:]
    return folders


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_killed_run_goes_on_to_the_same_adapter_and_only_under_the_same_recipe_data_and_threads(
    quantization: str, killed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder = killed[quantization]
    copied, recipe = folder / "data", load_recipe(folder / "tiny.yaml")
    assert isinstance(recipe, EmbeddingRecipe)
    whole, broken = AdapterStore(folder / "whole"), AdapterStore(folder / "broken")
    trained(recipe, whole)
    torch.set_num_threads(2)
    with pytest.raises(ResumeRefused, match="the run's threads was 1, is now 2"):
        trained(recipe, broken, resume=True)
    torch.set_num_threads(1)
    monkeypatch.setenv("EMBEDFT_NATIVE", "0")
    with pytest.raises(ResumeRefused, match=r"the run's attention was '[0-9a-f]{16}', is now 'torch'"):
        trained(recipe, broken, resume=True)
    monkeypatch.delenv("EMBEDFT_NATIVE")
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
