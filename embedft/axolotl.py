"""An Axolotl YAML → one of our recipes, and a list of what has no place in it, each with the reason. Trains nothing."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from embedft.axolotl_keys import CHOICES, DEFAULTS, FORMATS, KEYS, OTHER_ROWS, REASONS, TOGETHER
from embedft.errors import RecipeError
from embedft.recipe import parse_recipe
from embedft.strict_yaml import read_yaml


@dataclass
class Translation:
    """`recipe`: sections as a recipe has them; `left_out`: Axolotl's key → why it has no place, or what to do instead."""

    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def put(self, place: str, value: Any) -> None:
        section, _, key = place.partition(".")
        self.recipe.setdefault(section, {})[key] = value

    def has(self, place: str) -> bool:
        section, _, key = place.partition(".")
        return key in self.recipe.get(section, {})


def translate(content: Mapping[str, Any], *, name: str) -> Translation:
    """A parsed Axolotl YAML → a valid recipe called `name`. RecipeError where what is left is none (no base, no data)."""
    made = Translation({"task": "causal_lm", "name": _name(name)})
    given = {key: value for key, value in content.items() if value is not None and value != ""}
    for key, value in given.items():
        if key in KEYS:
            made.put(KEYS[key], value)
        elif key in CHOICES:
            place, words = CHOICES[key]
            _choice(made, key, place, words, value)
        elif key not in TOGETHER and (value is not False or key not in REASONS):
            made.left_out[key] = REASONS.get(key) or _unknown(key)
    for keys, place, value in DEFAULTS:
        if given.keys().isdisjoint(keys):
            made.put(place, value)
    try:
        for rule in (_base, _method, _data, _whole, _steps, _trackers):
            rule(given, made)
    except (TypeError, ValueError) as error:
        raise RecipeError(name, [f"Axolotl's file holds a text where a number is due: {error}"]) from None
    made.recipe = {key: value for key, value in made.recipe.items() if value != {}}
    parse_recipe(dict(made.recipe), where=f"{name}: what Axolotl's file comes to")
    return made


def read_axolotl(path: Path) -> dict[str, Any]:
    """The file's mapping; RecipeError where it is none."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError:
        raise RecipeError(str(path), ["there is no such file"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not readable as YAML: {error}"]) from None
    if not isinstance(content, dict) or "base_model" not in content:
        raise RecipeError(str(path), ["no `base_model` in it: it is not an Axolotl configuration"])
    return cast("dict[str, Any]", content)


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64] or "imported"


def _choice(made: Translation, key: str, place: str, words: Mapping[str, Any], value: Any) -> None:
    word = str(value).lower()
    if word not in words:
        known = sorted({str(name) for name in words.values() if name is not None})
        made.left_out[key] = f"no {word!r} here: {place} is one of {', '.join(known)}"
    elif words[word] is not None:
        made.put(place, words[word])


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*KEYS, *CHOICES, *TOGETHER, *REASONS], n=1, cutoff=0.8)
    return "a key that is not known here" + (f"; did you mean {near[0]!r}?" if near else "")


def _base(given: Mapping[str, Any], made: Translation) -> None:
    bits = 4 if given.get("load_in_4bit") or given.get("adapter") == "qlora" else 8 if given.get("load_in_8bit") else _loftq_bits(given)
    if quantization := {4: "nf4", 8: "int8"}.get(bits or 0):
        made.put("base.quantization", quantization)


def _method(given: Mapping[str, Any], made: Translation) -> None:
    """An adapter has one method: of several that a file asks for the last of `_asked`, and the others are left out by name."""
    adapter = given.get("adapter")
    if adapter not in (None, "lora", "qlora", "llama-adapter"):
        made.left_out["adapter"] = f"no adapter {adapter!r} here: see adapter.method"
    method, asked = {None: "full", "llama-adapter": "llama_adapter"}.get(adapter, "lora"), _asked(given, made)
    if asked:
        last, method = list(asked.items())[-1]
        others = {key: f"an adapter has one method here, and {last} names it" for key, other in asked.items() if other != method}
        made.left_out.update(others)
    if options := _options(given, method):
        made.put("adapter.options", options)
    if method == "relora":
        _relora(given, made)
    made.put("adapter.method", method)
    if method in {"full", "llama_adapter"}:
        for key in ("dropout", "targets", "alpha", *(["r"] if method == "full" else [])):
            made.recipe["adapter"].pop(key, None)
    elif given.get("lora_target_linear") or isinstance(given.get("lora_target_modules"), str):
        asked = made.recipe["adapter"].pop("targets", None)  # all linear layers: the default
        if isinstance(asked, list) and "lm_head" in asked:
            made.left_out["lora_target_modules"] = "all linear layers are taken, but lm_head: name them all in adapter.targets to have it"
        if given.get("lora_target_modules") not in (None, "all-linear") and not given.get("lora_target_linear"):
            made.left_out["lora_target_modules"] = "a list of layer names is wanted: set adapter.targets"


def _asked(given: Mapping[str, Any], made: Translation) -> dict[str, str]:
    """The keys that name a method beyond LoRA, each with it; where there are several, the last one is taken."""
    found: dict[str, str] = {}
    start = given.get("peft_init_lora_weights")
    if named := re.match(r"(pissa|olora|eva|loftq)", str(start).lower()):
        found["peft_init_lora_weights"] = named[1]
    elif start not in (None, True, "gaussian"):
        made.left_out["peft_init_lora_weights"] = f"no start {start!r} here: pissa, olora, eva and loftq are methods"
    peft = _mapping(given.get("peft"))
    if "loftq_config" in peft:
        found["peft"] = "loftq"
    made.left_out.update({f"peft.{key}": "a key that is not known here" for key in peft if key != "loftq_config"})
    flags = {"peft_use_dora": "dora", "peft_use_rslora": "rslora", "relora": "relora", "relora_steps": "relora"}
    return found | {key: method for key, method in (flags | {"loraplus_lr_ratio": "lora_plus"}).items() if given.get(key)}


def _options(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    steps = re.search(r"niter_(\d+)$", str(given.get("peft_init_lora_weights")).lower())
    if method == "pissa" and steps:
        return {"iterations": int(steps[1])}
    return {"ratio": float(given["loraplus_lr_ratio"])} if method == "lora_plus" else {}


def _loftq_bits(given: Mapping[str, Any]) -> int | None:
    """LoftQ makes good what quantization lost, so its base is quantized though Axolotl's file loads it whole."""
    peft = _mapping(given.get("peft"))
    return int(_mapping(peft["loftq_config"]).get("loftq_bits", 4)) if "loftq_config" in peft else None


