"""LineageVectorStore and IndexRetriever inside llama-index: real vectors from a real server, the fake engine's."""

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.faiss import FaissVectorStore

from embedft.errors import InputInvalid, LineageMismatch, UsageError
from embedft.rag import AdapterEmbedding, IndexRetriever, LineageVectorStore
from embedft.rag.search import Stages
from tests.serve.world import Server

TEXTS = ["tea is hot", "bread is warm", "ice is cold", "snow_flakes melt"]


@pytest.fixture
def embedding(server: Server) -> AdapterEmbedding:
    return AdapterEmbedding(url=server.url, adapter="a")


def built(folder: Path, embedding: AdapterEmbedding) -> LineageVectorStore:
    store = LineageVectorStore(folder, embedding=embedding)
    documents = [Document(text=text, id_=f"d{i}", metadata={"number": i}) for i, text in enumerate(TEXTS)]
    VectorStoreIndex.from_documents(documents, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embedding)
    store.persist()
    return store


def found(store: LineageVectorStore, embedding: AdapterEmbedding, text: str, **options: object) -> list[str]:
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    return [hit.node.ref_doc_id or "" for hit in index.as_retriever(similarity_top_k=1, **options).retrieve(text)]


def embedded(text: str) -> str:
    """What the fake engine, for which only equal texts are near, must be asked: llama-index embeds metadata too."""
    return f"number: {TEXTS.index(text)}\n\n{text}"


def test_an_index_opened_anew_answers_with_text_and_metadata(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    built(tmp_path / "i", embedding)
    store = LineageVectorStore(tmp_path / "i")
    assert found(store, embedding, embedded("bread is warm")) == ["d1"]
    hit = VectorStoreIndex.from_vector_store(store, embed_model=embedding).as_retriever(similarity_top_k=1).retrieve(embedded(TEXTS[2]))[0]
    assert (hit.node.get_content(), hit.node.metadata) == ("ice is cold", {"number": 2})
    assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_deleting_and_updating_documents_through_llama_index(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    built(tmp_path / "i", embedding)
    store = LineageVectorStore(tmp_path / "i", embedding=embedding)
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    index.delete_ref_doc("d1")
    index.update_ref_doc(Document(text="ice is gone", id_="d2"))
    store.persist()
    again = LineageVectorStore(tmp_path / "i")
    assert len(again.client) == 3
    assert found(again, embedding, "ice is gone") == ["d2"]
    assert found(again, embedding, embedded("bread is warm")) != ["d1"]


def test_another_adapters_query_is_refused_through_llama_index(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    store = built(tmp_path / "i", embedding)
    with pytest.raises(LineageMismatch, match=r"by a@.*by b@"):
        found(store, embedding.using("b"), "x")
    with pytest.raises(LineageMismatch):
        LineageVectorStore(tmp_path / "i", embedding=embedding.using("b")).add([TextNode(text="x", embedding=[0.0] * 32)])


def test_many_query_only_adapters_share_one_index(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    store = built(tmp_path / "i", embedding.using("q"))
    for name in ("q", "q2", None):  # the base made these documents
        assert len(found(store, embedding.using(name), "bread is warm")) == 1
    with pytest.raises(LineageMismatch):
        found(store, embedding, "bread is warm")


def test_vectors_that_are_not_the_embeddings_are_refused(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    nodes = IngestionPipeline(transformations=[embedding.using("b")]).run(nodes=[TextNode(text=text) for text in TEXTS])
    store = LineageVectorStore(tmp_path / "i", embedding=embedding)
    with pytest.raises(InputInvalid, match="not those of a"):
        store.add(nodes)
    with pytest.raises(InputInvalid, match="does not say whose"):
        built(tmp_path / "j", embedding).query(VectorStoreQuery([0.0] * 32))
    with pytest.raises(UsageError, match="whose vectors"):
        LineageVectorStore(tmp_path / "j").add(nodes)


@pytest.mark.parametrize("given", [{"similarity_top_k": 0}, {"hybrid_top_k": -1, "mode": VectorStoreQueryMode.HYBRID}])
def test_no_answer_at_all_cannot_be_asked_for(tmp_path: Path, embedding: AdapterEmbedding, given: dict[str, Any]) -> None:
    query = VectorStoreQuery(embedding.get_query_embedding("snow"), query_str="snow", **given)
    with pytest.raises(InputInvalid, match="top_k: expected at least 1"):
        built(tmp_path / "i", embedding).query(query)


def test_hybrid_finds_by_words_what_the_vectors_miss(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    store = built(tmp_path / "i", embedding)
    assert found(store, embedding, "snow flakes", vector_store_query_mode="text_search") == ["d3"]
    index = store.client
    dense, hybrid = (IndexRetriever(index, embedding, stages=Stages(k=2, fusion=fusion)) for fusion in ("none", "rrf"))
    assert "d3" in [hit.node.ref_doc_id for hit in hybrid.retrieve("snow")]
    assert [hit.score for hit in dense.retrieve("snow")] != [hit.score for hit in hybrid.retrieve("snow")]


def test_a_reranker_has_the_last_word(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    index = built(tmp_path / "i", embedding).client
    stages = Stages(k=1, rerank=lambda _, texts: [float("ice" in text) for text in texts])
    assert IndexRetriever(index, embedding, stages=stages).retrieve("anything")[0].node.ref_doc_id == "d2"
    assert IndexRetriever(index, embedding.using("a"), stages=stages).using("a").retrieve("x")[0].score == 1.0
    remote = Stages(k=1, rerank=embedding.engine.rerank)  # type: ignore[attr-defined]
    assert IndexRetriever(index, embedding, stages=remote).retrieve(embedded("tea is hot"))[0].node.ref_doc_id == "d0"


def test_it_is_llama_indexs_faiss_store_and_plain_faiss_opens_its_file(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    store = built(tmp_path / "i", embedding)
    assert isinstance(store, FaissVectorStore)
    plain = FaissVectorStore.from_persist_path(str(next((tmp_path / "i" / "versions").iterdir()) / "vectors.faiss"))
    query = VectorStoreQuery(embedding.get_query_embedding(embedded(TEXTS[2])), similarity_top_k=3)
    ours, theirs = store.query(query), plain.query(query)
    assert theirs.similarities == pytest.approx(ours.similarities)
    assert [store.client.chunk(int(row)).id for row in theirs.ids or []] == ours.ids  # type: ignore[union-attr]


def test_it_finds_what_was_added_and_not_what_was_deleted_before_it_is_saved(tmp_path: Path, embedding: AdapterEmbedding) -> None:
    store = built(tmp_path / "i", embedding)
    nodes = IngestionPipeline(transformations=[embedding]).run(nodes=[TextNode(text="rain falls", id_="n9")])
    store.add(nodes)
    query = VectorStoreQuery(embedding.get_query_embedding("rain falls"), similarity_top_k=9)
    first = store.query(query).ids
    assert first is not None
    assert (first[0], len(first)) == ("n9", 5)
    store.delete_nodes(["n9"])
    assert "n9" not in (store.query(query).ids or [])
