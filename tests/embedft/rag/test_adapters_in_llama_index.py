"""AdapterEmbedding and AdapterLLM inside llama-index's own classes, over a real server."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, QueryBundle, Settings, VectorStoreIndex
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.openai_like import OpenAILike

from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterNotFound, EngineFailed, InputInvalid, UsageError
from embedft.rag import AdapterEmbedding, AdapterEmbeddings, AdapterLLM
from embedft.rag.engines import Labelled
from tests.serve.test_choice import expected
from tests.serve.world import Server, World

TEXTS = ["tea is hot", "bread is warm", "ice is cold"]


@pytest.fixture
def embedding(server: Server) -> AdapterEmbedding:
    return AdapterEmbedding(url=server.url, adapter="a")


@pytest.fixture
def llm(server: Server) -> AdapterLLM:
    return AdapterLLM(url=server.url, adapter="s", max_tokens=4)


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=f"n{i}") for i, text in enumerate(TEXTS)]


def test_the_adapter_is_chosen_at_construction_and_per_call(embedding: AdapterEmbedding, rag_world: World) -> None:
    for name, made in {
        "a": embedding.get_query_embedding("hello"),
        "b": embedding.get_query_embedding("hello", adapter="b"),
        None: embedding.get_query_embedding("hello", adapter=None),
    }.items():
        prompt = "ask: " if name == "b" else ""  # the passport's
        np.testing.assert_allclose(made, expected(rag_world, name, f"{prompt}hello"), atol=1e-6)
    np.testing.assert_allclose(embedding.get_text_embedding("hello", adapter="b"), expected(rag_world, "b", "hello"), atol=1e-6)
    assert asyncio.run(embedding.aget_text_embedding("hello", adapter="b")) == embedding.get_text_embedding("hello", adapter="b")
    batch = embedding.get_text_embedding_batch(TEXTS, adapter="b")
    np.testing.assert_allclose(batch, [expected(rag_world, "b", text) for text in TEXTS], atol=1e-6)


def test_async_gives_the_same_and_survives_a_new_event_loop(embedding: AdapterEmbedding) -> None:
    for _ in range(2):
        assert asyncio.run(embedding.aget_query_embedding("hello")) == embedding.get_query_embedding("hello")
    many = asyncio.run(embedding.aget_text_embedding_batch(TEXTS, adapter="b"))
    assert many == embedding.get_text_embedding_batch(TEXTS, adapter="b")


def test_a_query_knows_which_documents_it_may_be_compared_with(embedding: AdapterEmbedding) -> None:
    own, only = embedding.get_query_embedding("x"), embedding.get_query_embedding("x", adapter="q")
    assert isinstance(own, Labelled)
    assert isinstance(only, Labelled)
    assert own.lineage == own.documents == embedding.document_lineage()[0]
    assert only.lineage != only.documents
    assert only.documents == embedding.using("q2").document_lineage()[0] == embedding.using(None).document_lineage()[0]
    assert only.made_by.startswith("q@")


def test_a_vector_store_index_answers_with_the_adapters_vectors(embedding: AdapterEmbedding) -> None:
    index = VectorStoreIndex(nodes(), embed_model=embedding)
    assert index.as_retriever(similarity_top_k=1).retrieve("bread is warm")[0].node.node_id == "n1"
    found = asyncio.run(index.as_retriever(similarity_top_k=1).aretrieve("ice is cold"))
    assert found[0].score == pytest.approx(1.0, abs=1e-5)


def test_an_ingestion_pipelines_cache_tells_adapters_apart(embedding: AdapterEmbedding, server: Server) -> None:
    cache = IngestionCache(cache=SimpleKVStore())
    made = [IngestionPipeline(transformations=[embedding.using(name)], cache=cache).run(nodes=nodes()) for name in ("a", "b", "a")]
    assert made[0][0].embedding == made[2][0].embedding != made[1][0].embedding
    assert len(cache.cache.get_all(collection=cache.collection)) == 2


def test_an_ingestion_pipelines_docstore_skips_what_is_known(embedding: AdapterEmbedding) -> None:
    documents = [Document(text=text, id_=f"d{i}") for i, text in enumerate(TEXTS)]
    pipeline = IngestionPipeline(
        transformations=[embedding],
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
    )
    assert len(pipeline.run(documents=documents)) == 3
    documents[1] = Document(text="bread is new", id_="d1")
    assert [node.ref_doc_id or node.node_id for node in pipeline.run(documents=documents)] == ["d1"]


def test_a_cache_that_would_mix_adapters_is_refused(server: Server) -> None:
    with pytest.raises(UsageError, match="would mix adapters"):
        AdapterEmbedding(url=server.url, embeddings_cache=SimpleKVStore())


@pytest.mark.parametrize("make", [AdapterEmbedding, AdapterEmbeddings, AdapterLLM])
def test_a_setting_that_there_is_not_is_refused_for_else_the_base_would_answer(server: Server, make: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="no setting 'adaptr': did you mean 'adapter"):
        make(url=server.url, adaptr="a")


def test_what_is_written_out_is_read_in_again(embedding: AdapterEmbedding, llm: AdapterLLM) -> None:
    assert AdapterEmbedding.from_dict(embedding.to_dict()).document_lineage() == embedding.document_lineage()
    assert AdapterLLM.from_dict(llm.to_dict()).complete("hi").text == llm.complete("hi").text


def test_chat_and_completion_choose_the_adapter_per_call(llm: AdapterLLM) -> None:
    asked = [ChatMessage(role="user", content="hi")]
    assert str(llm.chat(asked).message.content).startswith("[s@")
    assert str(llm.chat(asked, adapter="t").message.content).startswith("[t@")
    assert llm.complete("hi", adapter=None).text.startswith("[base|")
    assert asyncio.run(llm.using("t").acomplete("hi")).text.startswith("[t@")
    assert asyncio.run(llm.achat(asked)).message.content == llm.chat(asked).message.content


def test_no_key_is_told_and_openais_own_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    llm = AdapterLLM(url=server.url, adapter="s", max_tokens=4)
    assert isinstance(llm, OpenAILike)
    assert llm.complete("hi").text.startswith("[s@")
    assert llm._get_client().api_key == llm._get_aclient().api_key == "none"
    assert "secret" not in str(AdapterLLM(url=server.url, api_key="secret").to_dict())


def test_streams_end_with_the_whole_answer(llm: AdapterLLM) -> None:
    async def last(stream: Any) -> Any:
        return [piece async for piece in await stream][-1]

    asked = [ChatMessage(role="user", content="hi")]
    pieces = list(llm.stream_chat(asked, adapter="t"))
    assert len(pieces) == 4
    assert pieces[-1].message.content == llm.chat(asked, adapter="t").message.content
    assert list(llm.stream_complete("hi"))[-1].text == llm.complete("hi").text
    assert asyncio.run(last(llm.astream_chat(asked))).message.content == llm.chat(asked).message.content
    assert asyncio.run(last(llm.astream_complete("hi"))).text == llm.complete("hi").text


def test_a_query_engine_retrieves_by_one_adapter_and_reads_by_another(embedding: AdapterEmbedding, llm: AdapterLLM) -> None:
    index = VectorStoreIndex(nodes(), embed_model=embedding)
    retriever = index.as_retriever(similarity_top_k=1)
    answers = [RetrieverQueryEngine.from_args(retriever, llm=llm.using(name)).query(QueryBundle("tea is hot")) for name in ("s", "t")]
    assert str(answers[0]).startswith("[s@")
    assert str(answers[1]).startswith("[t@")
    assert answers[0].source_nodes[0].node.node_id == "n0"


def test_a_chat_engine_and_a_router_run(embedding: AdapterEmbedding, llm: AdapterLLM) -> None:
    index = VectorStoreIndex(nodes(), embed_model=embedding)
    chat = ContextChatEngine.from_defaults(retriever=index.as_retriever(), llm=llm)
    assert str(chat.chat("tea is hot")).startswith("[s@")
    assert "".join(chat.stream_chat("tea is hot").response_gen).startswith("[s@")
    tools = [
        QueryEngineTool.from_defaults(index.as_query_engine(llm=llm.using(name)), description=text)
        for name, text in (("s", "tea is hot"), ("t", "ice is cold"))
    ]
    router = RouterQueryEngine.from_defaults(tools, llm=llm, selector=EmbeddingSingleSelector.from_defaults(embed_model=embedding))
    assert str(router.query("ice is cold")).startswith("[t@")
    assert Settings._llm is None  # nothing fell back on a default model


def test_an_unknown_adapter_and_an_absent_server_are_named(embedding: AdapterEmbedding, llm: AdapterLLM) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        embedding.get_query_embedding("x", adapter="nobody")
    with pytest.raises(AdapterNotFound, match="nobody"):
        list(llm.stream_complete("x", adapter="nobody"))
    with pytest.raises(InputInvalid, match="only generates"):
        AdapterEmbedding(url=embedding.url, base="words").get_query_embedding("x")
    with pytest.raises(EngineFailed, match="embedft serve"):
        AdapterEmbedding(url="http://127.0.0.1:9").get_query_embedding("x")


def test_in_process_vectors_switch_adapters_and_return_to_the_base(minilm_store: AdapterStore) -> None:
    embedding = AdapterEmbedding(base="minilm", adapters=str(minilm_store.root), adapter="one")
    names = ("one", "two", None, "one")
    one, two, base, again = (np.array(embedding.get_text_embedding_batch(TEXTS, adapter=name)) for name in names)
    np.testing.assert_allclose(one, again, atol=1e-6)
    assert (one * two).sum(1).max() < 0.99
    assert (one * base).sum(1).max() < 0.99
    alone = AdapterEmbedding(adapter=str(minilm_store.folder("two")))  # a folder; its base from its passport
    np.testing.assert_allclose(two, alone.get_text_embedding_batch(TEXTS), atol=1e-6)
    assert alone.document_lineage() == embedding.using("two").document_lineage()
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS, adapter="ask"), base, atol=1e-6)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[0], adapter="ask"), one[0], atol=1e-6)


def test_in_process_a_name_is_looked_for_where_the_command_line_looks(
    minilm_store: AdapterStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = AdapterEmbedding(base="minilm", adapters=str(minilm_store.root), adapter="one").document_lineage()
    monkeypatch.setenv("EMBEDFT_ADAPTERS", str(minilm_store.root))
    assert AdapterEmbedding(base="minilm", adapter="one").document_lineage() == named
    monkeypatch.delenv("EMBEDFT_ADAPTERS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(minilm_store.root)
    assert AdapterEmbedding(base="minilm", adapter="one").document_lineage() == named
    with pytest.raises(AdapterNotFound, match="'legal': there are"):
        AdapterLLM(base="seed-lm", adapter="legal").complete("x")


def test_in_process_answers_come_from_the_seed_model() -> None:
    llm = AdapterLLM(base="seed-lm", max_tokens=4)
    answer = llm.complete("Say one word.").text
    assert answer == "".join(piece.delta or "" for piece in llm.stream_complete("Say one word."))
    with pytest.raises(InputInvalid, match="retrieve less"):
        llm.complete("word " * 5000)
