"""The command line: parses, calls, prints. Everything heavy is imported inside the functions that need it.

Exit status: 0 done, 1 it failed and says what to do, 2 wrong usage. `--json` prints one object; otherwise a table for people.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.errors import EmbedftError, UsageError

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = parse(argv)
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    try:
        return arguments.run(arguments) or 0
    except EmbedftError as error:
        if arguments.json:
            print(json.dumps({"error": {"code": error.code, "message": str(error)}}))
        print(f"embedft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("embedft: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away: `embedft … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or exit 2. argparse takes no positional after an option; key=value may stand anywhere."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest:
        settings = [part for part in rest if "=" in part and not part.startswith("-")]
        if settings != rest or "overrides" not in arguments:
            _parser().error(f"unrecognized arguments: {' '.join(part for part in rest if part not in settings) or ' '.join(rest)}")
        arguments.overrides += settings
    return arguments


def _parser() -> argparse.ArgumentParser:
    from embedft import __version__

    parser = argparse.ArgumentParser(
        prog="embedft", description="Train adapters for embedding and language models, prove that they help, serve many over one base."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, task in (("train-embed", "embedding"), ("train-lm", "causal_lm")):
        command = _command(
            commands, name, _train, f"train an adapter for {'a retrieval' if task == 'embedding' else 'a causal language'} model"
        )
        command.set_defaults(task=task)
        command.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped recipe")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the recipe, dotted: train.lr=1e-4")
        command.add_argument("--dry-run", action="store_true", help="one real step; prints time, peak memory and trainable parameters")
        command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        if task == "embedding":
            command.add_argument("--force", action="store_true", help="take the adapter even if it forgets more than eval.guard allows")
        _store_option(command)
    command = _command(commands, "plan", _plan, "parameters, peak memory by part and time of a run, before it runs")
    command.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped recipe")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the recipe, dotted: train.batch=8")
    command = _command(commands, "eval", _eval, "score an adapter against its base on a data set")
    command.add_argument("adapter", metavar="ADAPTER", help="a name in the store, or an adapter folder")
    command.add_argument("--data", metavar="DATA", required=True, help="a BEIR folder, or a file of rows")
    command.add_argument("--base", metavar="FOLDER", help="the base, where it was trained on a folder of yours")
    command.add_argument("--against", metavar="ADAPTER", help="another embedding adapter, on the same queries")
    command.add_argument("--mteb", action="store_true", help="MTEB's own evaluator scores it too")
    _store_option(command)
    _adapters(commands)
    _recipes(commands)
    _data(commands)
    command = _command(commands, "quantize", _quantize, "write a quantized base folder that trainer and engine both load")
    command.add_argument("base", metavar="BASE", help="minilm, seed-lm, a model folder or a hub id")
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--scheme", choices=("nf4", "int8", "w4a16", "w8a8"), required=True)
    command.add_argument(
        "--calibrate", type=Path, metavar="TEXTS", help="w4a16 by GPTQ: a file of texts such as the model will see, one a line"
    )
    command.add_argument("--revision")
    _serve(commands)
    _rag(commands)
    command = _command(commands, "demo", _demo, "train four adapters, serve them over two quantized bases, compare")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    command.add_argument("--engine", choices=("vllm", "peft"), help="default: vllm where it is installed")
    command.add_argument("--quick", action="store_true", help="every step, on a fraction of the data")
    _command(commands, "doctor", _doctor, "what is installed, what works, and how to mend what does not")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    command.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    command.set_defaults(run=run)
    return command


def _store_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--adapters", type=Path, metavar="DIR", help="the adapter store (default: $EMBEDFT_ADAPTERS, or adapters/)")


def _adapters(commands: Any) -> None:
    group = commands.add_parser("adapters", help="list, inspect, verify and move adapters")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    for name, run, help in (
        ("list", _adapters_list, "the adapters in the store"),
        ("show", _adapters_show, "one adapter's passport and history"),
        ("verify", _adapters_verify, "replay an adapter's probes on a freshly loaded base"),
        ("import", _adapters_import, "copy an adapter folder into the store"),
        ("export", _adapters_export, "copy an adapter out of the store"),
        ("remove", _adapters_remove, "forget a name, and delete what nothing names any more"),
        ("push", _adapters_push, "upload an adapter to a folder, the hub or any fsspec URL"),
        ("pull", _adapters_pull, "download an adapter from where push put it"),
        ("convert", _adapters_convert, "turn an adapter of any method into plain LoRA, with a certificate of the error"),
        ("merge", _adapters_merge, "write base and adapter as one model folder, quantized if asked for"),
        ("combine", _adapters_combine, "make one adapter of the weighted sum of several"),
    ):
        action = _command(actions, name, run, help)
        _store_option(action)
        if name in {"show", "verify", "export", "remove", "push", "convert", "merge"}:
            action.add_argument("adapter", metavar="NAME")
        if name == "verify":
            action.add_argument("--base", metavar="FOLDER", help="the base, where it was trained on a folder of yours")
        if name in {"import", "pull"}:
            action.add_argument("source", metavar="FOLDER" if name == "import" else "PLACE")
            action.add_argument("--name", help="the name to store it under (default: its own)")
        if name == "import":
            action.add_argument("--base", metavar="BASE", help="of an adapter without passport: plain PEFT makes its probes over this base")
            action.add_argument("--task", choices=("embedding", "causal_lm"), help="what that base is for")
        if name in {"export", "push", "merge"}:
            action.add_argument("place", metavar="PLACE" if name == "push" else "OUT")
        if name in {"convert", "merge", "combine"}:
            action.add_argument(
                "--base", type=Path, metavar="FOLDER", help="the base's folder, where the passport's name does not lead to it"
            )
        if name == "merge":
            action.add_argument("--scheme", choices=("nf4", "int8", "w4a16", "w8a8"), help="quantize the result")
        if name == "convert":
            action.add_argument("--to", choices=("lora",), default="lora")
            action.add_argument("--rank", type=int, help="default: what an exact copy needs, at most 64")
            action.add_argument("--name", help="the name to store it under (default: NAME-lora)")
        if name == "combine":
            action.add_argument("name", metavar="NAME", help="the name to store it under")
            action.add_argument("parts", metavar="ADAPTER", nargs="+")
            action.add_argument("--weights", type=float, nargs="+", metavar="W", help="default: equal parts of 1")
            action.add_argument("--how", default="cat", choices=("cat", "svd", "linear", "ties", "dare_linear", "dare_ties"))
            action.add_argument("--rank", type=int, help="of svd (default: the largest of the parts)")
            action.add_argument("--density", type=float, default=0.5, help="what ties and dare keep")
        if name == "export":
            action.add_argument("--keep-texts", action="store_true", help="also copy evaluation texts, where the adapter carries them")


def _recipes(commands: Any) -> None:
    group = commands.add_parser("recipes", help="list, show and copy the shipped recipes")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    _command(actions, "list", _recipes_list, "the recipes that come with embedft")
    show = _command(actions, "show", _recipes_show, "print a recipe with every default written out")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("overrides", metavar="key=value", nargs="*")
    importing = _command(actions, "import", _recipes_import, "translate an Axolotl YAML, and list what has no place here")
    importing.add_argument("file", metavar="AXOLOTL", type=Path)
    importing.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the recipe's file (default: printed)")
    copy = _command(actions, "copy", _recipes_copy, "copy a shipped recipe to a file of your own")
    copy.add_argument("recipe", metavar="RECIPE")
    copy.add_argument("out", metavar="OUT", type=Path)


def _data(commands: Any) -> None:
    group = commands.add_parser("data", help="make, check and mine data sets")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    pydocs = _command(actions, "pydocs", _data_pydocs, "make retrieval and language-model tasks from the Python packages installed here")
    pydocs.add_argument("out", metavar="OUT", type=Path)
    pydocs.add_argument("--limit", type=int, help="at most so many rows a task")

    check = _command(actions, "check", _data_check, "what is wrong with retrieval data, with examples; exit 1 where something is")
    check.add_argument("data", metavar="DATA", help="a file of rows, or a BEIR folder (its train split)")
    check.add_argument("--eval", metavar="DATA", help="evaluation data that training must not know (default: a BEIR folder's test split)")
    check.add_argument("--max-length", type=int, default=256, help="tokens that the model reads")
    check.add_argument("--base", default="minilm", help="whose tokenizer counts")
    check.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned copy")
    mine = _command(actions, "mine", _data_mine, "add hard negatives to training pairs")
    synth = _command(actions, "synth", _data_synth, "make training queries for a bare corpus")
    for command, what in (
        (mine, "a file of pairs, or a BEIR folder"),
        (synth, "a BEIR folder, rows with a column text, or .md and .txt files"),
    ):
        command.add_argument("data", metavar="DATA", help=what)
        command.add_argument("out", metavar="OUT", type=Path, help="a new .jsonl file")
        command.add_argument("--base", default="minilm", help="the model that ranks" + ("" if command is mine else "; bm25: none"))
        command.add_argument("--quantization", choices=("none", "int8", "nf4"), default="none")
        command.add_argument("--max-length", type=int, default=256)
        command.add_argument("--seed", type=int, default=7)
    mine.add_argument("--adapter", metavar="NAME", help="also rank with this adapter, on the base that it was trained on")
    mine.add_argument("--negatives", type=int, default=4)
    mine.add_argument("--depth", type=int, default=50, help="candidates a ranker")
    mine.add_argument("--absolute", type=float, default=0.0, help="a negative's cosine stays so far below the answer's")
    mine.add_argument("--relative", type=float, default=0.05, help="and below this share of it")
    mine.add_argument("--cross-encoder", metavar="DIR", help="strike what it scores as high as the answer, and write its scores")
    mine.add_argument("--review", type=Path, metavar="OUT", help="where doubtful labels go (default: OUT's name with .review.jsonl)")
    _store_option(mine)
    synth.add_argument("--generator", default="text", metavar="URL", help="an OpenAI-compatible server, up to /v1 (default: no model)")
    synth.add_argument("--model", default="", help="the server's model")
    synth.add_argument("--prompt", type=Path, metavar="FILE", help="a prompt with {passage} and {count} in it")
    synth.add_argument("--count", type=int, default=2, help="queries a passage")
    synth.add_argument("--limit", type=int, help="so many passages")
    synth.add_argument("--top", type=int, default=10, help="a query must rank its passage so high to be kept")


def _serve(commands: Any) -> None:
    serve = _command(commands, "serve", _run_server, "serve adapters over their bases, chosen per request by adapter=")
    serve.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="a YAML file; without one, the bases that the store's adapters need"
    )
    serve.add_argument("--engine", choices=("vllm", "peft", "fake"), help="default: vllm where it is installed, else peft")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument(
        "--indexes", type=Path, metavar="DIR", help="a folder of RAG indexes to answer from (embedft rag index --out DIR/NAME)"
    )
    serve.add_argument("--keys", type=Path, metavar="FILE", help="the tenants' keys file (embedft key TENANT)")
    _store_option(serve)
    key = _command(commands, "key", _new_key, "make a tenant's API key, and the entry for the server's keys file")
    key.add_argument("tenant", metavar="TENANT")
    key.add_argument("--admin", action="store_true", help="may change what is served, and sees everything")
    key.add_argument("--use", metavar="NAME", action="append", default=[], help="an adapter it may use, or a pattern; repeatable")


def _rag(commands: Any) -> None:
    from embedft.rag.command import add_commands

    group = commands.add_parser("rag", help="question answering over documents: index, ask, eval")
    add_commands(group.add_subparsers(metavar="ACTION", required=True), _command)


def _train(arguments: argparse.Namespace) -> int:
    from embedft.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.task != arguments.task:
        other = "train-lm" if recipe.task == "causal_lm" else "train-embed"
        raise UsageError(f"{arguments.recipe} has task: {recipe.task}; use embedft {other}")
    options = {"resume": arguments.resume, "dry_run": arguments.dry_run, "progress": not arguments.json}
    if recipe.task == "embedding":
        from embedft.embedding.train import train as train_embedding

        outcome = train_embedding(recipe, store=_store(arguments), force=arguments.force, **options)
    else:
        from embedft.causal_lm.train import train as train_causal_lm

        outcome = train_causal_lm(recipe, store=_store(arguments), **options)
    from embedft.training.measure import DryRunReport

    if isinstance(outcome, DryRunReport):
        _print(arguments, dataclasses.asdict(outcome), title=f"one step of {outcome.name}")
        return 0
    if arguments.json:
        print(json.dumps(outcome.as_json()))
        return 0
    _scores(outcome.metrics, title=f"{outcome.name}@{outcome.generation[:12]}")
    print(f"trained in {outcome.seconds:.0f} s, {outcome.trainable:,} parameters, {outcome.peak_bytes / 2**20:.0f} MiB at the peak")
    print(f"stored in {outcome.path}\nserve it with: embedft serve")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from embedft.plan import plan
    from embedft.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.task == "embedding":
        from embedft.embedding.sizes import largest_batch as largest

        made = plan(recipe, largest(recipe))
    else:
        from embedft.causal_lm.sizes import largest_batch

        made = plan(recipe, largest_batch(recipe))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(made)))
    else:
        print(f"{made.name}: {made.trainable:,} of {made.parameters:,} parameters train ({made.trainable_percent:.2f} %)")
        _table([{"memory": part, "MiB": f"{size / 2**20:,.1f}"} for part, size in made.memory.items()])
        print(f"about {made.seconds_per_step:.2g} s a step, {made.steps} steps: {made.seconds / 60:.1f} min (training alone)")
        if not made.fits:
            print(f"only {made.available_bytes / 2**20:,.0f} MiB are free here: {made.advice}")
    return 0 if made.fits else 1


def _eval(arguments: argparse.Namespace) -> None:
    from embedft.adapters.passport import read_passport

    store = _store(arguments)
    given = Path(arguments.adapter)
    folder = given if given.is_dir() else store.folder(arguments.adapter)
    if read_passport(folder).task == "embedding":
        from embedft.embedding.proof import evaluate_adapter as evaluate_embedding

        options = {"against": arguments.against, "mteb": arguments.mteb}
        metrics = evaluate_embedding(folder, arguments.data, store, base=arguments.base, **options)
    else:
        from embedft.causal_lm.evaluate import evaluate_adapter as evaluate_language

        if arguments.against or arguments.mteb:
            raise UsageError(f"{arguments.adapter} is a language model's adapter: --against and --mteb are for embedding adapters")
        metrics = evaluate_language(folder, arguments.data, store, base=arguments.base)
    if arguments.json:
        print(json.dumps(metrics))
    else:
        _scores(metrics, title=arguments.adapter)


def _adapters_list(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    rows: list[dict[str, Any]] = []
    for name, identity in store.names().items():
        passport = store.passport(name)
        base = f"{passport.base.model} ({passport.base.quantization})"
        proof = "unproven" if passport.unproven else "probes" if passport.probes else "none"
        rows.append(
            {"name": name, "generation": identity[:12], "task": passport.task, "method": passport.method, "base": base, "proof": proof}
        )
    damaged = store.damaged()
    for reason in damaged.values():
        print(f"embedft: {reason}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"adapters": rows, "damaged": damaged}))
    elif rows:
        _table(rows)
    else:
        print(f"no adapters in {store.root}; train one: embedft recipes list")


def _adapters_show(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    from embedft.methods.table import METHODS

    passport = store.passport(arguments.adapter)
    row = METHODS.get(passport.method)
    remedy = f"after: embedft adapters convert {arguments.adapter} --to lora" if row and row.to_lora != "no" else "no"
    engines = {"peft": "yes" if row else "no", "vllm": "yes" if row and row.vllm else remedy}
    content = {"path": str(store.folder(arguments.adapter)), "history": store.history(arguments.adapter), "served by": engines}
    _print(arguments, {**content, **passport.model_dump(mode="json", by_alias=True)}, title=arguments.adapter)


def _adapters_verify(arguments: argparse.Namespace) -> int:
    from embedft.verify import verify

    report = verify(_store(arguments).folder(arguments.adapter), base=arguments.base)
    _print(arguments, dataclasses.asdict(report), title=arguments.adapter)
    return 0 if report.passed else 1


def _adapters_import(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import import_folder

    store = _store(arguments)
    if arguments.base:
        if not (arguments.name and arguments.task):
            raise UsageError("an adapter without passport needs --name and --task beside --base")
        from serve.proving import import_unproven

        identity = import_unproven(store, Path(arguments.source), name=arguments.name, base=arguments.base, task=arguments.task)
    else:
        identity = import_folder(store, Path(arguments.source), name=arguments.name)
    _print(arguments, {"generation": identity}, title="imported")


def _adapters_export(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import export_folder

    left_out = export_folder(_store(arguments), arguments.adapter, Path(arguments.place), keep_texts=arguments.keep_texts)
    _print(arguments, {"path": arguments.place, "left out": left_out}, title="exported")


def _adapters_remove(arguments: argparse.Namespace) -> None:
    store = _store(arguments)
    store.remove(arguments.adapter)
    _print(arguments, {"removed": arguments.adapter, "deleted": store.collect()}, title="removed")


def _adapters_push(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import push

    _print(arguments, {"generation": push(_store(arguments), arguments.adapter, arguments.place), "place": arguments.place}, title="pushed")


def _adapters_pull(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import pull

    name, identity = pull(_store(arguments), arguments.source, name=arguments.name)
    _print(arguments, {"name": name, "generation": identity}, title="pulled")


def _adapters_convert(arguments: argparse.Namespace) -> None:
    from embedft.convert import convert

    store, name = _store(arguments), arguments.name or f"{arguments.adapter}-{arguments.to}"
    with store.stage() as stage:
        made = convert(store.folder(arguments.adapter), stage, name=name, base=arguments.base, rank=arguments.rank)
        identity = store.put(stage, name)
    _print(arguments, {"name": name, "generation": identity, "exact": made.exact, **dataclasses.asdict(made)}, title="converted")


def _adapters_merge(arguments: argparse.Namespace) -> None:
    from embedft.merge import merge

    folder = _store(arguments).folder(arguments.adapter)
    made = merge(folder, Path(arguments.place), scheme=arguments.scheme, base=arguments.base)
    _print(arguments, dataclasses.asdict(made), title="merged")


def _adapters_combine(arguments: argparse.Namespace) -> None:
    from embedft.merge import combine

    store = _store(arguments)
    weights = arguments.weights or [1 / len(arguments.parts)] * len(arguments.parts)
    options = {"how": arguments.how, "rank": arguments.rank, "density": arguments.density, "base": arguments.base}
    with store.stage() as stage:
        passport = combine([store.folder(part) for part in arguments.parts], stage, name=arguments.name, weights=weights, **options)
        identity = store.put(stage, arguments.name)
    _print(arguments, {"name": arguments.name, "generation": identity, "r": passport.r}, title="combined")


def _recipes_list(arguments: argparse.Namespace) -> None:
    from embedft.recipe import load_recipe, shipped_recipes

    rows: list[dict[str, Any]] = []
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        rows.append({"name": name, "task": recipe.task, "base": recipe.base.model, "quantization": recipe.base.quantization})
    if arguments.json:
        print(json.dumps({"recipes": rows}))
    else:
        _table(rows)


def _recipes_show(arguments: argparse.Namespace) -> None:
    from embedft.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(json.dumps(recipe.model_dump(mode="json")) if arguments.json else recipe.resolved_yaml().rstrip())


def _recipes_copy(arguments: argparse.Namespace) -> None:
    from embedft.recipe import load_recipe, shipped_recipes

    load_recipe(arguments.recipe)  # says what there is, where there is none of that name
    if arguments.out.exists():
        raise UsageError(f"{arguments.out} exists already: name a new file")
    arguments.out.write_text(shipped_recipes()[arguments.recipe].read_text(encoding="utf-8"), encoding="utf-8")
    _print(arguments, {"path": str(arguments.out)}, title="copied")


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
        _table([{"left out": key, "why": why} for key, why in made.left_out.items()] or [{"left out": "nothing"}])
    else:
        print(as_yaml(made).rstrip())


def _data_pydocs(arguments: argparse.Namespace) -> None:
    from embedft.pydocs import make_pydocs

    _print(arguments, dataclasses.asdict(make_pydocs(arguments.out, limit=arguments.limit)), title=str(arguments.out))


def _data_check(arguments: argparse.Namespace) -> int:
    from embedft.embedding.check import check

    report = check(arguments.data, eval=arguments.eval, max_length=arguments.max_length, base=arguments.base, fix=arguments.fix)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return 0 if report.clean else 1
    print(f"{report.rows:,} rows: " + ("nothing found" if report.clean else f"{len(report.findings)} kinds of fault"))
    for finding in report.findings:
        print(f"\n{finding.kind}: {finding.count:,} of {finding.of:,} {finding.says}")
        print("\n".join(f"    {example}" for example in finding.examples))
        print(f"  --fix: {finding.remedy or 'left as it is: only you can judge'}")
    if report.written:
        print(f"\nwritten: {report.written}, {report.kept:,} rows")
    return 0 if report.clean else 1


def _data_mine(arguments: argparse.Namespace) -> None:
    from embedft.embedding.mine import Mining, mine

    settings = Mining(arguments.negatives, arguments.depth, arguments.absolute, arguments.relative, arguments.seed)
    report = mine(
        arguments.data,
        arguments.out,
        mining=settings,
        base=arguments.base,
        quantization=arguments.quantization,
        adapter=arguments.adapter,
        store=_store(arguments),
        max_length=arguments.max_length,
        cross_encoder=arguments.cross_encoder,
        review=arguments.review or arguments.out.with_suffix(".review.jsonl"),
    )
    _print(arguments, dataclasses.asdict(report), title=str(arguments.out))


def _data_synth(arguments: argparse.Namespace) -> None:
    from embedft.embedding.synth import PROMPT, Synth, synthesize

    prompt = arguments.prompt.read_text(encoding="utf-8") if arguments.prompt else PROMPT
    settings = Synth(
        generator=arguments.generator,
        model=arguments.model,
        prompt=prompt,
        count=arguments.count,
        limit=arguments.limit,
        top=arguments.top,
        seed=arguments.seed,
    )
    base = None if arguments.base == "bm25" else arguments.base
    report = synthesize(
        arguments.data, arguments.out, synth=settings, base=base, quantization=arguments.quantization, max_length=arguments.max_length
    )
    _print(arguments, dataclasses.asdict(report), title=str(arguments.out))


def _quantize(arguments: argparse.Namespace) -> None:
    from embedft.base import BaseSpec, source_folder
    from embedft.model_folder import describe
    from embedft.quantize import quantize

    source = source_folder(BaseSpec(arguments.base, revision=arguments.revision))
    folder = quantize(source, arguments.out, scheme=arguments.scheme, calibration=arguments.calibrate)
    info = describe(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _print(arguments, {"path": str(folder), "fingerprint": info.fingerprint, "parent": info.parent, "bytes": size}, title="quantized")


def _run_server(arguments: argparse.Namespace) -> int:
    from serve.config import load_config
    from serve.run import run

    options = {"engine": arguments.engine, "host": arguments.host, "port": arguments.port, "indexes": arguments.indexes}
    options["keys"] = arguments.keys
    config = load_config(arguments.config, store=_store(arguments), **options)
    return run(config)


def _new_key(arguments: argparse.Namespace) -> None:
    from serve.tenants import entry_for, new_key

    key, digest = new_key()
    entry = entry_for(arguments.tenant, digest, admin=arguments.admin, adapters=arguments.use)
    if arguments.json:
        print(json.dumps({"key": key, "entry": entry}))
        return
    print(
        f"give this to {arguments.tenant}; it is shown once and kept nowhere:\n\n    {key}\n\nand this into the keys file, under tenants:\n"
    )
    print(f"  - {json.dumps(entry)}")


def _demo(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded; weights load in an instant
    from embedft.demo import demo

    report = demo(arguments.out, engine=arguments.engine, quick=arguments.quick)
    if arguments.json:
        print(json.dumps(report))


def _doctor(arguments: argparse.Namespace) -> int:
    from embedft.doctor import examine

    checks = examine()
    words = {True: "ok", None: "-", False: "FAULT"}
    if arguments.json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        _table([{"check": c.name, "": words[c.ok], "found": c.found, "mend it with": "" if c.ok else c.mend} for c in checks])
    return 1 if any(check.ok is False for check in checks) else 0


def _store(arguments: argparse.Namespace) -> "AdapterStore":
    from embedft.adapters.store import AdapterStore

    return AdapterStore(arguments.adapters)


def _print(arguments: argparse.Namespace, content: Mapping[str, Any], *, title: str) -> None:
    if arguments.json:
        print(json.dumps(dict(content), default=str))
        return
    print(title)
    width = max(len(key) for key in content)
    for key, value in content.items():
        shown = (
            f"{value:,.4g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int) and not isinstance(value, bool)
            else value
        )
        print(f"  {key:<{width}}  {json.dumps(shown, ensure_ascii=False) if isinstance(shown, dict | list) else shown}")


def _scores(metrics: Mapping[str, Any], *, title: str) -> None:
    """The quality table: one row for each side, the gain's 95 % interval, and what else the evaluation found."""
    sides = [side for side in ("base", "bm25", "adapter", "fused") if metrics.get(side)]
    rows = [{"": "bm25 + adapter" if side == "fused" else side, **{k: f"{v:.4f}" for k, v in metrics[side].items()}} for side in sides]
    print(title)
    if rows:
        _table(rows)
    if metrics.get("gain_ci95"):
        print(f"gain over the base, 95 % interval: {_verdict(metrics['gain_ci95'], 'the base')}")
    if bm25 := metrics.get("intervals", {}).get("adapter - bm25"):
        print(f"gain over BM25, 95 % interval: {_verdict(bm25, 'BM25')}")
    for name, part in metrics.get("strata", {}).items():
        scores = ", ".join(f"{side} {part[side]:.3f}" for side in ("base", "bm25", "adapter"))
        print(f"{part['queries']} queries of {name} word overlap with their documents: {scores}")
    _further(metrics)


