"""LineageVectorStore: llama-index's FaissVectorStore over an index of ours, which knows lineages, ids, deletions and versions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode, VectorStoreQueryResult
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from llama_index.vector_stores.faiss import FaissVectorStore
from numpy.typing import NDArray

from embedft.errors import IndexInvalid, InputInvalid, UsageError
from embedft.rag.ann import AnnSettings
from embedft.rag.embedding import AdapterEmbedding
from embedft.rag.engines import Labelled, Rows
from embedft.rag.index import VectorIndex
from embedft.rag.rows import Chunk
from embedft.rag.search import Stages, search
from embedft.rag.versions import current_version

SAME = 0.999  # cosine between a vector and its text embedded again; quantized engines wobble in the fourth digit
_WITH_WORDS = {VectorStoreQueryMode.HYBRID: "rrf", VectorStoreQueryMode.TEXT_SEARCH: "sparse"}


class LineageVectorStore(FaissVectorStore):
    """`folder` is opened, or made at the first `persist`. Adding needs `embedding`, which says the lineage and proves it.

    FaissVectorStore searches. It adds one vector at a time under running numbers, deletes nothing, keeps no text and writes in place:
    those four are ours. `vectors.faiss` of an index without deletions opens in plain FaissVectorStore by its path.

    llama-index strips labels from nodes' vectors, so of each batch the first and last node are embedded again and compared.
    Queries must be Labelled (AdapterEmbedding's are); one of another lineage is refused.
    """

    stores_text: bool = True
    folder: str = ""
    _index: VectorIndex = PrivateAttr()
    _embedding: AdapterEmbedding | None = PrivateAttr()

    def __init__(self, folder: str | Path, *, embedding: AdapterEmbedding | None = None, settings: AnnSettings | None = None) -> None:
        """Raises IndexNotFound where there is nothing to open and no `embedding` to begin with, LineageMismatch, IndexInvalid."""
        if current_version(Path(folder)) is not None or embedding is None:
            index = VectorIndex.open(Path(folder))
        else:
            lineage, made_by = embedding.document_lineage()
            index = VectorIndex(Path(folder), lineage=lineage, made_by=made_by, settings=settings, adapter=embedding.adapter)
        super().__init__(faiss_index=_Searched(index))
        self.folder, self._index, self._embedding = str(folder), index, embedding

    @classmethod
    def class_name(cls) -> str:
        return "LineageVectorStore"

    @property
    def client(self) -> VectorIndex:
        return self._index

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Raises UsageError without an `embedding`, LineageMismatch, InputInvalid where the vectors are not that embedding's."""
        if not nodes:
            return []
        if self._embedding is None:
            raise UsageError("a store that is added to must know whose vectors it gets: open it with embedding=AdapterEmbedding(…)")
        lineage, made_by = self._embedding.document_lineage()
        self._index.check(lineage=lineage, made_by=made_by)
        vectors = np.array([node.get_embedding() for node in nodes], dtype=np.float32)
        _prove(self._embedding, nodes, vectors)
        self._index.add([_chunk(node) for node in nodes], vectors, lineage=lineage, made_by=made_by)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        self._index.delete(document=ref_doc_id)

    def delete_nodes(self, node_ids: list[str] | None = None, filters: Any = None, **_: Any) -> None:
        if filters is not None:
            raise InputInvalid("filters_unsupported", "this store deletes by node id or by document, not by filter", "filters")
        self._index.delete(ids=node_ids or [])

    def get_nodes(self, node_ids: list[str] | None = None, filters: Any = None) -> list[BaseNode]:
        if filters is not None or node_ids is None:
            raise InputInvalid("filters_unsupported", "this store finds nodes by their ids", "filters")
        return [node_of(chunk) for chunk in self._index.chunks(node_ids)]

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        """Modes: default, text_search (BM25) and hybrid (both, reciprocal ranks). Raises LineageMismatch, InputInvalid."""
        if query.mode not in (VectorStoreQueryMode.DEFAULT, *_WITH_WORDS) or query.filters is not None or query.doc_ids or query.node_ids:
            raise InputInvalid(
                "query_unsupported", f"mode {query.mode} or filters: this store searches by default, text_search and hybrid", "mode"
            )
        if min(query.similarity_top_k, query.hybrid_top_k or 1) < 1:
            raise InputInvalid("top_k_invalid", "similarity_top_k and hybrid_top_k: expected at least 1", "similarity_top_k")
        vector = query.query_embedding
        if vector is not None and not isinstance(vector, Labelled):
            raise InputInvalid(
                "lineage_unknown", "this query vector does not say whose it is: embed it with AdapterEmbedding", "query_embedding"
            )
        if query.mode in _WITH_WORDS or vector is None:
            stages = Stages(k=query.hybrid_top_k or query.similarity_top_k, fusion=_WITH_WORDS.get(query.mode, "none"))  # pyright: ignore[reportArgumentType]
            found = search(self._index, query.query_str or "", vector, stages)
        else:
            now = self._index.snapshot()
            now.accept(vector)
            rows = FaissVectorStore(faiss_index=_Searched(now)).query(query)
            scored = zip(rows.ids or [], rows.similarities or [], strict=True)
            found = now.found([(int(row), float(score)) for row, score in scored])
        return VectorStoreQueryResult(
            nodes=[node_of(hit.chunk) for hit in found], similarities=[hit.score for hit in found], ids=[hit.chunk.id for hit in found]
        )

    def persist(self, persist_path: str = "", fs: Any = None) -> None:  # noqa: ARG002
        """Publish to `folder`, wherever llama-index wants it to be: an index is a folder with versions, not one file."""
        self._index.save()


class _Searched:
    """What FaissVectorStore asks of a FAISS index, answered by ours: without the dead, and each kind searched as it needs."""

    def __init__(self, index: VectorIndex) -> None:
        self._index = index

    @property
    def ntotal(self) -> int:
        return len(self._index)

    def search(self, queries: Rows, k: int) -> tuple[Rows, NDArray[np.int64]]:
        """(q, d) → (scores, rows), both (q, k), -1 where there are fewer."""
        scores, rows = np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1, dtype=np.int64)
        for place, query in enumerate(queries):
            for rank, (row, score) in enumerate(self._index.nearest(query, k)):
                rows[place, rank], scores[place, rank] = row, score
        return scores, rows


