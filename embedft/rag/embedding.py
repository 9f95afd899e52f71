"""AdapterEmbedding: llama-index's BaseEmbedding over a base and its adapters, by URL or in this process."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from embedft.errors import UsageError
from embedft.rag.engines import Embedder, Labelled, Vectors
from embedft.rag.local import LocalEmbedder, store_at
from embedft.rag.remote import RemoteEngine


class AdapterEmbedding(BaseEmbedding):
    """Vectors by an adapter: `url` of a running server, or in this process from `base` and `adapters` (a store's folder).

    `adapter` is a name, in this process also a folder; None is the base. Every call takes another one as `adapter=`.
    Queries come back as Labelled: they know their lineage, and an index of another one refuses them.
    """

    url: str | None = Field(default=None, description="A running server; None: in this process.")
    base: str | None = Field(default=None, description="The base; None: the adapter's own, or the server's only one.")
    adapter: str | None = Field(default=None, description="The adapter; None: the base itself.")
    adapters: str | None = Field(default=None, description="The store's folder, in this process; None: $EMBEDFT_ADAPTERS, or adapters/.")
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    _engine: Embedder | None = PrivateAttr(default=None)

    def __init__(self, *, engine: Embedder | None = None, **settings: Any) -> None:
        """`engine`: one that is shared with others; made from the settings where there is none. Raises UsageError."""
        only_known(settings, {*type(self).model_fields, "lineage"}, of="AdapterEmbedding")  # to_dict's lineage is what it then was
        if settings.get("embeddings_cache") is not None:
            raise UsageError(
                "llama-index's embeddings_cache knows a vector by its text alone and would mix adapters, and queries with documents: "
                "leave it out; IngestionPipeline's cache is safe, it knows the adapter's generation"
            )
        settings.setdefault("embed_batch_size", 64)
        settings.setdefault("model_name", settings.get("adapter") or settings.get("base") or "base")
        super().__init__(**settings)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        return "AdapterEmbedding"

    @property
    def engine(self) -> Embedder:
        """What makes the vectors; opened at its first use."""
        if self._engine is None:
            if self.url:
                self._engine = RemoteEngine(self.url, model=self.base, api_key=self.api_key)
            else:
                self._engine = LocalEmbedder.of(self.adapter, base=self.base, store=store_at(self.adapters))
        return self._engine

    def using(self, adapter: str | None) -> "AdapterEmbedding":
        """The same engine with another adapter: what to hand to a retriever."""
        given = {name: getattr(self, name) for name in ("url", "base", "adapters", "api_key", "embed_batch_size", "callback_manager")}
        return AdapterEmbedding(engine=self.engine, adapter=adapter, **given)

    def document_lineage(self) -> tuple[str, str]:
        """(lineage of the document vectors, who makes them), as it is now."""
        return self.engine.document_lineage(self.adapter)

    def to_dict(self, **options: Any) -> dict[str, Any]:
        """With the lineage, by which IngestionPipeline's cache knows whose vectors it holds."""
        return {**super().to_dict(**options), "lineage": self.document_lineage()[0]}

    def get_query_embedding(self, query: str, **call: Any) -> Embedding:
        """`adapter=` for this call only."""
        return self.using(call["adapter"]).get_query_embedding(query) if call else super().get_query_embedding(query)

    async def aget_query_embedding(self, query: str, **call: Any) -> Embedding:
        return await (self.using(call["adapter"]).aget_query_embedding(query) if call else super().aget_query_embedding(query))

    def get_text_embedding(self, text: str, **call: Any) -> Embedding:
        return self.using(call["adapter"]).get_text_embedding(text) if call else super().get_text_embedding(text)

    async def aget_text_embedding(self, text: str, **call: Any) -> Embedding:
        return await (self.using(call["adapter"]).aget_text_embedding(text) if call else super().aget_text_embedding(text))

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **call: Any) -> list[Embedding]:
        if "adapter" in call:
            return self.using(call["adapter"]).get_text_embedding_batch(texts, show_progress)
        return super().get_text_embedding_batch(texts, show_progress, **call)

    async def aget_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **call: Any) -> list[Embedding]:
        if "adapter" in call:
            return await self.using(call["adapter"]).aget_text_embedding_batch(texts, show_progress)
        return await super().aget_text_embedding_batch(texts, show_progress, **call)

    def get_agg_embedding_from_queries(self, queries: list[str], agg_fn: Any = None) -> Embedding:
        """The mean of the queries' vectors, which keeps their label: retrievers ask for it even for one query."""
        made = self.engine.embed(queries, input_type="query", adapter=self.adapter)
        return _mean(made, agg_fn)

    async def aget_agg_embedding_from_queries(self, queries: list[str], agg_fn: Any = None) -> Embedding:
        return _mean(await self.engine.aembed(queries, input_type="query", adapter=self.adapter), agg_fn)

    def _get_query_embedding(self, query: str) -> Embedding:
        return Labelled.of(self.engine.embed([query], input_type="query", adapter=self.adapter))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return Labelled.of(await self.engine.aembed([query], input_type="query", adapter=self.adapter))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return list(Labelled.of(self.engine.embed(texts, input_type="document", adapter=self.adapter)))

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return list(Labelled.of(await self.engine.aembed(texts, input_type="document", adapter=self.adapter)))


def only_known(settings: Mapping[str, Any], known: Collection[str], *, of: str) -> None:
    """UsageError for a setting that there is not, which llama-index's classes would take without a word: the base would answer."""
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"{of} has no setting {name!r}" + (f": did you mean {nearest[0]!r}?" if nearest else ""))


def _mean(made: Vectors, agg_fn: Any) -> Labelled:
    rows: Sequence[Sequence[float]] = made.rows.tolist()
    row = agg_fn(rows) if agg_fn else made.rows.mean(axis=0).tolist()
    return Labelled(row, lineage=made.lineage, documents=made.documents, made_by=made.made_by)
