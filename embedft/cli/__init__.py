"""The command line: parses, calls, prints. Everything heavy is imported inside the functions that need it.

Exit status: 0 done, 1 it failed and says what to do, 2 wrong usage. `--json` prints one object; otherwise a table for people.
"""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from embedft.errors import EmbedftError, TrainingInterrupted, UsageError
from embedft.lean import EAGER


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character, or a byte of a name, that it does not know is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parse(argv)
    except _Misused as error:
        if "--json" in (sys.argv if argv is None else argv):
            _print_error(str(error), code=UsageError.code)
        raise SystemExit(UsageError.exit_code) from None
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    for name, value in (quiet | EAGER).items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for a package that would download kernels
    try:
        return arguments.run(arguments) or 0
    except EmbedftError as error:
        return _failed(arguments, str(error), code=error.code, status=error.exit_code)
    except KeyboardInterrupt:
        return _failed(arguments, "stopped", code=TrainingInterrupted.code, status=TrainingInterrupted.exit_code)
    except BrokenPipeError:  # the reader went away: `embedft … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a file that is not there, or may not be written
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _failed(arguments, said, code="file_failed", status=1)


def _failed(arguments: argparse.Namespace, message: str, *, code: str, status: int) -> int:
    if arguments.json:
        _print_error(message, code=code)
    print(f"embedft: {message}", file=sys.stderr)
    return status


def _print_error(message: str, *, code: str) -> None:
    print(json.dumps({"error": {"code": code, "message": message}}))


class _Misused(SystemExit):
    """A command line that does not parse, said on stderr already."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own, but what is wrong goes on to whoever reads JSON."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise _Misused(message)


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
    from embedft.cli import adapters, data, machine, rag, recipes, serve, train

    parser = _Parser(
        prog="embedft", description="Train adapters for embedding and language models, prove that they help, serve many over one base."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for room in (train, adapters, recipes, data, serve, rag, machine):
        room.add_commands(commands)
    return parser
