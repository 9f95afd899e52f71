"""One tiny base and its trained adapters for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from embedft.adapters.store import AdapterStore
from embedft.recipe import CausalLMRecipe
from embedft.training.measure import AdapterResult
from tests.fixtures_lm import planted_recipe, tiny_llama


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """On one thread."""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def trained(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[AdapterResult, CausalLMRecipe, AdapterStore]]:
    """Quantization → the planted task's adapter on it, trained once a session."""
    from embedft.causal_lm.train import train

    made: dict[str, tuple[AdapterResult, CausalLMRecipe, AdapterStore]] = {}

    def of(quantization: str) -> tuple[AdapterResult, CausalLMRecipe, AdapterStore]:
        if quantization not in made:
            folder = tmp_path_factory.mktemp(quantization)
            recipe, store = planted_recipe(folder, tiny_base, quantization=quantization), AdapterStore(folder / "store")
            result = train(recipe, store=store, progress=False)
            assert isinstance(result, AdapterResult)
            made[quantization] = result, recipe, store
        return made[quantization]

    return of
