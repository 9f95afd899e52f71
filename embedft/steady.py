"""A process that does one thing many times over: memory that was given back is there for the next time. Knows no torch."""

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager

_TRIM, _MAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_MOST, _LARGEST = 2**31 - 1, 32 << 20  # the largest that it takes of either
_AFTER = 64 << 20


@contextmanager
def steady() -> Generator[None]:
    """Inside, glibc keeps what is freed, where it would give it back and get it anew, page by page, in every step; and the garbage
    collector leaves alone what was there before, which is every library's. Elsewhere than on glibc only the second.
    What others froze stays frozen."""
    frozen = gc.get_freeze_count()
    _glibc(_MAP, _LARGEST)
    _glibc(_TRIM, _MOST)
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
            _glibc(_TRIM, _AFTER)


def _glibc(option: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(option, value)
    except (AttributeError, OSError, TypeError):  # another C library
        return
