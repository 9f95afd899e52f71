"""One thread: exact resume is exact on one thread count, and two threads on a busy machine mostly wait for each other."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """On one thread."""
