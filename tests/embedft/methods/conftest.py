"""The two tiny bases of the matrix; one thread, for exactness and for other people's cores."""

from pathlib import Path

import pytest

from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """On one thread."""


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"causal_lm": tiny_llama(folder / "llama", layers=1), "embedding": tiny_encoder(folder / "bert", pooling="mean")}


@pytest.fixture
def llama(bases: dict[str, Path]) -> Path:
    return bases["causal_lm"]
