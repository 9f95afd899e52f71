"""The shipped retrieval recipes parse, and say nothing that is the default anyway."""

from pathlib import Path

import pytest
import yaml

from embedft.embedding.losses import loss_named
from embedft.recipe import EmbeddingRecipe, parse_recipe
from embedft.recipe_file import load_recipe, recipes_root

RECIPES = sorted((recipes_root() / "embedding").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_under_its_own_name_and_repeats_no_default(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, EmbeddingRecipe)
    assert recipe.name == path.stem
    loss_named(recipe.loss.name)
    content = yaml.safe_load(path.read_text())
    for section, values in content.items():
        for key in values if isinstance(values, dict) else ():
            without = {**content, section: {k: v for k, v in values.items() if k != key}}
            if (section, key) not in {("base", "model"), ("data", "train"), ("data", "eval"), ("base", "pooling")}:
                assert parse_recipe(without) != parse_recipe(content), f"{section}.{key} is the default"


def test_there_is_a_recipe_for_each_way_of_pooling_and_for_the_demo() -> None:
    recipes = [load_recipe(path) for path in RECIPES]
    assert {"pydocs-code", "pydocs-readme"} <= {recipe.name for recipe in recipes}
    assert {recipe.base.pooling for recipe in recipes if isinstance(recipe, EmbeddingRecipe)} >= {"mean", "cls", "lasttoken"}
