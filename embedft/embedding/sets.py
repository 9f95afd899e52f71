"""What a run reads: the rows it learns from, what it is judged by, and what chooses its best step."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from embedft.embedding.beir import is_beir
from embedft.embedding.data import Examples, RetrievalSet, data_hash, load_data, reduce_to, split_dev
from embedft.embedding.losses import Loss, loss_named
from embedft.errors import DataError, RecipeError
from embedft.recipe import EmbeddingRecipe, parse_recipe
from embedft.strict_yaml import read_yaml

if TYPE_CHECKING:
    from embedft.adapters.passport import Passport


@dataclass(frozen=True)
class Sets:
    """`dev` is None where no step is chosen."""

    examples: Examples
    judged: RetrievalSet
    dev: RetrievalSet | None

    @property
    def hash(self) -> str:
        """64 hex digits, for a passport."""
        return self.hash_with(None)

    def hash_with(self, general: RetrievalSet | None) -> str:
        """And a general set that was given: 64 hex digits of all that a run reads."""
        return data_hash(self.examples, self.judged, *(given for given in (self.dev, general) if given))


def read_sets(recipe: EmbeddingRecipe) -> Sets:
    """Raises DataError and MethodUnsupported."""
    loss = loss_named(recipe.loss.name)
    examples, judged = load_data(recipe.data, recipe.eval, scored=loss.takes == "scored", taught=loss.takes == "distilled")
    check_negatives(examples, loss)
    if recipe.train.evaluate_every is None:
        return Sets(examples, judged, None)
    examples, dev = split_dev(examples, judged, recipe.data.dev)
    return Sets(examples, judged, reduce_to(dev, queries=recipe.eval.queries, documents=recipe.eval.documents))


def check_negatives(examples: Examples, loss: Loss) -> None:
    if loss.takes in {"triplets", "distilled"} and examples.negatives == 0:
        bare = [row.query for row in examples.rows if not row.negatives]
        raise DataError(
            [
                f"loss {loss.name!r} takes triplets, and {len(bare)} of {len(examples)} rows have no negative (the first asks "
                f"{bare[0][:60]!r}); expected a negative in every row: `embedft data mine` adds them"
            ]
        )


def of_run(source: str, folder: Path, passport: "Passport") -> tuple[EmbeddingRecipe, Sets] | None:
    """What the run of the adapter in `folder` read, where the file `source` is what it learnt from; else None.

    Without the recipe's data.eval a part of `source` was kept back to judge it. None, too, where data.eval is neither where it was nor
    beside `source`.
    """
    path = folder / "recipe.yaml"
    if is_beir(source) or not path.is_file():
        return None
    try:
        recipe = parse_recipe(read_yaml(path.read_text(encoding="utf-8")), where=str(path))
        if not isinstance(recipe, EmbeddingRecipe):
            return None
        judged_by = recipe.data.eval
        if judged_by and not Path(judged_by).exists():  # of a path of another machine the name is left
            judged_by = str(Path(source).with_name(Path(judged_by).name))
        data = recipe.data.model_copy(update={"train": source, "eval": judged_by})
        sets = read_sets(recipe.model_copy(update={"data": data}))
    except (RecipeError, DataError, yaml.YAMLError):
        return None
    return (recipe, sets) if sets.hash == passport.data_hash else None
