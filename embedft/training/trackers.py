"""Where a run's losses, scores and results go: TensorBoard, Weights & Biases, MLflow.

transformers' callbacks send what a trainer logs; here a run of each tracker is begun, before anything takes time, and ended.
"""

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedft.errors import RecipeError, UsageError

PROJECT = "embedft"  # of W&B, and experiment of MLflow, where the environment names none
Tell = Callable[[Mapping[str, float]], None]
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")  # of an MLflow metric


def reported(names: Sequence[str], output_dir: Path) -> list[str]:
    """The trackers as transformers names them. TensorBoard's files go to runs/ beside the run's own folder, which is removed once its
    adapter is published."""
    if "tensorboard" in names:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(output_dir.parent.parent / "runs" / output_dir.name)
    return list(names) or ["none"]


@contextmanager
def tracked(names: Sequence[str], *, name: str) -> Generator[Tell]:
    """A run called `name` in W&B and in MLflow, where they are among `names`; it ends as failed where the block raises. What is yielded
    takes the results. One that the caller has begun is used, and left open.

    RecipeError where a tracker is not installed, UsageError where a run cannot be begun.
    """
    if missing := [each for each in names if find_spec(each) is None]:
        raise RecipeError("recipe", [f"train.trackers: {each} is not installed: pip install {each}, or leave it out" for each in missing])
    with ExitStack() as stack:
        tells = [stack.enter_context(_RUNS[each](name)) for each in names if each in _RUNS]

        def tell(results: Mapping[str, float]) -> None:
            for each in tells:
                each(results)

        yield tell


@contextmanager
def _wandb(name: str) -> Generator[Tell]:
    import wandb

    if wandb.run is not None:
        yield _summing(wandb.run)
        return
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT") or PROJECT, name=os.environ.get("WANDB_NAME") or name)
    except wandb.Error as error:
        raise _refused("wandb", error, "log in with `wandb login`, keep the run here with WANDB_MODE=offline") from None
    try:
        yield _summing(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _summing(run: Any) -> Tell:
    return lambda results: run.summary.update(dict(results))


@contextmanager
def _mlflow(name: str) -> Generator[Tell]:
    import mlflow
    from mlflow.exceptions import MlflowException

    def tell(results: Mapping[str, float]) -> None:
        if mlflow.active_run() is not None:
            mlflow.log_metrics({_NOT_IN_A_NAME.sub("_", key): value for key, value in results.items()})

    if mlflow.active_run() is not None or os.environ.get("MLFLOW_RUN_ID"):  # transformers' callback takes up the latter
        yield tell
        return
    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        mlflow.start_run(run_name=name)
    except (MlflowException, ImportError, OSError) as error:
        raise _refused("mlflow", error, "look at MLFLOW_TRACKING_URI") from None
    try:
        yield tell
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()


def _refused(tracker: str, error: Exception, remedy: str) -> UsageError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return UsageError(f"train.trackers: {tracker} begins no run: {why}: {remedy}, or leave it out")


_RUNS: dict[str, Callable[[str], AbstractContextManager[Tell]]] = {"wandb": _wandb, "mlflow": _mlflow}
