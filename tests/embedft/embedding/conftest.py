"""Tiny bases, the planted task and recipes over them, on one thread."""

from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.store import AdapterStore
from embedft.recipe import EmbeddingRecipe, parse_recipe
from tests.embedft.embedding.runs import Make
from tests.fixtures_embedding import tiny_decoder, tiny_encoder, write_beir


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """On one thread."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def bases(root: Path) -> dict[str, str]:
    return {
        "mean": str(tiny_encoder(root / "mean", pooling="mean")),
        "cls": str(tiny_encoder(root / "cls", pooling="cls", normalize=False)),
        "lasttoken": str(tiny_decoder(root / "decoder")),
    }


@pytest.fixture(scope="module")
def beir(root: Path) -> str:
    return write_beir(root / "beir", train=192, test=48)


@pytest.fixture(scope="module")
def make(bases: dict[str, str], beir: str) -> Make:
    def recipe(base: str = "mean", *, name: str = "tiny", data: dict[str, Any] | None = None, **sections: Any) -> EmbeddingRecipe:
        content: dict[str, Any] = {
            "task": "embedding",
            "name": name,
            "base": {"model": bases.get(base, base), "quantization": sections.pop("quantization", "none")},
            "data": {"train": beir} | (data or {}),
            "train": {"batch": 16, "lr": 5e-3, "epochs": 3, "max_length": 16} | sections.pop("train", {}),
            "eval": {"guard": None} | sections.pop("eval", {}),
        }
        made = parse_recipe(content | sections)
        assert isinstance(made, EmbeddingRecipe)
        return made

    return recipe


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")
