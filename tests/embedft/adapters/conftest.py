"""A real MiniLM adapter of random weights, a copy of it to change, and an empty store."""

import shutil
from pathlib import Path

import pytest

from embedft.adapters.store import AdapterStore
from tests.embedft.adapter_fixtures import make_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("made") / "a")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")
