"""AdapterEmbeddings: the same vectors for LangChain."""

from typing import Any

from langchain_core.embeddings import Embeddings

from embedft.rag.embedding import AdapterEmbedding


class AdapterEmbeddings(Embeddings):
    """Settings as of AdapterEmbedding: `url`, or `base` and `adapters`; `adapter` None is the base. Queries know their lineage."""

    def __init__(self, **settings: Any) -> None:
        self.model = AdapterEmbedding(**settings)

    def using(self, adapter: str | None) -> "AdapterEmbeddings":
        """The same engine with another adapter."""
        other = AdapterEmbeddings.__new__(AdapterEmbeddings)
        other.model = self.model.using(adapter)
        return other

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.get_text_embedding_batch(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.model.get_query_embedding(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self.model.aget_text_embedding_batch(texts)

    async def aembed_query(self, text: str) -> list[float]:
        return await self.model.aget_query_embedding(text)