def _further(metrics: Mapping[str, Any]) -> None:
    if index := metrics.get("index"):
        cost = f"{index['documents']:,} documents, {index['bytes'] / 2**20:.1f} MiB, {index['seconds']:.0f} s of encoding"
        kept = "an index made with it" if index["again"] else "query-only: an index of the base's vectors serves it as it is, saving"
        print(f"{kept} {'takes ' if index['again'] else ''}{cost}")
    if against := metrics.get("against"):
        score, label = against[metrics["metric"]], f"{against['name']} (side {against['side']})"
        print(f"against {label}, {score:.4f}, 95 % interval: {_verdict(against['difference_ci95'], against['name'])}")
    if mteb := metrics.get("mteb"):
        print("MTEB's own evaluator: " + ", ".join(f"{name} {value:.6f}" for name, value in mteb.items()))
    if guard := metrics.get("guard"):
        print(f"general set ({guard['data']}, {guard['queries']} queries): base {guard['base']:.4f}, adapter {guard['adapter']:.4f}")


def _verdict(interval: Sequence[float], other: str) -> str:
    low, high = interval
    verdict = f"better than {other}" if low > 0 else f"worse than {other}" if high < 0 else f"no proven difference from {other}"
    return f"{low:+.4f} … {high:+.4f}: {verdict}"


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns as wide as their widest cell; plain text, so that it pipes."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    width = {column: max(len(column), *(len(str(row.get(column, ""))) for row in rows)) for column in columns}
    print("  ".join(column.ljust(width[column]) for column in columns).rstrip())
    for row in rows:
        print("  ".join(str(row.get(column, "")).ljust(width[column]) for column in columns).rstrip())
