"""`python -m serve.engines.peft --folder F --task T --socket S`: one base behind a Unix socket until SIGTERM."""

import argparse
import os
import signal
from pathlib import Path

from embedft.errors import EmbedftError
from embedft.lean import without_unused
from serve.engines.settings import KEY, parse_cores


def main() -> None:
    """Load the base, then serve. What is wrong with the base ends it with the words alone."""
    try:
        _serve(_arguments())
    except EmbedftError as error:
        raise SystemExit(str(error)) from None


def _serve(arguments: argparse.Namespace) -> None:
    without_unused()
    if arguments.cores:
        os.sched_setaffinity(0, parse_cores(arguments.cores))
    from embedft.base import BaseSpec, load_base
    from embedft.encode import Encoder, EncodeSettings
    from serve.engines.peft.http import create_app
    from serve.engines.peft.worker import Worker
    from serve.link.engine import serve

    base = load_base(BaseSpec(str(arguments.folder.resolve())), task=arguments.task)
    context = base.info.takes(arguments.max_length)
    settings = EncodeSettings(pooling=arguments.pooling or base.info.pooling, normalize=base.info.normalize, max_length=context)
    encoder = Encoder(base.model, base.folder, settings) if arguments.task == "embedding" else None
    key = os.environ.pop(KEY, "")
    app = create_app(Worker(base, encoder), key=key, context=context, longest=arguments.max_tokens)
    signal.signal(signal.SIGTERM, _leave)  # uvicorn puts it back after its own shutdown and raises the signal again
    arguments.socket.unlink(missing_ok=True)
    serve(app, arguments.socket, grace=10, straight=app.state.straight, key=key)


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve.engines.peft", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the base's folder")
    parser.add_argument("--task", choices=["embedding", "causal_lm"], required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--pooling", choices=["mean", "cls", "lasttoken"], help="default: the base's own")
    parser.add_argument("--max-length", type=int, help="longest sequence in tokens; default: the base's own")
    parser.add_argument("--max-tokens", type=int, help="of one answer; default: as many as fit")
    parser.add_argument("--cores", help="as in 0-1,4; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
