"""What a recipe asks for that does not go together, told by the recipe alone: before any data or base is read. Imports nothing heavy."""

from embedft.errors import MethodUnsupported, RecipeError
from embedft.methods import Method, settled
from embedft.recipe import CausalLMRecipe, CausalLMTrain, EmbeddingRecipe


def check_together(recipe: EmbeddingRecipe | CausalLMRecipe) -> None:
    """Raises MethodUnsupported and RecipeError."""
    method = settled(recipe.adapter)
    if method.optimizer == "lora_fa" and recipe.train.optimizer != "adamw":
        where = f"with {recipe.train.optimizer}"
        raise MethodUnsupported(method.name, where=where, why="its optimizer is its own: leave train.optimizer out")
    patience, wanted = recipe.train.patience, recipe.train.evaluate_every is not None
    if isinstance(recipe, EmbeddingRecipe):
        if not wanted and (patience or recipe.data.dev):
            raise RecipeError(recipe.name, ["train.patience and data.dev go with train.evaluate_every: set it too"])
        return
    if wanted != (recipe.data.validation is not None) or (patience and not wanted):
        raise RecipeError(recipe.name, ["data.validation and train.evaluate_every go together, and train.patience with them: set both"])
    _check_rows(method, recipe.train)


def _check_rows(method: Method, settings: CausalLMTrain) -> None:
    if settings.packing and not method.packing:
        why = "its virtual tokens stand before a row, not each example: set train.packing=false"
        raise MethodUnsupported(method.name, where="with packing", why=why)
    if settings.gradient_checkpointing and not method.checkpointing:
        why = "a block that is computed again finds its prefix already used: set train.gradient_checkpointing=false"
        raise MethodUnsupported(method.name, where="with gradient checkpointing", why=why)
