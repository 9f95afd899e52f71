"""What the two trainers are told."""

from pathlib import Path

import pytest

from embedft.recipe import parse_recipe
from embedft.training.arguments import hf_arguments

ONE = {"task": "embedding", "name": "one", "base": {"model": "minilm"}, "data": {"train": "x.jsonl"}}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (40, 4)])
def test_a_run_is_never_all_warm_up(tmp_path: Path, steps: int, warmup: int) -> None:
    train = parse_recipe({**ONE, "train": {"epochs": 1, "warmup": 0.1}}).train
    assert hf_arguments(train, output_dir=tmp_path, steps_per_epoch=steps)["warmup_steps"] == warmup
