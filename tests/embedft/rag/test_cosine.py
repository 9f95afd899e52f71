"""What an index finds, of a base that does not normalise its vectors: the chunks nearest by cosine, as sentence-transformers compares."""

from pathlib import Path

import numpy as np
import pytest

from embedft.base import BaseSpec
from embedft.rag.ann import AnnSettings
from embedft.rag.build import build_index
from embedft.rag.engines import Labelled
from embedft.rag.index import VectorIndex
from embedft.rag.local import LocalEmbedder
from embedft.rag.rows import Chunk
from tests.fixtures_embedding import TOPICS, tiny_encoder, words


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_long_vectors_come_first_only_where_they_point_the_same_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("EMBEDFT_DTYPE", "float32")
    folder = tiny_encoder(tmp_path / "base", pooling="mean", normalize=False)
    texts = [" ".join(topic[:count]) for topic in words("document") for count in range(1, 6)]
    theirs = SentenceTransformer(str(folder), device="cpu")
    documents = theirs.encode(texts)
    embedder = LocalEmbedder(BaseSpec(str(folder)))
    chunks = [Chunk(f"c{number}", f"c{number}", text, {}) for number, text in enumerate(texts)]
    build_index(tmp_path / "index", chunks, embedder, adapter=None, settings=AnnSettings(kind=kind))  # pyright: ignore[reportArgumentType]
    saved = VectorIndex.open(tmp_path / "index")
    grown = VectorIndex(tmp_path / "new", lineage=saved.lineage, made_by="base")
    grown.add(chunks, documents, lineage=saved.lineage, made_by="base")
    by_length = 0
    for topic in range(TOPICS):
        asked = " ".join(words("query")[topic][:2])
        vector = Labelled.of(embedder.embed([asked], input_type="query", adapter=None))[0]
        true = theirs.similarity(theirs.encode([asked]), documents)[0].numpy()
        nearest = set(np.argsort(-true)[:3])
        by_length += set(np.argsort(-(documents @ theirs.encode(asked)))[:3]) != nearest
        for index in (saved, grown):
            found = index.search(vector, 3)
            assert {int(hit.chunk.id[1:]) for hit in found} == nearest
            np.testing.assert_allclose([hit.score for hit in found], np.sort(true)[::-1][:3], atol=2e-2)
    assert by_length > TOPICS // 2, "these vectors' lengths tell the two apart"
