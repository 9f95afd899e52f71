"""A process that does one thing many times over: memory that was given back is there for the next time. Knows no torch."""

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager, suppress

_TRIM, _MAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_MOST, _LARGEST = 2**31 - 1, 32 << 20  # the largest that it takes of either
_AFTER = 64 << 20


@contextmanager
def steady() -> Generator[None]:
    """Inside, glibc keeps what is freed, where it would give it back and get it anew, page by page, in every step; and the garbage
    collector leaves alone what was there before, which is every library's. Elsewhere than on glibc only the second.
    What others froze stays frozen."""
    frozen = gc.get_freeze_count()
    _glibc("mallopt", _MAP, _LARGEST)
    _glibc("mallopt", _TRIM, _MOST)
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
            _glibc("mallopt", _TRIM, _AFTER)


def settle() -> None:
    """Give back what is freed but still held: memory that is measured from here on would come out of it unseen."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        getattr(ctypes.CDLL(None), function)(*arguments)
