"""What is freed inside is there for the next time, and the garbage collector is as it was afterwards. In a process of its own: both are the
process's, and what runs the tests has frozen it."""

import json
import platform
import subprocess
import sys
from typing import Any

import pytest

FAULTS = """
import resource

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [b"x" * (20 << 20) for _ in range(6)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with steady():
    faults()
    told = [faults(), outside]
"""
FROZEN = """
told = [gc.get_freeze_count()]
try:
    with steady():
        told.append(gc.get_freeze_count())
        with steady():
            pass
        told.append(gc.get_freeze_count())
        raise RuntimeError
except RuntimeError:
    told.append(gc.get_freeze_count())
gc.freeze()
with steady():
    pass
told.append(gc.get_freeze_count())
"""


def told(script: str) -> Any:
    whole = f"import gc, json\nfrom embedft.steady import steady\n{script}\nprint(json.dumps(told))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    inside, outside = told(FAULTS)
    assert inside * 10 < outside


def test_what_was_there_is_frozen_inside_alone() -> None:
    before, inside, still, after, others = told(FROZEN)
    assert before == after == 0
    assert inside == still > 100, "the outer one ends it"
    assert others > 100, "what others froze stays so"
