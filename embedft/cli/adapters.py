"""`embedft adapters …`: the store, and what may be done with an adapter in it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.cli.options import command, positive, put_to_use, store_of, store_option
from embedft.cli.show import show, show_table
from embedft.errors import UsageError

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore


def add_commands(commands: Any) -> None:
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
        action = command(actions, name, run, help)
        store_option(action)
        if name in {"show", "verify", "export", "remove", "push", "convert", "merge"}:
            folder_too = "a name in the store, or an adapter folder" if name in {"verify", "convert", "merge"} else None
            action.add_argument("adapter", metavar="NAME", help=folder_too)
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
            action.add_argument("--to", choices=("lora",), default="lora", help="the method of the copy")
            action.add_argument("--rank", type=positive, help="default: what an exact copy needs, at most 64")
            action.add_argument("--name", help="the name to store it under (default: NAME-lora)")
        if name == "combine":
            action.add_argument("name", metavar="NAME", help="the name to store it under")
            action.add_argument("parts", metavar="ADAPTER", nargs="+")
            action.add_argument("--weights", type=float, nargs="+", metavar="W", help="default: equal parts of 1; for ties 1 each")
            ways = "cat (exact; the default), svd, linear, ties, dare_linear, dare_ties; the last three with _svd: of the updates"
            action.add_argument("--how", default="cat", help=ways)
            action.add_argument("--rank", type=positive, help="of what ends in svd (default: the largest of the parts)")
            action.add_argument("--density", type=float, help="the share that ties and dare keep (default: 0.5)")
            action.add_argument("--seed", type=int, default=7, help="of what dare keeps (default: %(default)s)")
        if name in {"export", "push"}:
            action.add_argument("--keep-texts", action="store_true", help="also copy evaluation texts, where the adapter carries them")


def _adapters_list(arguments: argparse.Namespace) -> None:
    store = store_of(arguments)
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
        print(json.dumps({"adapters": rows, "damaged": damaged, "held": store.all_held()}))
        return
    if rows:
        show_table(rows)
    for name, identity in store.all_held().items():
        print(
            f"held back from {name}: {identity[:12]}, which forgets too much: train-embed --force takes it, adapters remove {name} drops it"
        )
    if not rows and not store.all_held():
        print(f"no adapters in {store.root}; train one: embedft recipes list")


def _adapters_show(arguments: argparse.Namespace) -> None:
    from embedft.convert import MAX_RANK
    from embedft.methods.table import METHODS

    store = store_of(arguments)

    passport = store.passport(arguments.adapter)
    row = METHODS.get(passport.method)
    remedy = f"after: embedft adapters convert {arguments.adapter} --to lora" if row and row.to_lora != "no" else "no"
    served = "yes" if passport.r <= MAX_RANK else f"yes, with max_lora_rank of {passport.r} or more in the server's config"
    engines = {"peft": "yes" if row else "no", "vllm": served if row and row.vllm else remedy}
    content = {"path": str(store.folder(arguments.adapter)), "history": store.history(arguments.adapter), "served by": engines}
    show(arguments, {**content, **passport.model_dump(mode="json", by_alias=True)}, title=arguments.adapter)


def _adapters_verify(arguments: argparse.Namespace) -> int:
    from embedft.adapters.store import adapter_folder
    from embedft.verify import refused_here, verify

    folder = adapter_folder(arguments.adapter, store_of(arguments))
    report = verify(folder, base=arguments.base)
    served = {"served here": refused_here(folder, base=arguments.base) or "yes"} if report.passed else {}
    show(arguments, dataclasses.asdict(report) | served, title=arguments.adapter)
    return 0 if report.passed else 1


def _adapters_import(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import import_folder

    store = store_of(arguments)
    if arguments.base:
        if not (arguments.name and arguments.task):
            raise UsageError("an adapter without passport needs --name and --task beside --base")
        from serve.proving import import_unproven

        identity = import_unproven(store, Path(arguments.source), name=arguments.name, base=arguments.base, task=arguments.task)
    else:
        identity = import_folder(store, Path(arguments.source), name=arguments.name)
    show(arguments, {"generation": identity}, title="imported")
    _tell_of_server(arguments, store, arguments.name or store.passport(identity).name)


def _tell_of_server(arguments: argparse.Namespace, store: "AdapterStore", name: str) -> None:
    if store.used and not arguments.json:
        print(put_to_use(name))


def _adapters_export(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import export_folder

    left_out = export_folder(store_of(arguments), arguments.adapter, Path(arguments.place), keep_texts=arguments.keep_texts)
    show(arguments, {"path": arguments.place, "left out": left_out}, title="exported")


def _adapters_remove(arguments: argparse.Namespace) -> None:
    store = store_of(arguments)
    store.remove(arguments.adapter)
    deleted = store.collect()
    held = f"the adapters' files, while a server uses this store: it serves until its end or DELETE /v1/adapters/{arguments.adapter}"
    kept = {"kept": f"{held}; the next removal without one deletes them"} if store.used else {}
    show(arguments, {"removed": arguments.adapter, "deleted": deleted, **kept}, title="removed")


def _adapters_push(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import push

    generation, left_out = push(store_of(arguments), arguments.adapter, arguments.place, keep_texts=arguments.keep_texts)
    show(arguments, {"generation": generation, "place": arguments.place, "left out": left_out}, title="pushed")


def _adapters_pull(arguments: argparse.Namespace) -> None:
    from embedft.adapters.transfer import pull

    store = store_of(arguments)
    name, identity = pull(store, arguments.source, name=arguments.name)
    show(arguments, {"name": name, "generation": identity}, title="pulled")
    _tell_of_server(arguments, store, name)


def _adapters_convert(arguments: argparse.Namespace) -> None:
    from embedft.adapters.store import adapter_folder
    from embedft.convert import convert

    store, name = store_of(arguments), arguments.name or f"{Path(arguments.adapter).name}-{arguments.to}"
    with store.stage() as stage:
        made = convert(adapter_folder(arguments.adapter, store), stage, name=name, base=arguments.base, rank=arguments.rank)
        identity = store.put(stage, name)
    shown: dict[str, Any] = {"name": name, "generation": identity, "exact": made.exact, **dataclasses.asdict(made)}
    if not arguments.json:  # a figure for each of hundreds of layers is for machines
        shown["layers"] = len(made.layers)
    show(arguments, shown, title="converted")


def _adapters_merge(arguments: argparse.Namespace) -> None:
    from embedft.adapters.store import adapter_folder
    from embedft.merge import merge

    folder = adapter_folder(arguments.adapter, store_of(arguments))
    made = merge(folder, Path(arguments.place), scheme=arguments.scheme, base=arguments.base)
    shown = {name: value for name, value in dataclasses.asdict(made).items() if value is not None}
    show(arguments, shown, title="merged")


def _adapters_combine(arguments: argparse.Namespace) -> None:
    from embedft.merge import combine

    store = store_of(arguments)
    weights = arguments.weights or [1 if "ties" in arguments.how else 1 / len(arguments.parts)] * len(arguments.parts)
    options = {name: getattr(arguments, name) for name in ("how", "rank", "density", "seed", "base")}
    with store.stage() as stage:
        passport = combine([store.folder(part) for part in arguments.parts], stage, name=arguments.name, weights=weights, **options)
        identity = store.put(stage, arguments.name)
    show(arguments, {"name": arguments.name, "generation": identity, "r": passport.r}, title="combined")
