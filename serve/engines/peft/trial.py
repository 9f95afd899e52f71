"""Tries out a grammar that a client wants: `python trial.py SECONDS BYTES`, the grammar on stdin; on stdout what is wrong with it.

Beyond so many seconds, or bytes more than it has at its start, it is ended by a signal.

llguidance bounds neither the memory that a JSON schema takes (an array of a billion items) nor the time (some hundred patterns of
properties), and ends the process that lacks memory: so that is this one. Nothing of ours is imported.
"""

import contextlib
import os
import resource
import sys


def main(seconds: int, size: int) -> None:
    from llguidance import LLMatcher

    os.nice(10)
    for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, _mapped() + size), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # a system that has no such limit
            resource.setrlimit(limit, (most, most))
    sys.stdout.write(LLMatcher.validate_grammar(sys.stdin.read()))


def _mapped() -> int:
    """Bytes of this process's address space; 1 GiB where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
