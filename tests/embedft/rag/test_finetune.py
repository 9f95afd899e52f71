"""The drop-in for llama-index's finetuning, and the LangChain face of the same vectors."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore

from embedft.errors import DataError, UsageError
from embedft.rag import AdapterEmbedding, AdapterEmbeddings, AdapterFinetuneEngine
from tests.serve.world import Server


@dataclass
class Dataset:
    """The fields of llama-index's EmbeddingQAFinetuneDataset, which lives in a package of its own."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant_docs: dict[str, list[str]]
    mode: str = "text"
    extra: list[str] = field(default_factory=list)


def dataset(first: int, count: int) -> Dataset:
    numbers = range(first, first + count)
    return Dataset(
        queries={f"q{i}": f"where is item {i}" for i in numbers},
        corpus={f"d{i}": f"The item numbered {i} is kept in room {i * 7}." for i in numbers},
        relevant_docs={f"q{i}": [f"d{i}"] for i in numbers},
    )


def test_finetuning_gives_an_embedding_model_that_is_the_adapters(tmp_path: Path) -> None:
    engine = AdapterFinetuneEngine(
        dataset(0, 12),
        model_id="minilm",
        model_output_path=str(tmp_path / "out"),
        batch_size=6,
        val_dataset=dataset(20, 4),
        epochs=1,
        show_progress_bar=False,
        recipe={"adapter.r": 2, "train.lr": 5e-3, "train.max_length": 16},
    )
    engine.finetune()
    assert engine.result is not None
    assert "ndcg@10" in engine.result.metrics["adapter"]
    model = engine.get_finetuned_model()
    assert isinstance(model, AdapterEmbedding)
    assert model.document_lineage()[1].startswith("finetuned@")
    texts = ["where is item 3", "the item numbered 3"]
    adapted, base = (np.array(model.get_text_embedding_batch(texts, adapter=name)) for name in ("finetuned", None))
    assert (adapted * base).sum(1).max() < 0.9999
    assert not (tmp_path / "out" / ".finetune" / "finetuned").exists()


def test_a_dataset_that_leads_nowhere_and_foreign_options_are_refused() -> None:
    broken = dataset(0, 3)
    broken.relevant_docs["q1"] = ["gone"]
    broken.relevant_docs["q2"] = []
    with pytest.raises(DataError, match=r"(?s)document gone is not in the corpus.*query q2: no document"):
        AdapterFinetuneEngine(broken)
    with pytest.raises(UsageError, match="foreign code"):
        AdapterFinetuneEngine(dataset(0, 3), trust_remote_code=True)
    with pytest.raises(UsageError, match="name of a loss"):
        AdapterFinetuneEngine(dataset(0, 3), loss=object())  # type: ignore[arg-type]


def test_langchain_gets_the_same_vectors(server: Server) -> None:
    ours, theirs = AdapterEmbedding(url=server.url, adapter="b"), AdapterEmbeddings(url=server.url, adapter="b")
    assert theirs.embed_query("tea") == ours.get_query_embedding("tea")
    assert asyncio.run(theirs.aembed_documents(["tea", "ice"])) == ours.get_text_embedding_batch(["tea", "ice"])
    assert theirs.using(None).embed_query("tea") == ours.get_query_embedding("tea", adapter=None) != theirs.embed_query("tea")
    assert asyncio.run(theirs.using("a").aembed_query("tea")) == ours.get_query_embedding("tea", adapter="a")
    store = InMemoryVectorStore.from_texts(["tea is hot", "ice is cold"], AdapterEmbeddings(url=server.url, adapter="a"))
    assert store.similarity_search("ice is cold", k=1)[0].page_content == "ice is cold"
