"""`embedft train-embed|train-lm|plan|eval|quantize`: an adapter, from its recipe to its figures."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from embedft.cli.options import command, put_to_use, store_of, store_option
from embedft.cli.show import Progress, show, show_scores, show_table
from embedft.errors import DataError, UsageError


def add_commands(commands: Any) -> None:
    for name, task in (("train-embed", "embedding"), ("train-lm", "causal_lm")):
        made = command(
            commands, name, _train, f"train an adapter for {'a retrieval' if task == 'embedding' else 'a causal language'} model"
        )
        made.set_defaults(task=task)
        made.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped recipe")
        made.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the recipe, dotted: train.lr=1e-4")
        made.add_argument("--dry-run", action="store_true", help="one real step; prints time, peak memory and trainable parameters")
        made.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        if task == "embedding":
            made.add_argument("--force", action="store_true", help="take the adapter even if it forgets more than eval.guard allows")
        store_option(made)
    made = command(commands, "plan", _plan, "parameters, peak memory by part and time of a run, before it runs")
    made.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped recipe")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the recipe, dotted: train.batch=8")
    made = command(commands, "eval", _eval, "score an adapter against its base on a data set")
    made.add_argument("adapter", metavar="ADAPTER", help="a name in the store, or an adapter folder")
    made.add_argument("--data", metavar="DATA", required=True, help="a BEIR folder, or a file of rows")
    made.add_argument("--base", metavar="FOLDER", help="the base, where it was trained on a folder of yours")
    made.add_argument("--against", metavar="ADAPTER", help="another embedding adapter, on the same queries")
    made.add_argument("--mteb", action="store_true", help="MTEB's own evaluator scores it too")
    store_option(made)
    made = command(commands, "quantize", _quantize, "write a quantized base folder that trainer and engine both load")
    made.add_argument("base", metavar="BASE", help="minilm, seed-lm, a model folder or a hub id")
    made.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    made.add_argument("--scheme", choices=("nf4", "int8", "w4a16", "w8a8"), required=True, help="how its weights are written")
    made.add_argument(
        "--calibrate", type=Path, metavar="TEXTS", help="w4a16 by GPTQ: a file of texts such as the model will see, one a line"
    )
    made.add_argument("--revision", help="of a hub id")


def _train(arguments: argparse.Namespace) -> int:
    from embedft.recipe_file import data_note, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.task != arguments.task:
        other = "train-lm" if recipe.task == "causal_lm" else "train-embed"
        raise UsageError(f"{arguments.recipe} has task: {recipe.task}; use embedft {other}")
    try:
        outcome = _trained(recipe, arguments)
    except DataError as error:
        own = any(part.partition("=")[0] in {"data", "data.train"} for part in arguments.overrides)
        if not own and (note := data_note(arguments.recipe)):
            raise DataError([*error.problems, f"{arguments.recipe}'s data: {note}"]) from None
        raise
    from embedft.training.measure import DryRunReport
    from embedft.verify import refused_here

    if isinstance(outcome, DryRunReport):
        show(arguments, dataclasses.asdict(outcome), title=f"one step of {outcome.name}")
        return 0
    reason = refused_here(Path(outcome.path), base=recipe.base.model)
    if arguments.json:
        print(json.dumps(outcome.as_json() | {"served here": reason or "yes"}))
        return 0
    show_scores(outcome.metrics, title=f"{outcome.name}@{outcome.generation[:12]}")
    print(f"trained in {outcome.seconds:.0f} s, {outcome.trainable:,} parameters, {outcome.peak_bytes / 2**20:.0f} MiB at the peak")
    print(f"stored in {outcome.path}")
    if reason:
        print(f"this machine's engines may refuse it: {reason}")
    elif store_of(arguments).used:
        print(put_to_use(outcome.name))
    else:
        print("serve it with: embedft serve")
    return 0


def _trained(recipe: Any, arguments: argparse.Namespace) -> Any:
    options: dict[str, Any] = {"resume": arguments.resume, "dry_run": arguments.dry_run, "progress": not arguments.json}
    if recipe.task == "embedding":
        from embedft.embedding.train import train as train_embedding

        options["encoded"] = None if arguments.json else Progress()
        return train_embedding(recipe, store=store_of(arguments), force=arguments.force, **options)
    from embedft.causal_lm.train import train as train_causal_lm

    return train_causal_lm(recipe, store=store_of(arguments), **options)


def _plan(arguments: argparse.Namespace) -> int:
    from embedft.plan import plan
    from embedft.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.task == "embedding":
        from embedft.embedding.sizes import batch_for

        made = plan(recipe, batch_for(recipe))
    else:
        from embedft.causal_lm.sizes import batch_for as rows_for

        made = plan(recipe, rows_for(recipe))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(made)))
    else:
        print(f"{made.name}: {made.trainable:,} of {made.parameters:,} parameters train ({made.trainable_percent:.2f} %)")
        show_table([{"memory": part, "MiB": f"{size / 2**20:,.1f}"} for part, size in made.memory.items()])
        if made.steps is None or made.seconds is None:
            assumed = f"{recipe.data.train} is not there yet: every text is taken to have train.max_length={recipe.train.max_length} tokens"
            print(f"about {made.seconds_per_step:.2g} s a step; {assumed}, and how many steps there are is not known")
        else:
            print(f"about {made.seconds_per_step:.2g} s a step, {made.steps} steps: {made.seconds / 60:.1f} min (training alone)")
        if not made.fits:
            print(f"only {made.available_bytes / 2**20:,.0f} MiB are free here: {made.advice}")
    return 0 if made.fits else 1


def _eval(arguments: argparse.Namespace) -> None:
    from embedft.adapters.passport import read_passport
    from embedft.adapters.store import adapter_folder

    store = store_of(arguments)
    folder = adapter_folder(arguments.adapter, store)
    if read_passport(folder).task == "embedding":
        from embedft.embedding.proof import evaluate_adapter as evaluate_embedding

        options: dict[str, Any] = {"against": arguments.against, "mteb": arguments.mteb}
        options["progress"] = None if arguments.json else Progress()
        metrics = evaluate_embedding(folder, arguments.data, store, base=arguments.base, **options)
    else:
        from embedft.causal_lm.evaluate import evaluate_adapter as evaluate_language

        if arguments.against or arguments.mteb:
            raise UsageError(f"{arguments.adapter} is a language model's adapter: --against and --mteb are for embedding adapters")
        metrics = evaluate_language(folder, arguments.data, store, base=arguments.base)
    if arguments.json:
        print(json.dumps(metrics))
    else:
        show_scores(metrics, title=arguments.adapter)


def _quantize(arguments: argparse.Namespace) -> None:
    from embedft.base import BaseSpec, source_folder
    from embedft.model_folder import describe
    from embedft.quantize import experts_share, quantize

    source = source_folder(BaseSpec(arguments.base, revision=arguments.revision))
    folder = quantize(source, arguments.out, scheme=arguments.scheme, calibration=arguments.calibrate)
    info = describe(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shown: dict[str, Any] = {"path": str(folder), "fingerprint": info.fingerprint, "parent": info.parent, "bytes": size}
    if share := experts_share(folder):
        shown["in full precision"] = f"its experts, {share:.0%} of the bytes: no scheme here packs them"
    show(arguments, shown, title="quantized")
