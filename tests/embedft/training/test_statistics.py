import tracemalloc

import numpy as np
import pytest

from embedft.training.statistics import paired_bootstrap


def test_the_interval_is_that_of_the_mean_difference() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=400)
    adapted = base + generator.normal(0.3, 0.5, size=400)
    low, high = paired_bootstrap(base, adapted)
    mean, error = float((adapted - base).mean()), float((adapted - base).std()) / np.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)  # 90 % would be 1.64, 99 % 2.58
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_many_queries_is_taken_in_bounded_memory() -> None:
    base = np.zeros(200_000)
    tracemalloc.start()
    try:
        low, high = paired_bootstrap(base, base + np.arange(200_000) % 2, resamples=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.49 < low < 0.5 < high < 0.51
    assert peak < 128 << 20  # 320 MB at once


def test_pairs_are_kept_together() -> None:
    base = np.linspace(0, 100, 50)
    low, high = paired_bootstrap(base, base + 0.01)
    assert (low, high) == (pytest.approx(0.01), pytest.approx(0.01))


def test_it_is_the_same_every_time_and_refuses_unlike_vectors() -> None:
    base, adapted = np.arange(9.0), np.arange(9.0)[::-1]
    assert paired_bootstrap(base, adapted) == paired_bootstrap(base, adapted)
    with pytest.raises(ValueError, match="equally long"):
        paired_bootstrap(base, adapted[:3])
    with pytest.raises(ValueError, match="non-empty"):
        paired_bootstrap(base[:0], base[:0])


@pytest.mark.parametrize("sign", [1, -1])
def test_five_pairs_prove_nothing_and_six_may(sign: int) -> None:
    for count in (1, 2, 5):
        low, high = paired_bootstrap(np.zeros(count), np.full(count, 0.5 * sign))
        assert (low, high) == ((0.0, 0.5) if sign > 0 else (-0.5, 0.0))
    assert paired_bootstrap(np.zeros(6), np.full(6, 0.5 * sign)) == (0.5 * sign, 0.5 * sign)
