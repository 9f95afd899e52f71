"""What the tests of training say of a run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from embedft.adapters.store import AdapterStore
from embedft.embedding.train import train
from embedft.recipe import EmbeddingRecipe
from embedft.training.measure import AdapterResult

GAP = 0.15  # nDCG@10 that a trained tiny base gains at least; shuffled pairs must stay below it
PADDED, PACKED, PART = {"dropout": 0.1}, {}, {"layers": 1}  # dropout keeps a model from running packed

Make = Callable[..., EmbeddingRecipe]


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
