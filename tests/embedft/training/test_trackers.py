"""W&B (offline) and MLflow (its file store): what a run sends them, and what happens where they take none."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.store import AdapterStore
from embedft.causal_lm.train import train
from embedft.errors import UsageError
from embedft.training.trackers import tracked
from tests.fixtures_lm import planted_recipe, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody is logged in anywhere, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    given = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    given |= {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    import mlflow
    import wandb

    wandb.teardown()
    mlflow.end_run()


def trained(base: Path, folder: Path, tracker: str) -> Any:
    recipe = planted_recipe(folder, base, test_rows=4, train={"max_steps": 10, "trackers": [tracker]})
    return train(recipe, store=AdapterStore(folder / "store"), progress=False)


def records(path: Path) -> Iterator[Any]:
    """What an offline run of W&B keeps: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_gets_losses_settings_and_the_result(base: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = trained(base, home, "wandb")
    (path,) = home.glob("wandb/offline-run-*/*.wandb")
    kept = list(records(path))
    (run,) = [record.run for record in kept if record.HasField("run")]
    assert (run.project, run.display_name) == ("embedft", "colours-none")
    items = [item for record in kept for item in record.history.item]
    losses = [float(item.value_json) for item in items if "train/loss" in (item.key, *item.nested_key)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    settings = {item.key for record in kept for item in [*record.run.config.update, *record.config.update]}
    assert "learning_rate" in settings
    summary = {item.key: item.value_json for record in kept for item in record.summary.update}
    assert float(summary["adapter/exact_match"]) == result.metrics["adapter"]["exact_match"]
    assert [record.exit.exit_code for record in kept if record.HasField("exit")] == [0]


def test_mlflow_gets_losses_settings_and_the_result(base: Path, home: Path) -> None:
    from mlflow.tracking import MlflowClient

    result = trained(base, home, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("embedft")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("colours-none", "FINISHED")
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert float(run.data.params["learning_rate"]) == 1e-2
    assert run.data.metrics["adapter/exact_match"] == result.metrics["adapter"]["exact_match"]


def test_a_run_that_fails_ends_as_failed_and_one_of_the_callers_stays_open(home: Path) -> None:
    import mlflow

    def failing() -> None:
        with tracked(["mlflow"], name="x"):
            begun.append(mlflow.active_run())
            raise ZeroDivisionError

    begun: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        failing()
    assert mlflow.get_run(begun[0].info.run_id).info.status == "FAILED"
    with mlflow.start_run() as own:
        with tracked(["mlflow"], name="x") as tell:
            tell({"base/ndcg@10": 0.5})
        assert mlflow.active_run() is not None
    assert mlflow.get_run(own.info.run_id).data.metrics == {"base/ndcg_10": 0.5}


def nobody_listens() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.mark.parametrize(
    ("tracker", "given", "says"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "wandb begins no run: .*WANDB_MODE=offline"),
        ("mlflow", {"MLFLOW_TRACKING_URI": nobody_listens(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_tracker_that_takes_no_run_is_told_before_anything_is_scored(
    base: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, given: dict[str, str], says: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("embedft.causal_lm.train._evaluate", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(UsageError, match=says):
        trained(base, home, tracker)
