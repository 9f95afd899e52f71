"""Runs one engine and outlives nobody: `python guard.py PIPE GRACE FOLDER COMMAND …`. Standard library only; nothing of ours.

The gateway holds the other end of PIPE. When that closes (the gateway ended in whatever way, SIGKILL included), on SIGTERM, or
when the engine ends, everything below this process is ended; if the gateway is gone, its FOLDER of sockets and logs goes too.
This is a subreaper: a grandchild that left its parent stays below it.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the pipe and the process group must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def main(pipe: int, grace: float, folder: str, command: list[str]) -> int:
    """Run `command` until it ends or nobody wants it; returns its exit status (128 + signal where one ended it)."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    parent = os.getpid()

    def child_setup() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    engine = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, preexec_fn=child_setup)
    orphaned = False
    while engine.poll() is None and not asked:
        ready, _, _ = select.select([pipe, wake], [], [], 60)
        if pipe in ready and not os.read(pipe, 1):
            orphaned = True
            break
        if wake in ready:
            os.read(wake, 4096)
            _reap(engine)
    if engine.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine.pid, signal.SIGTERM)
        until = time.monotonic() + grace
        while engine.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    end_all(engine)
    if orphaned:
        shutil.rmtree(folder, ignore_errors=True)
    status = engine.poll()
    return 1 if status is None else status if status >= 0 else 128 - status


def end_all(engine: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the engine's group and to every process below this one, until there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(engine.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        _reap(engine)
        below = children(os.getpid())
        if not below:
            return
        for process in below:
            for one in [*children(process), process]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        time.sleep(0.01)


def children(process: int) -> list[int]:
    try:
        with open(f"/proc/{process}/task/{process}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _reap(engine: "subprocess.Popen[bytes]") -> None:
    """Collect what ended: the engine through its Popen, so that its status is kept, and adopted orphans."""
    engine.poll()
    for process in children(os.getpid()):
        if process != engine.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