def _prove(embedding: AdapterEmbedding, nodes: Sequence[BaseNode], vectors: Rows) -> None:
    places = sorted({0, len(nodes) - 1})
    texts = [nodes[place].get_content(metadata_mode=MetadataMode.EMBED) for place in places]
    again = np.array(embedding.get_text_embedding_batch(texts), dtype=np.float32)
    if again.shape[1] != vectors.shape[1]:
        raise IndexInvalid("", f"the nodes' vectors have {vectors.shape[1]} dimensions, and the adapter makes {again.shape[1]}")
    given = vectors[places]
    cosine = (again * given).sum(1) / np.maximum(np.linalg.norm(again, axis=1) * np.linalg.norm(given, axis=1), 1e-12)
    if cosine.min() < SAME:
        name = embedding.adapter or "the base"
        raise InputInvalid(
            "lineage_unproven",
            f"the nodes' vectors are not those of {name} (cosine {cosine.min():.3f} to its own): embed them with it",
            "nodes",
        )


def _chunk(node: BaseNode) -> Chunk:
    text, embedded = node.get_content(metadata_mode=MetadataMode.NONE), node.get_content(metadata_mode=MetadataMode.EMBED)
    metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=False)
    return Chunk(node.node_id, node.ref_doc_id or node.node_id, text, metadata, embedded if embedded != text else None)


def node_of(chunk: Chunk) -> BaseNode:
    if "_node_content" in chunk.metadata:
        return metadata_dict_to_node(chunk.metadata, text=chunk.text)
    return TextNode(id_=chunk.id, text=chunk.text, metadata={**chunk.metadata, "document": chunk.document})
