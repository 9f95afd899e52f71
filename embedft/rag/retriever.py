"""IndexRetriever: an index of ours behind llama-index's BaseRetriever, with BM25 fusion and reranking."""

from pathlib import Path

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from embedft.rag.embedding import AdapterEmbedding
from embedft.rag.engines import Labelled
from embedft.rag.index import VectorIndex
from embedft.rag.search import Stages, search
from embedft.rag.store import node_of


class IndexRetriever(BaseRetriever):
    """The adapter is the embedding's; `using` gives a retriever over the same index with another one."""

    def __init__(self, index: VectorIndex | str | Path, embedding: AdapterEmbedding, *, stages: Stages | None = None) -> None:
        self.index = index if isinstance(index, VectorIndex) else VectorIndex.open(Path(index))
        self.embedding, self.stages = embedding, stages or Stages()
        super().__init__()

    def using(self, adapter: str | None) -> "IndexRetriever":
        return IndexRetriever(self.index, self.embedding.using(adapter), stages=self.stages)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = None if self.stages.fusion == "sparse" else self.embedding.get_query_embedding(query_bundle.query_str)
        return self._found(query_bundle.query_str, vector)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = None if self.stages.fusion == "sparse" else await self.embedding.aget_query_embedding(query_bundle.query_str)
        return self._found(query_bundle.query_str, vector)

    def _found(self, question: str, vector: list[float] | None) -> list[NodeWithScore]:
        assert vector is None or isinstance(vector, Labelled)
        return [NodeWithScore(node=node_of(hit.chunk), score=hit.score) for hit in search(self.index, question, vector, self.stages)]
