"""`embedft data …`: make, check and mine data sets."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from embedft.cli.options import command, finite, positive, store_of, store_option
from embedft.cli.show import Progress, show
from embedft.errors import UsageError


def add_commands(commands: Any) -> None:
    group = commands.add_parser("data", help="make, check and mine data sets")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    pydocs = command(actions, "pydocs", _data_pydocs, "make retrieval and language-model tasks from the Python packages installed here")
    pydocs.add_argument("out", metavar="OUT", type=Path)
    pydocs.add_argument("--limit", type=positive, help="at most so many rows a task")
    pydocs.add_argument(
        "--packages", nargs="+", metavar="NAME", help="import names to read, stdlib for Python's own (default: some large ones)"
    )

    check = command(actions, "check", _data_check, "what is wrong with retrieval data, with examples; exit 1 where something is")
    check.add_argument("data", metavar="DATA", help="a file of rows, or a BEIR folder (its train split)")
    check.add_argument("--eval", metavar="DATA", help="evaluation data that training must not know (default: a BEIR folder's test split)")
    check.add_argument("--max-length", type=positive, help="tokens that the model will read: train.max_length, and its default")
    check.add_argument("--base", default="minilm", help="whose tokenizer counts")
    check.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned copy: a .jsonl or .jsonl.gz file, a folder of a folder")
    mine = command(actions, "mine", _data_mine, "add hard negatives to training pairs")
    synth = command(actions, "synth", _data_synth, "make training queries for a bare corpus")
    for made, what in (
        (mine, "a file of pairs, or a BEIR folder"),
        (synth, "a BEIR folder, rows with a column text, or .md and .txt files"),
    ):
        made.add_argument("data", metavar="DATA", help=what)
        made.add_argument("out", metavar="OUT", type=Path, help="a new .jsonl or .jsonl.gz file")
        if made is mine:
            made.add_argument("--base", help="the model that ranks (default: minilm, or the adapter's own)")
        else:
            made.add_argument("--base", default="minilm", help="the model that ranks; bm25: none")
        made.add_argument("--quantization", choices=("none", "int8", "nf4"), default="none", help="of that model")
        made.add_argument("--max-length", type=positive, default=256, help="tokens of a text that it reads, if it reads so many")
        made.add_argument("--seed", type=int, default=7, help="of what is left to chance")
    mine.add_argument("--adapter", metavar="NAME", help="also rank with this adapter, on the base that it was trained on")
    mine.add_argument("--negatives", type=positive, default=4, help="added to each pair")
    mine.add_argument("--depth", type=positive, default=50, help="candidates a ranker")
    mine.add_argument("--absolute", type=finite, default=0.0, help="a negative's cosine stays so far below the answer's")
    mine.add_argument("--relative", type=finite, default=0.05, help="and below this share of it")
    mine.add_argument("--cross-encoder", metavar="DIR", help="strike what it scores as high as the answer, and write its scores")
    mine.add_argument("--review", type=Path, metavar="OUT", help="where doubtful labels go (default: OUT's name with .review.jsonl)")
    store_option(mine)
    synth.add_argument("--generator", default="text", metavar="URL", help="an OpenAI-compatible server, up to /v1 (default: no model)")
    synth.add_argument("--model", default="", help="the server's model")
    synth.add_argument("--prompt", type=Path, metavar="FILE", help="a prompt with {passage} and {count} in it")
    synth.add_argument("--count", type=positive, default=2, help="queries a passage")
    synth.add_argument("--limit", type=positive, help="so many passages, drawn from the whole corpus by the hash of their ids")
    synth.add_argument("--top", type=positive, default=10, help="a query must rank its passage so high to be kept")


def _data_pydocs(arguments: argparse.Namespace) -> None:
    from embedft.pydocs import make_pydocs

    show(
        arguments,
        dataclasses.asdict(make_pydocs(arguments.out, limit=arguments.limit, packages=arguments.packages)),
        title=str(arguments.out),
    )


def _data_check(arguments: argparse.Namespace) -> int:
    from embedft.embedding.check import MAX_LENGTH, check

    report = check(
        arguments.data, eval=arguments.eval, max_length=arguments.max_length or MAX_LENGTH, base=arguments.base, fix=arguments.fix
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return 0 if report.clean else 1
    count = len(report.findings)
    print(f"{report.rows:,} rows: " + ("nothing found" if report.clean else f"{count} kind{'' if count == 1 else 's'} of fault"))
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
        store=store_of(arguments),
        max_length=arguments.max_length,
        cross_encoder=arguments.cross_encoder,
        encoded=None if arguments.json else Progress(),
        review=arguments.review or arguments.out.with_name(re.sub(r"\.jsonl(\.gz)?$", "", arguments.out.name) + ".review.jsonl"),
    )
    show(arguments, dataclasses.asdict(report), title=str(arguments.out))


def _data_synth(arguments: argparse.Namespace) -> None:
    from embedft.embedding.synth import PROMPT, Synth, synthesize

    try:
        prompt = arguments.prompt.read_text(encoding="utf-8") if arguments.prompt else PROMPT
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt {arguments.prompt}: cannot be read as UTF-8 text: {error}") from None
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
        arguments.data,
        arguments.out,
        synth=settings,
        base=base,
        quantization=arguments.quantization,
        max_length=arguments.max_length,
        asked=None if arguments.json or arguments.generator == "text" else Progress("passages asked about"),
        encoded=None if arguments.json else Progress(),
    )
    show(arguments, dataclasses.asdict(report), title=str(arguments.out))
