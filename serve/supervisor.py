"""Starts, watches and ends one engine process. Knows processes and a health check; nothing of adapters or HTTP bodies."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedft.errors import EngineFailed
from serve.errors import NotReady

State = Literal["starting", "ready", "restarting", "stopped"]
GUARD = Path(__file__).with_name("guard.py")
BACKOFF = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY = 60.0  # seconds of life after which a death counts as the first again
PULSE, HUNG = 5.0, 60.0  # seconds between two looks at whether it answers; without an answer until it is taken for dead
TAIL_LINES = 30
LOG_BYTES = 32 << 20
SECRETS = {"EMBEDFT_ADMIN_TOKEN"}


@dataclass(frozen=True)
class Command:
    """What to run, and where it will listen and write. `env` is added to this process's own, less its secrets."""

    argv: Sequence[str]
    env: Mapping[str, str]
    socket: Path
    log: Path


def without_secrets() -> dict[str, str]:
    """This process's environment as its children may have it."""
    return {key: value for key, value in os.environ.items() if key not in SECRETS}


class Supervisor:
    """One engine: started, made ready by `prepare` (warm-up, adapters), restarted when it dies or hangs, ended with all it started."""

    def __init__(
        self,
        name: str,
        command: Command,
        *,
        healthy: Callable[[], Awaitable[bool]],
        prepare: Callable[[], Awaitable[None]],
        start_seconds: float,
        stop_seconds: float,
    ) -> None:
        self.name, self.command = name, command
        self.state: State = "starting"
        self.restarts = 0
        self.last_failure: str | None = None
        self._healthy, self._prepare = healthy, prepare
        self._start_seconds, self._stop_seconds = start_seconds, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start and make ready. EngineFailed, with the end of its log, when it does not come up."""
        try:
            await self._come_up()
        except BaseException:
            await self._end()
            self.state = "stopped"
            raise
        self.state = "ready"
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def stop(self) -> None:
        """End the engine and everything it started. Returns when none of it is left."""
        self.state = "stopped"
        if self._watching:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._end()

    def require_ready(self) -> None:
        if self.state != "ready":
            raise NotReady(f"the engine of base {self.name!r} is {self.state}: try again shortly")

    async def back(self, deadline: float) -> bool:
        """Wait, until `deadline` on the monotonic clock, for an engine that answers and has its adapters; whether there is one."""
        while self.state != "stopped" and time.monotonic() < deadline:
            if self.state == "ready" and await self._healthy():  # one that was just killed still counts as ready, and is not healthy
                return True
            await asyncio.sleep(0.05)
        return False

    async def _watch(self) -> None:
        failures, since = 0, time.monotonic()
        while True:
            how = await self._ended()
            if time.monotonic() - since > STEADY:
                failures = 0
            self.state, self.restarts = "restarting", self.restarts + 1
            self._say(f"{how}; restarting")
            while True:
                await asyncio.sleep(BACKOFF[min(failures, len(BACKOFF) - 1)])
                failures += 1
                try:
                    await self._end()
                    await self._come_up()
                    break
                except Exception as error:  # whatever it is, the base is to come back once it has passed: a full disk, no more files
                    self.last_failure = str(error) or type(error).__name__
                    self._say(self.last_failure)
            self.state, since = "ready", time.monotonic()

    async def _come_up(self) -> None:
        self._spawn()
        until, pause = time.monotonic() + self._start_seconds, 0.05
        while not await self._healthy():
            if not self._alive():
                raise self._failed("ended while starting")
            if time.monotonic() > until:
                raise self._failed(f"did not answer in {self._start_seconds:.0f} s")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.5)
        await self._prepare()

    def _spawn(self) -> None:
        self.command.socket.unlink(missing_ok=True)
        if self.command.log.exists() and self.command.log.stat().st_size > LOG_BYTES:
            self.command.log.unlink()
        read, write = os.pipe()
        env = without_secrets() | dict(self.command.env)
        folder = str(self.command.socket.parent)
        guard = [sys.executable, "-I", "-S", str(GUARD), str(read), str(self._stop_seconds), folder, *self.command.argv]
        self._pipe = write  # from here on _end closes it, whatever fails
        try:
            with self.command.log.open("ab") as log:
                self._process = subprocess.Popen(
                    guard, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(read,), start_new_session=True
                )
        finally:
            os.close(read)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _ended(self) -> str:
        """Wait until it lives no more, or does not answer for so long that it never will; says which."""
        looked = heard = time.monotonic()
        while self._alive():
            await asyncio.sleep(0.1)
            if time.monotonic() - looked < PULSE:
                continue
            heard = time.monotonic() if await self._healthy() else heard
            looked = time.monotonic()
            if looked - heard > HUNG:
                return f"has not answered for {looked - heard:.0f} s"
        return "ended unexpectedly"

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            until = time.monotonic() + self._stop_seconds + 12
            while process.poll() is None and time.monotonic() < until:
                await asyncio.sleep(0.02)
            process.kill()
        if process:
            await asyncio.to_thread(process.wait)
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _failed(self, how: str) -> EngineFailed:
        return EngineFailed(f"the engine of base {self.name!r} {how}; the end of its log:\n{self.log_tail()}")

    def _say(self, line: str) -> None:
        sys.stderr.write(f"engine {self.name}: {line}\n")
        sys.stderr.flush()

    def log_tail(self) -> str:
        try:
            with self.command.log.open("rb") as log:
                log.seek(max(0, self.command.log.stat().st_size - 16_384))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-TAIL_LINES:])