def _mapping(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _relora(given: Mapping[str, Any], made: Translation) -> None:
    every, total = given.get("jagged_restart_steps") or given.get("relora_steps"), given.get("max_steps")
    options: dict[str, Any] = {}
    if every and total:
        options["restarts"] = max(1, int(total) // int(every) - 1)
    elif every:
        made.left_out["relora_steps"] = "restarts are counted here, not spaced: set adapter.options.restarts (default 2)"
    warm = given.get("jagged_restart_warmup_steps") or given.get("relora_warmup_steps")
    if warm:
        options["warm"] = int(warm)
    if given.get("relora_prune_ratio"):
        options["prune"] = float(given["relora_prune_ratio"])
    if options:
        made.put("adapter.options", options)


def _data(given: Mapping[str, Any], made: Translation) -> None:
    for key, place in (("datasets", "data.train"), ("test_datasets", "data.validation")):
        listed = given.get(key)
        if not isinstance(listed, list) or not listed:
            continue
        first: Any = listed[0]
        if len(cast("list[Any]", listed)) > 1:
            made.left_out[f"{key}[1:]"] = "one file or data set a recipe: concatenate them"
        if not isinstance(first, dict):
            made.left_out[key] = "expected a list of mappings with `path`"
            continue
        one = cast("dict[str, Any]", first)
        made.put(place, _source(one))
        _row_format(one, key, made)
        for part in sorted(set(one) - _DATASET_KEYS):
            renamed = "rows are prompt/completion, messages or Alpaca: rename the columns in the file"
            placed = f"one for all rows here: set {CHOICES[part][0]}" if part in CHOICES else renamed
            made.left_out[f"{key}[0].{part}"] = REASONS.get(part, placed)
        files = one.get("data_files")
        if isinstance(files, list) and len(cast("list[Any]", files)) > 1:
            made.left_out[f"{key}[0].data_files[1:]"] = "one file or data set a recipe: concatenate them"
    if made.has("data.validation") and not made.has("train.evaluate_every"):
        made.recipe["data"].pop("validation")
        made.left_out["test_datasets"] = "without eval_steps nothing says when: set data.validation and train.evaluate_every"


_DATASET_KEYS = {"path", "type", "ds_type", "data_files", "split", "name", "revision", "field_messages"}


def _source(one: Mapping[str, Any]) -> str:
    """A local file as it stands; a hub data set as hf://path:name@revision#split."""
    path, files = str(one.get("path", "")), one.get("data_files")
    if files:
        return str(cast("list[Any]", files)[0] if isinstance(files, list) else files)
    if Path(path).suffix in {".json", ".jsonl", ".csv", ".parquet", ".gz"} or path.startswith((".", "/", "~")):
        return path
    config, revision, split = one.get("name"), one.get("revision"), one.get("split")
    return f"hf://{path}" + (f":{config}" if config else "") + (f"@{revision}" if revision else "") + (f"#{split}" if split else "")


def _row_format(one: Mapping[str, Any], key: str, made: Translation) -> None:
    kind = one.get("type", "")
    known = FORMATS.get(str(kind).partition(":")[0].partition(".")[0]) if isinstance(kind, str) else None
    if known and key == "datasets":
        made.put("data.format", known)
    elif not known:
        why = OTHER_ROWS.get(str(kind).partition(".")[0], "they are alpaca, messages, prompt_completion")
        made.left_out[f"{key}[0].type"] = f"no rows of type {kind!r} here: {why}"
    if one.get("field_messages") not in (None, "messages"):
        made.left_out[f"{key}[0].field_messages"] = "the column is called `messages` here: rename it in the file"


def _steps(given: Mapping[str, Any], made: Translation) -> None:
    """Steps given as shares of the run, or warm-up given in steps: ours are the other way round."""
    warm, total = given.get("warmup_steps"), given.get("max_steps")
    if warm is not None and float(warm) == 0:
        made.put("train.warmup", 0.0)
    elif warm and total:
        made.put("train.warmup", min(1.0, float(warm) / int(total)))
    elif warm:
        made.left_out["warmup_steps"] = "warm-up is a share of all steps here: set train.warmup (default 0.1)"
    for key, place in (("eval_steps", "train.evaluate_every"), ("save_steps", "train.checkpoint_every")):
        value = given.get(key)
        if value and float(value) < 1:
            made.recipe.get("train", {}).pop(place.partition(".")[2], None)
            made.left_out[key] = f"a share of the run; {place} is a number of steps"
    if made.has("train.patience") and not made.has("data.validation"):
        made.recipe["train"].pop("patience")
        made.left_out["early_stopping_patience"] = "it needs data.validation and train.evaluate_every"
    if made.has("train.evaluate_every") and not made.has("data.validation"):
        made.recipe["train"].pop("evaluate_every")
        made.left_out["eval_steps"] = "it needs held-out rows: set data.validation to a file of them"


def _whole(given: Mapping[str, Any], made: Translation) -> None:
    """Counts that a file may give as 'auto' or as a part of one."""
    for key, place in (("num_epochs", "epochs"), ("gradient_accumulation_steps", "accumulate"), ("micro_batch_size", "batch")):
        value = given.get(key)
        if value is None:
            continue
        try:
            count = max(1, round(float(value)))
        except ValueError:
            made.recipe["train"].pop(place)
            made.left_out[key] = f"{value!r} is no number: set train.{place}"
            continue
        made.put(f"train.{place}", count)
        if count != float(value):
            made.left_out[key] = f"{value} is no whole number: train.{place} is {count}"
    if given.get("max_steps"):
        made.put("train.max_steps", int(given["max_steps"]))


def _trackers(given: Mapping[str, Any], made: Translation) -> None:
    """Which trackers there are is the recipe's; where each keeps what it gets is not."""
    named = {"use_tensorboard": "tensorboard", "wandb_project": "wandb", "mlflow_tracking_uri": "mlflow"}
    found = {key: tracker for key, tracker in named.items() if given.get(key)}
    if found:
        made.put("train.trackers", list(found.values()))
    for key, tracker in found.items():
        if key != "use_tensorboard":
            made.left_out[key] = f"train.trackers holds {tracker}; the value itself is set in the environment, as {key.upper()}"


def as_yaml(made: Translation) -> str:
    """The recipe's text; what was left out stands above it as comments."""
    notes = [f"# left out: {key}: {why}" for key, why in made.left_out.items()]
    body = yaml.safe_dump(made.recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return "\n".join([*notes, body])
