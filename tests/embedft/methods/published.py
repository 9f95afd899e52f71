"""A trained adapter folder of any method with passport and probes, as the trainer publishes it."""

from pathlib import Path
from typing import Any

from embedft.adapters.store import AdapterStore
from embedft.causal_lm.train import train
from embedft.recipe import parse_recipe
from tests.embedft.methods.cells import RATES, small
from tests.fixtures_lm import planted_rows, write_jsonl


def published(
    folder: Path,
    base: Path,
    method: str,
    quantization: str = "none",
    *,
    name: str | None = None,
    r: int = 4,
    targets: Any = "all-linear",
    **settings: Any,
) -> Path:
    """The path of the adapter in the store `folder`/store."""
    folder.mkdir(exist_ok=True, parents=True)
    data = {"train": str(write_jsonl(folder / "train.jsonl", planted_rows(96)))}
    train_settings = {"batch": 12, "lr": RATES.get(method, 0.02), "max_length": 48, "max_steps": 12, "schedule": "constant"} | settings
    content = {
        "task": "causal_lm",
        "name": name or method.replace("_", "-"),
        "base": {"model": str(base), "quantization": quantization},
        "adapter": small(method, r) | {"targets": targets},
        "data": data,
        "train": train_settings,
    }
    result = train(parse_recipe(content), store=AdapterStore(folder / "store"), progress=False)  # type: ignore[arg-type]
    return Path(result.path)
