"""One server with the fake engine for all RAG tests, and a small MiniLM adapter store for those that need real vectors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedft.adapters.passport import read_passport
from embedft.adapters.store import AdapterStore
from embedft.adapters.transfer import import_folder
from embedft.base import BaseSpec
from embedft.rag.local import LocalReader
from tests.embedft.adapter_fixtures import make_adapter
from tests.serve.world import Server, World, make_rag_world


@pytest.fixture(scope="session")
def rag_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_rag_world(tmp_path_factory.mktemp("rag"))


@pytest.fixture(scope="session")
def server(rag_world: World) -> Iterator[Server]:
    running = rag_world.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def minilm_store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """MiniLM adapters `one` and `two`, and `ask`, which is for queries only."""
    folder = tmp_path_factory.mktemp("minilm")
    store = AdapterStore(folder / "adapters")
    for seed, name in enumerate(("one", "two")):
        import_folder(store, make_adapter(folder / name, name=name, seed=seed), name=name)
    read_passport(folder / "one").model_copy(update={"side": "query", "name": "ask"}).write(folder / "one")
    import_folder(store, folder / "one", name="ask")
    return store


@pytest.fixture(scope="session")
def seed_reader() -> LocalReader:
    """The language model that comes with the package, loaded once."""
    return LocalReader(BaseSpec("seed-lm"))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "tea.md").write_text("# Tea\n\nGreen tea is brewed at eighty degrees.\n\n## Black\n\nBlack tea wants boiling water.\n")
    (folder / "bread.txt").write_text("Bread needs flour, water, salt and time. A sourdough rises over night.")
    return folder
