"""`embedft recipes …`"""

import argparse
import json
from pathlib import Path
from typing import Any

from embedft.cli.options import command
from embedft.cli.show import show, show_table
from embedft.errors import UsageError


def add_commands(commands: Any) -> None:
    group = commands.add_parser("recipes", help="list, show and copy the shipped recipes")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    command(actions, "list", _recipes_list, "the recipes that come with embedft")
    show = command(actions, "show", _recipes_show, "print a recipe with every default written out")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("overrides", metavar="key=value", nargs="*")
    importing = command(actions, "import", _recipes_import, "translate an Axolotl YAML, and list what has no place here")
    importing.add_argument("file", metavar="AXOLOTL", type=Path)
    importing.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the recipe's file (default: printed)")
    copy = command(actions, "copy", _recipes_copy, "copy a shipped recipe to a file of your own")
    copy.add_argument("recipe", metavar="RECIPE")
    copy.add_argument("out", metavar="OUT", type=Path)


def _recipes_list(arguments: argparse.Namespace) -> None:
    from embedft.recipe_file import load_recipe, shipped_recipes

    rows: list[dict[str, Any]] = []
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        rows.append({"name": name, "task": recipe.task, "base": recipe.base.model, "quantization": recipe.base.quantization})
    if arguments.json:
        print(json.dumps({"recipes": rows}))
    else:
        show_table(rows)


def _recipes_show(arguments: argparse.Namespace) -> None:
    from embedft.embedding.losses import loss_named
    from embedft.recipe_file import load_recipe
    from embedft.training.together import check_together

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_together(recipe)
    if recipe.task == "embedding":
        loss_named(recipe.loss.name)
    print(json.dumps(recipe.model_dump(mode="json")) if arguments.json else recipe.resolved_yaml().rstrip())


def _recipes_copy(arguments: argparse.Namespace) -> None:
    from embedft.recipe_file import load_recipe, shipped_recipes

    load_recipe(arguments.recipe)  # says what there is, where there is none of that name
    if arguments.recipe not in shipped_recipes():
        raise UsageError(f"{arguments.recipe} is a file of your own already: copy it as any file")
    if arguments.out.exists():
        raise UsageError(f"{arguments.out} exists already: name a new file")
    arguments.out.write_text(shipped_recipes()[arguments.recipe].read_text(encoding="utf-8"), encoding="utf-8")
    show(arguments, {"path": str(arguments.out)}, title="copied")


def _recipes_import(arguments: argparse.Namespace) -> None:
    from embedft.axolotl import as_yaml, read_axolotl, translate

    made = translate(read_axolotl(arguments.file), name=(arguments.out or arguments.file).stem)
    if arguments.out:
        if arguments.out.exists():
            raise UsageError(f"{arguments.out} exists already: name a new file")
        arguments.out.write_text(as_yaml(made), encoding="utf-8")
    if arguments.json:
        print(json.dumps({"recipe": made.recipe, "left_out": made.left_out, "path": str(arguments.out) if arguments.out else None}))
    elif arguments.out:
        show_table([{"left out": key, "why": why} for key, why in made.left_out.items()] or [{"left out": "nothing"}])
    else:
        print(as_yaml(made).rstrip())
