"""A linear map for an index: it is measured on texts that it was not fitted on, however small the index is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from embedft.errors import UsageError
from embedft.rag.build import build_index
from embedft.rag.engines import Vectors
from embedft.rag.index import VectorIndex
from embedft.rag.mapping import fit_map
from embedft.rag.remote import RemoteEngine
from embedft.rag.rows import Chunk
from tests.serve.world import Server


class Noting(RemoteEngine):
    """A real engine that notes what it embeds as queries and as documents."""

    def embed(self, texts: Sequence[str], **options: Any) -> Vectors:
        self.noted.setdefault(options["input_type"], []).extend(texts)
        return super().embed(texts, **options)

    noted: dict[str, list[str]]


def fitted(folder: Path, server: Server, texts: Sequence[str], **options: Any) -> tuple[Noting, float]:
    engine = Noting(server.url)
    engine.noted = {}
    build_index(folder, [Chunk(f"d#{i}", "d", text) for i, text in enumerate(texts)], RemoteEngine(server.url), adapter="a")
    return engine, fit_map(VectorIndex.open(folder), engine, "b", **options).recall


def test_a_map_is_measured_with_texts_that_it_has_not_seen(tmp_path: Path, server: Server) -> None:
    engine, _ = fitted(tmp_path / "i", server, [f"text {i}" for i in range(80)])
    assert len(engine.noted["query"]) == 16
    assert len(engine.noted["document"]) == 64
    assert not set(engine.noted["query"]) & set(engine.noted["document"])
    engine, _ = fitted(tmp_path / "j", server, [f"text {i % 60}" for i in range(120)])  # a text that is there twice is not held out
    assert engine.noted["query"]
    assert not set(engine.noted["query"]) & set(engine.noted["document"])


def test_an_index_too_small_to_hold_texts_back_is_refused_before_anything_is_embedded(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UsageError, match=r"at least 50 documents .* there are 44 to"):
        fitted(tmp_path / "i", server, [f"text {i}" for i in range(55)])
    engine, _ = fitted(tmp_path / "i", server, [f"text {i}" for i in range(55)], queries=["what is text 3"])  # nothing need be held back
    assert engine.noted["query"] == ["what is text 3"]
    assert len(engine.noted["document"]) == 55
    with pytest.raises(UsageError, match="and 0 to measure"):
        fitted(tmp_path / "j", server, ["the same"] * 80)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no map"])
def test_a_map_whose_file_is_damaged_is_none_and_is_fitted_again(tmp_path: Path, server: Server, content: bytes) -> None:
    engine, _ = fitted(tmp_path / "i", server, [f"text {i}" for i in range(80)])
    lineage, _ = engine.document_lineage("b")
    index = VectorIndex.open(tmp_path / "i")
    assert index.map_from(lineage)
    (path,) = (tmp_path / "i" / "maps").iterdir()
    path.write_bytes(content)
    assert index.map_from(lineage) is None
    fit_map(index, engine, "b")
    assert index.map_from(lineage)
