import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from embedft.adapters.store import AdapterStore
from embedft.causal_lm import batches
from embedft.causal_lm.train import train
from embedft.errors import AdapterInvalid, ResumeRefused, TrainingInterrupted, UsageError
from embedft.files import hold
from embedft.training import interrupt
from embedft.training.measure import AdapterResult
from embedft.training.progress import ProgressETA
from embedft.training.run import COMPLETE, Run, last_checkpoint, open_run
from tests.fixtures_lm import planted_recipe, planted_rows, tiny_llama, write_jsonl

STEPS = {"epochs": 2, "batch": 24, "checkpoint_every": 4}  # 10 steps an epoch
KILLED = """
import os, signal, sys
from pathlib import Path
from embedft.adapters.store import AdapterStore
from embedft.causal_lm.train import train
from embedft.training.progress import ProgressETA
from tests.fixtures_lm import planted_recipe

def die(self, args, state, control, **_):
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressETA.on_step_end = die
folder, base = Path(sys.argv[1]), Path(sys.argv[2])
recipe = planted_recipe(folder, base, quantization="nf4", train={"epochs": 2, "batch": 24, "checkpoint_every": 4}, test_rows=0)
train(recipe, store=AdapterStore(folder / "store"))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


def test_a_name_that_another_process_trains_is_refused_until_it_has_ended(base: Path, tmp_path: Path) -> None:
    recipe, root = recipe_in(tmp_path, base), tmp_path / "store"
    folder = root / ".training" / recipe.name
    folder.mkdir(parents=True)
    holding = "import sys, pathlib, embedft.files as f; assert f.hold(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", holding, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "1\n"
    for resume in (False, True):
        with pytest.raises(UsageError, match="is being trained by another process"):
            open_run(recipe, root=root, data_hash="d", base_fingerprint="b", resume=resume)
    other.communicate("")
    for _ in range(2):  # this process itself may begin again, as in a notebook
        run = open_run(recipe, root=root, data_hash="d", base_fingerprint="b", resume=False)
    assert hold(run.folder) is None
    (run.folder / "run.json").write_text("")
    (run.folder / "checkpoint-3").mkdir()
    (run.folder / "checkpoint-3" / "complete").touch()
    with pytest.raises(ResumeRefused, match=r"run\.json cannot be read"):
        open_run(recipe, root=root, data_hash="d", base_fingerprint="b", resume=True)


def test_a_run_that_was_set_aside_by_an_accidental_start_is_named_when_there_is_nothing_to_resume(base: Path, tmp_path: Path) -> None:
    recipe, root = recipe_in(tmp_path, base), tmp_path / "store"
    kept = root / ".training" / f"{recipe.name}~1" / "checkpoint-11"
    kept.mkdir(parents=True)
    (kept / "complete").touch()
    with pytest.raises(ResumeRefused, match=rf"{recipe.name}~1 \(checkpoint-11\); move one to "):
        open_run(recipe, root=root, data_hash="d", base_fingerprint="b", resume=True)


def test_the_last_checkpoint_is_the_one_of_most_steps_that_is_whole(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (4, 13, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-13"


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_only_then_the_one_before_it_goes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []
    fsync, touch, rmtree = os.fsync, Path.touch, shutil.rmtree

    def noted(descriptor: int) -> None:
        done.append(("kept", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "touch", lambda path: done.append(("made", path)) or touch(path))
    monkeypatch.setattr(interrupt.shutil, "rmtree", lambda path, **how: done.append(("gone", Path(path))) or rmtree(path, **how))
    monkeypatch.setattr("embedft.causal_lm.train.publish", lambda *_, **__: None)
    monkeypatch.setattr(Run, "ending", lambda _: nullcontext())
    train(recipe_in(tmp_path, base, max_steps=8), store=AdapterStore(tmp_path / "store"), progress=False)
    first, last = (tmp_path / "store" / ".training" / "colours-nf4" / f"checkpoint-{step}" for step in (4, 8))
    assert [path.name for path in last.parent.glob("checkpoint-*")] == [last.name]
    counts = done.index(("made", last / COMPLETE))
    before = {path for step, path in done[:counts] if step == "kept"}
    assert before >= {path for path in last.iterdir() if path.name != COMPLETE}
    assert counts < done.index(("kept", last)) < done.index(("gone", first))


def test_a_second_signal_ends_at_once(base: Path, tmp_path: Path) -> None:
    with interrupt.InterruptGuard(Run(tmp_path, None, "")):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def recipe_in(folder: Path, base: Path, **settings: Any) -> Any:
    return planted_recipe(folder, base, quantization="nf4", train=STEPS | settings, test_rows=0)


def weights(result: Any) -> bytes:
    assert isinstance(result, AdapterResult)
    return (Path(result.path) / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("unbroken")
    return weights(train(recipe_in(folder, base), store=AdapterStore(folder / "store"), progress=False))


def interrupted(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, *, at: int, **settings: Any) -> TrainingInterrupted:
    def press(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == at:
            signal.raise_signal(signal.SIGINT)

    recipe, store = recipe_in(folder, base, **settings), AdapterStore(folder / "store")
    with monkeypatch.context() as patch:
        patch.setattr(ProgressETA, "on_step_end", press)
        with pytest.raises(TrainingInterrupted) as caught:
            train(recipe, store=store)
    return caught.value


def test_a_run_stopped_in_its_second_epoch_resumes_to_bitwise_the_same_adapter(
    base: Path, unbroken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    error = interrupted(tmp_path, base, monkeypatch, at=13)
    assert error.checkpoint.endswith("checkpoint-13")
    assert error.command.startswith("embedft train-lm")
    assert "--resume" in error.command
    assert signal.getsignal(signal.SIGINT) is handler
    files = {path.name for path in Path(error.checkpoint).iterdir()}
    assert interrupt.WEIGHTS in files
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    store = AdapterStore(tmp_path / "store")
    assert weights(train(recipe_in(tmp_path, base), store=store, resume=True, progress=False)) == unbroken
    assert not (store.root / ".training" / "colours-nf4").exists()


def test_a_packed_run_whose_batches_take_several_passes_resumes_to_bitwise_the_same_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(batches, "PASS", 2 * 64)
    packed = {"packing": True, "batch": 6, "accumulate": 2}
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
    unbroken = weights(train(recipe_in(whole, base, **packed), store=AdapterStore(whole / "store"), progress=False))
    assert interrupted(broken, base, monkeypatch, at=9, **packed).checkpoint.endswith("checkpoint-9")
    resumed = train(recipe_in(broken, base, **packed), store=AdapterStore(broken / "store"), resume=True, progress=False)
    assert weights(resumed) == unbroken


def test_a_killed_run_resumes_from_its_last_whole_checkpoint_to_bitwise_the_same_adapter(
    base: Path, unbroken: bytes, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path, base], env=environment, capture_output=True, timeout=200, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    run = tmp_path / "store" / ".training" / "colours-nf4"
    (run / "checkpoint-6").mkdir()  # as a kill in the middle of a save leaves it
    assert last_checkpoint(run) == run / "checkpoint-4"
    resumed = train(recipe_in(tmp_path, base), store=AdapterStore(tmp_path / "store"), resume=True, progress=False)
    assert weights(resumed) == unbroken


def test_resuming_with_another_recipe_or_other_data_is_refused_and_says_what_changed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(ResumeRefused, match="no checkpoint of 'colours-nf4'"):
        train(recipe_in(tmp_path, base), store=store, resume=True)
    interrupted(tmp_path, base, monkeypatch, at=1)
    with pytest.raises(ResumeRefused, match=r"train\.lr was 0\.01, is now 0\.02"):
        train(recipe_in(tmp_path, base, lr=0.02), store=store, resume=True)
    recipe = recipe_in(tmp_path, base)
    write_jsonl(tmp_path / "train.jsonl", planted_rows(239))
    with pytest.raises(ResumeRefused, match="the data changed"):
        train(recipe, store=store, resume=True)


def test_a_run_whose_weights_are_no_numbers_leaves_nothing_to_resume(base: Path, tmp_path: Path) -> None:
    recipe, store = planted_recipe(tmp_path, base, test_rows=4, train={"max_steps": 4, "lr": 1e30}), AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterInvalid, match=r"training diverged \(lower train\.lr\)"):
        train(recipe, store=store, progress=False)
    with pytest.raises(ResumeRefused, match="no checkpoint"):
        train(recipe, store=store, resume=True, progress=False)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_training_and_loading_a_checkpoint_change_no_tensor_of_the_base(base: Path, tmp_path: Path, quantization: str) -> None:
    import hashlib

    import torch

    from embedft.base import BaseSpec, load_base
    from embedft.causal_lm.template import template_of
    from embedft.causal_lm.train import build_trainer, read_split, tokenized
    from embedft.methods import attach

    def frozen(model: torch.nn.Module) -> list[str]:
        named = [*model.named_parameters(), *model.named_buffers()]
        kept = [tensor.detach().cpu().contiguous() for name, tensor in named if ".lora_" not in name]
        kept += [tensor.CB for tensor in kept if getattr(tensor, "CB", None) is not None]
        return sorted(hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for tensor in kept)

    recipe = planted_recipe(tmp_path, base, quantization=quantization, test_rows=0, train={"max_steps": 3, "checkpoint_every": 3})
    loaded = load_base(BaseSpec(recipe.base.model, quantization), task="causal_lm")
    before = frozen(loaded.model)
    model = attach(loaded, recipe.adapter, task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(loaded.tokenizer), recipe)
    trainer = build_trainer(model, loaded, examples, recipe.train, folder=tmp_path)
    trainer.train()
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.dtype == torch.float32 for value in trained.values())
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.zero_()
    interrupt.load_trainable(model, tmp_path / "checkpoint-3")
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters() if name in trained)
    assert any(value.abs().sum() > 0 for name, value in trained.items() if "lora_B" in name)
    assert frozen(model) == before
