"""The two tiny bases of the matrix; one thread, for exactness and for other people's cores."""

from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, base_folder
from tests.embedft.methods.cells import QUANTIZED
from tests.embedft.methods.published import published
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama

Made = dict[str, tuple[Path, Path]]


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


@pytest.fixture(scope="package")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Method → (adapter folder, folder of its base), filled as tests ask."""
    return {}


@pytest.fixture
def adapter(made: Made, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(method: str, quantization: str | None = None, **settings: Any) -> tuple[Path, Path]:
        quantization = quantization or QUANTIZED.get(method, "none")
        key = f"{method} {quantization} {settings}"
        if key not in made:
            folder = published(tmp_path_factory.mktemp("a"), bases["causal_lm"], method, quantization, **settings)
            made[key] = folder, base_folder(BaseSpec(str(bases["causal_lm"]), quantization))
        return made[key]

    return of
