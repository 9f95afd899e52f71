"""Runs a server until it is told to stop: SIGTERM, SIGINT or SIGHUP stops accepting, finishes what runs, ends the engines."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Generator
from typing import Any

import uvicorn

from embedft.errors import EmbedftError, UsageError
from serve.app import create_app
from serve.arrival import Arrival
from serve.config import ServerConfig
from serve.gateway import Gateway


def run(config: ServerConfig) -> int:
    """Serve until a signal; returns the exit status. What a failing engine raised is raised again after all have ended."""
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # uvloop's, where that is installed
        return runner.run(_run(config))


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: it would raise the signal again and so end this process before the engines."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _run(config: ServerConfig) -> int:
    listening = _listen(config)
    port = listening.getsockname()[1]
    gateway = Gateway(config)
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "proxy_headers": False}
    server = _Server(uvicorn.Config(create_app(gateway), http=Arrival, ws="none", lifespan="off", **quiet))
    loop = asyncio.get_running_loop()
    for number in _told_by():
        loop.add_signal_handler(number, server.handle_exit, number, None)
    _announce(config, gateway, port)
    starting = asyncio.create_task(_start(gateway, server, port))
    try:
        await server.serve(sockets=[listening])
    finally:
        starting.cancel()
        failure = (await asyncio.gather(starting, return_exceptions=True))[0]
        await gateway.stop()
        listening.close()
    if isinstance(failure, EmbedftError):
        raise failure
    return 1 if isinstance(failure, Exception) else 0


def _told_by() -> list[signal.Signals]:
    """A terminal that closes is no reason to drop what runs, and none to stop under nohup."""
    hangs_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangs_up]


async def _start(gateway: Gateway, server: uvicorn.Server, port: int) -> None:
    try:
        await gateway.start()
    except BaseException:
        server.should_exit = True
        raise
    served = ", ".join(sorted(gateway.lifecycle.live)) or "none"
    _say(f"ready on http://{gateway.config.host}:{port}: bases {', '.join(gateway.lifecycle.engines)}; adapters {served}")
    for name, reason in gateway.lifecycle.refused.items():
        if earlier := gateway.lifecycle.live.get(name):
            _say(f"{earlier.id} is served, and not the newest generation of that name: {reason}")
    for name, reason in gateway.lifecycle.unserved().items():
        _say(f"not served: {name}: {reason}")
    if gateway.aliases.damaged:
        _say(gateway.aliases.damaged)


def _listen(config: ServerConfig) -> socket.socket:
    """Bound before any engine starts, so that a port in use costs no minute."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # the protocol spelled out: asyncio sets TCP_NODELAY only then, and without it each answer waits 40 ms for an acknowledgement
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise UsageError(f"{config.host}:{config.port} cannot be bound: {error.strerror}; choose another with --port") from None
    listening.set_inheritable(False)
    return listening


def _announce(config: ServerConfig, gateway: Gateway, port: int) -> None:
    _say(f"starting on http://{config.host}:{port}: {', '.join(f'{base.name} ({base.engine})' for base in config.bases)}")
    if gateway.tenants.keyed:
        _say(f"{len(config.tenants)} tenants with keys")
    elif not os.environ.get("EMBEDFT_ADMIN_TOKEN"):
        _say(f"admin token: {gateway.admin_token}")


def _say(line: str) -> None:
    sys.stderr.write(f"embedft serve: {line}\n")
    sys.stderr.flush()
