"""Retrieval-augmented generation over switched adapters: llama-index and FAISS, with an index that knows which vectors it holds.

Talks to a server by URL, or to a base and adapter folders in this process; never imports serve. llama-index is imported only by
embedding.py, llm.py, store.py, retriever.py, chunks.py, finetune.py and langchain.py: a server that searches indexes does not load it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedft.rag.embedding import AdapterEmbedding
    from embedft.rag.finetune import AdapterFinetuneEngine
    from embedft.rag.langchain import AdapterEmbeddings
    from embedft.rag.llm import AdapterLLM
    from embedft.rag.retriever import IndexRetriever
    from embedft.rag.store import LineageVectorStore

_HOMES = {
    "AdapterEmbedding": "embedding",
    "AdapterEmbeddings": "langchain",
    "AdapterFinetuneEngine": "finetune",
    "AdapterLLM": "llm",
    "LineageVectorStore": "store",
    "IndexRetriever": "retriever",
}
__all__ = ["AdapterEmbedding", "AdapterEmbeddings", "AdapterFinetuneEngine", "AdapterLLM", "IndexRetriever", "LineageVectorStore"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"embedft.rag has no {name!r}: it has {', '.join(__all__)}")
    from importlib import import_module

    try:
        return getattr(import_module(f"embedft.rag.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"llama_index", "faiss", "openai", "langchain_core"}:
            raise
        from embedft.errors import UsageError

        extra = "langchain" if name == "AdapterEmbeddings" else "rag"
        raise UsageError(f"embedft.rag.{name} needs {error.name}: pip install 'embedft[{extra}]'") from None
