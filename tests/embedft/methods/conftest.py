"""The two tiny bases of the matrix; one thread, for exactness and for other people's cores."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """On one thread."""


@pytest.fixture(scope="package", autouse=True)
def little_garbage() -> Iterator[None]:
    import torch  # noqa: F401 (frozen with the rest)

    gc.collect()
    gc.freeze()  # every Trainer collects garbage, which takes longer than its steps where all of torch is looked through
    yield
    gc.unfreeze()


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"causal_lm": tiny_llama(folder / "llama", layers=1), "embedding": tiny_encoder(folder / "bert", pooling="mean")}
