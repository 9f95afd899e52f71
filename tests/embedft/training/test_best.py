"""The best weights of a run: by finite scores alone."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedft.errors import AdapterInvalid
from embedft.training.best import BestCheckpoint

NAN, INF = math.nan, math.inf


class Trainer:
    """Its weights are the number of the step that was saved last."""

    def __init__(self) -> None:
        self.step, self.loaded = 0, 0

    def add_callback(self, _: Any) -> None:
        return

    def _save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "weights").write_text(str(self.step))

    def _load_from_checkpoint(self, folder: str) -> None:
        self.loaded = int((Path(folder) / "weights").read_text())


def run(folder: Path, scores: list[float], *, patience: int | None = None) -> tuple[Trainer, BestCheckpoint]:
    trainer, left, control = Trainer(), iter(scores), SimpleNamespace(should_training_stop=False)
    best = BestCheckpoint(trainer, folder, lambda: next(left), metric="ndcg@10", every=1, patience=patience)
    while trainer.step < len(scores) and not control.should_training_stop:
        trainer.step += 1
        best.on_step_end(None, SimpleNamespace(global_step=trainer.step, max_steps=len(scores)), control)
    return trainer, best


def test_what_was_best_is_told_with_the_name_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [0.1, 0.3, 0.2])[1].restore(name="a")
    assert capsys.readouterr().err == "note: a: the best of 3 evaluations was at step 2: ndcg@10 0.3000\n"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([NAN, 0.1, 0.3, 0.2], 3), ([0.1, NAN, 0.2, NAN], 3), ([INF, 0.1, -INF], 2), ([NAN, -INF, -5.0], 3), ([0.2, 0.2], 1)],
)
def test_a_score_that_is_not_finite_is_never_the_best(tmp_path: Path, scores: list[float], expected: int) -> None:
    trainer, best = run(tmp_path, scores)
    told = best.restore(name="a")
    assert (told["step"], told["score"], trainer.loaded) == (expected, scores[expected - 1], expected)


def test_a_run_without_a_finite_score_ends_after_its_patience_and_says_so(tmp_path: Path) -> None:
    trainer, best = run(tmp_path, [NAN] * 9, patience=3)
    assert trainer.step == 4
    assert len(json.loads((tmp_path / "best" / "history.json").read_text())) == 4
    with pytest.raises(AdapterInvalid, match="none of its 4 evaluations gave a finite score"):
        best.restore(name="a")


def test_what_was_measured_after_the_checkpoint_is_forgotten_and_a_run_begun_afresh_knows_nothing(tmp_path: Path) -> None:
    """A run that was killed after its fourth evaluation goes on from its second step: it will measure the third and fourth again."""
    trainer, first = run(tmp_path, [0.1, 0.2, 0.9, 0.3])
    assert first.best == (3, 0.9)
    for step, known in ((2, [(1, 0.1), (2, 0.2)]), (0, [])):
        again = BestCheckpoint(trainer, tmp_path, lambda: 0.5, metric="ndcg@10", every=1, patience=None)
        again.on_train_begin(None, SimpleNamespace(global_step=step), None)
        assert again.history == known
    again.on_train_begin(None, SimpleNamespace(global_step=2), None)
    trainer.step = 3
    again.on_step_end(None, SimpleNamespace(global_step=3, max_steps=4), SimpleNamespace(should_training_stop=False))
    assert (again.restore(name="a")["score"], trainer.loaded) == (0.5, 3)
