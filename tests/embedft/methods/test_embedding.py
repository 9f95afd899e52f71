"""The same table drives retrieval adapters, through the trainer that users call."""

from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.store import AdapterStore
from embedft.embedding.train import train
from embedft.recipe import parse_recipe
from embedft.verify import verify
from tests.embedft.methods.cells import RATES, small
from tests.fixtures_embedding import planted_rows, write_rows


@pytest.mark.parametrize("method", ["eva", "prompt_tuning", "relora"])
def test_an_embedding_adapter_of_any_method_is_published_with_probes_that_pass(bases: dict[str, Path], tmp_path: Path, method: str) -> None:
    content = {
        "task": "embedding",
        "name": "e",
        "base": {"model": str(bases["embedding"])},
        "adapter": small(method),
        "data": {"train": write_rows(tmp_path / "rows.jsonl", planted_rows(96))},
        "train": {"batch": 12, "lr": RATES.get(method, 0.02), "max_length": 24, "max_steps": 6},
        "eval": {"queries": 8},
    }
    result: Any = train(parse_recipe(content), store=AdapterStore(tmp_path / "store"), progress=False)  # type: ignore[arg-type]
    report = verify(Path(result.path), base=bases["embedding"])
    assert report.passed, report.reason


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "olora", "relora", "delta_lora", "vera"])
def test_packed_training_is_for_what_it_computes_rightly(bases: dict[str, Path], method: str) -> None:
    """A packed encoder knows one pair a layer: where a frozen one joins it, the ordinary forward must serve."""
    from embedft.base import BaseSpec, load_base
    from embedft.embedding.packed import unpackable
    from embedft.methods import attach
    from embedft.recipe import AdapterSection

    base = load_base(BaseSpec(str(bases["embedding"])), task="embedding")
    model = attach(base, AdapterSection(**small(method)), task="embedding")
    assert (unpackable(model) is None) == (method in {"lora", "rslora"})
