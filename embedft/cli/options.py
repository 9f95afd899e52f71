"""What every command has: --json, its help, and the store it works on."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore


class _Help(argparse.HelpFormatter):
    """Tells an option's default where the option's own help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        bare = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        return said if bare or "default" in said or not action.option_strings else f"{said} (default: %(default)s)"


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
    """A parser for a command, or an action of one; `run` gives the exit status, None for 0."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=_Help
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return number


def finite(text: str) -> float:
    """An argparse type: a number that is one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a finite number")
    return number


def store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="the adapter store (default: $EMBEDFT_ADAPTERS, or adapters/)")


def put_to_use(name: str) -> str:
    """What to say where the store has a new generation of `name` and a server uses that store: it does not look by itself."""
    return f"a server uses this store, and goes on with what it has until PUT /v1/adapters/{name}"


def store_of(arguments: argparse.Namespace) -> "AdapterStore":
    from embedft.adapters.store import AdapterStore

    return AdapterStore(arguments.adapters)
