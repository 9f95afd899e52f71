"""`embedft demo` and `embedft doctor`: the whole line, and what this machine can do of it."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from embedft.cli.options import command
from embedft.cli.show import show_table


def add_commands(commands: Any) -> None:
    made = command(commands, "demo", _demo, "train four adapters, serve them over two quantized bases, compare")
    made.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where everything goes")
    made.add_argument("--engine", choices=("vllm", "peft"), help="default: vllm where it is installed")
    made.add_argument("--quick", action="store_true", help="every step, on a fraction of the data")
    command(commands, "doctor", _doctor, "what is installed, what works, and how to mend what does not")


def _demo(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded; weights load in an instant
    from embedft.demo import demo

    report = demo(arguments.out, engine=arguments.engine, quick=arguments.quick)
    print(json.dumps(report) if arguments.json else (arguments.out / "report.md").read_text(encoding="utf-8").rstrip())


def _doctor(arguments: argparse.Namespace) -> int:
    from embedft.doctor import examine

    checks = examine()
    words = {True: "ok", None: "-", False: "FAULT"}
    if arguments.json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        show_table([{"check": c.name, "": words[c.ok], "found": c.found, "mend it with": "" if c.ok else c.mend} for c in checks])
    return 1 if any(check.ok is False for check in checks) else 0
