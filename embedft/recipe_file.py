"""Recipes as files: the shipped ones, a YAML file with key=value over it, and what its paths are relative to."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from embedft.errors import RecipeError
from embedft.recipe import CausalLMRecipe, EmbeddingRecipe, data_paths, parse_recipe
from embedft.strict_yaml import read_yaml

_TEXTS = ("data.prompts.query", "data.prompts.document")


def shipped_recipes() -> dict[str, Path]:
    """Name (file stem) → path of each recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipes_root().glob("*/*.yaml"))}


def recipes_root() -> Path:
    """The shipped recipes: inside the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).parent / "_recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def data_note(name: str) -> str:
    """What a shipped recipe says of where its data comes from; '' for any other."""
    path = shipped_recipes().get(name)
    lines = path.read_text(encoding="utf-8").splitlines() if path and not Path(name).exists() else []
    return next((line.removeprefix("# Data: ") for line in lines if line.startswith("# Data: ")), "")


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> EmbeddingRecipe | CausalLMRecipe:
    """Read a recipe from a file or by a shipped recipe's name and apply dotted `key=value` overrides.

    Paths of a recipe file are relative to the file; those of a shipped recipe and of overrides to the working directory.
    Raises RecipeError naming all faults at once, with the nearest known key for an unknown one.
    """
    path, folder = _locate(str(path_or_name))
    content = _read_yaml(path)
    for override in overrides:
        _apply(content, override)
    _resolve_paths(content, folder, overrides)
    return parse_recipe(content, where=str(path_or_name))


def _locate(given: str) -> tuple[Path, Path]:
    path = Path(given)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise RecipeError(given, ["it is a folder; expected a recipe file" if path.is_dir() else "there is no such file"])
        return path, path.resolve().parent
    shipped = shipped_recipes()
    if given in shipped:
        return shipped[given], Path.cwd()
    near = difflib.get_close_matches(given, shipped, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(given, [f"neither a file nor a shipped recipe (see `embedft recipes list`){hint}"])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not readable as YAML: {error}"]) from None
    if not isinstance(content, dict):
        raise RecipeError(str(path), ["expected a mapping with `task`, `base` and `data`"])
    return cast("dict[str, Any]", content)


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(override, ["expected key=value, for example train.lr=1e-4"])
    parsed = _value(key, value, override)
    *parents, last = key.split(".")
    for parent in parents:
        inner: Any = content.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(override, [f"{parent} is not a section"])
        content = cast("dict[str, Any]", inner)
    content[last] = parsed


def _value(key: str, value: str, override: str) -> Any:
    """What stands behind the =: YAML, but for a prompt, which is text to its last blank unless it is quoted or null."""
    if key in _TEXTS and value != "null" and not (value[:1] in ("'", '"') and value[-1:] == value[:1] != value):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(override, [f"the value is not readable: {error}"]) from None
    if isinstance(parsed, str):
        return parsed if key in _TEXTS else _number(parsed)
    return value if isinstance(parsed, dict) and not value.lstrip().startswith("{") else parsed  # a template such as 'Q: {question}'


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as a string; a person means a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _resolve_paths(content: dict[str, Any], folder: Path, overrides: Iterable[str]) -> None:
    overridden = {override.partition("=")[0] for override in overrides}
    for section, key, dotted in data_paths(content):
        value, given_here = section[key], any(dotted == name or dotted.startswith(f"{name}.") for name in overridden)
        if isinstance(value, str) and not value.startswith("hf://"):
            section[key] = str(((Path.cwd() if given_here else folder) / Path(value).expanduser()).resolve())
    base: Any = content.get("base")
    if isinstance(base, dict) and isinstance(model := cast("dict[str, Any]", base).get("model"), str):
        path = (Path.cwd() if "base.model" in overridden else folder) / Path(model).expanduser()
        if path.exists():
            base["model"] = str(path.resolve())
