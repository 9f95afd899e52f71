"""Bounds on time, on machines that do other things meanwhile."""

from collections.abc import Callable


def assert_faster(measure: Callable[[], tuple[float, float]], *, tries: int = 3) -> None:
    """`measure` gives (seconds, their bound): what is too slow by itself is so each of `tries` times. What it raises counts at once."""
    seen: list[tuple[float, float]] = []
    for _ in range(tries):
        seen.append(measure())
        if seen[-1][0] < seen[-1][1]:
            return
    raise AssertionError(f"seconds and their bound, each time: {seen}")
