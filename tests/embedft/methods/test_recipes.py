"""Every method has a recipe of its own, and it asks for nothing that the method refuses."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from embedft.base import BaseSpec, source_folder
from embedft.methods import METHODS, supported
from embedft.model_folder import describe
from embedft.recipe_file import load_recipe, shipped_recipes


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_that_it_can_be_trained_by(method: str) -> None:
    name = f"method-{method.replace('_', '-')}"
    recipe: Any = load_recipe(name)
    assert (recipe.name, recipe.adapter.method) == (name, method)
    info = describe(source_folder(BaseSpec(recipe.base.model)))
    assert supported(recipe.adapter, task=recipe.task, info=replace(info, quantization=recipe.base.quantization)) is METHODS[method]


def test_recipes_of_methods_differ_from_the_defaults_only() -> None:
    for name, path in shipped_recipes().items():
        if name.startswith("method-"):
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
            whole: Any = load_recipe(name)
            for section in ("adapter", "train", "eval"):
                defaults = type(getattr(whole, section))()
                for key in written.get(section, {}):
                    assert getattr(whole, section).model_dump()[key] != defaults.model_dump()[key], (name, section, key)
