"""How an engine process is started: its arguments and environment. Starts nothing itself.

Every engine is a child process that speaks vLLM's HTTP on a Unix socket and calls its base "base".
"""

import secrets
import sys
from pathlib import Path

from embedft.errors import EngineFailed
from embedft.lean import EAGER
from serve.engines.settings import KEY, WAITING, EngineKind, EngineSettings, Work, parse_cores


def engine_key() -> str:
    """A fresh bearer key for one engine."""
    return secrets.token_urlsafe(32)


def engine_command(
    kind: EngineKind, *, folder: Path, task: Work, socket: Path, settings: EngineSettings, key: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """(argv, env) of an engine over the base in `folder`; `env` holds only what is added to the parent's environment.

    The key is env[KEY]. Raises EngineFailed when this engine cannot serve that base so; nothing has been started then.
    """
    key = key or engine_key()
    if kind == "vllm":
        from serve.engines.vllm import vllm_command

        if task == "cross_encoder":
            raise EngineFailed("a cross-encoder has an engine of its own kind: leave `engine` out")
        return vllm_command(folder=folder, task=task, socket=socket, settings=settings, key=key)
    argv = [sys.executable, "-m", f"serve.engines.{kind}", "--socket", str(socket), "--task", task]
    env = {KEY: key}
    if kind in ("peft", "cross"):
        argv += ["--folder", str(folder)]
        argv += ["--max-length", str(settings.max_length)] if settings.max_length else []
        argv += ["--pooling", settings.pooling] if settings.pooling else []
        argv += ["--max-tokens", str(settings.max_tokens)] if settings.max_tokens and task == "causal_lm" else []
        if settings.cores:
            argv += ["--cores", settings.cores]
            env["OMP_NUM_THREADS"] = str(len(parse_cores(settings.cores)))
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | WAITING
        env |= EAGER
    return argv, env
