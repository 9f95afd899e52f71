"""The same adapter through MTEB's own evaluator, offline: its search and its scores, on our retrieval set. Knows no recipe."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedft.embedding.data import RetrievalSet
from embedft.embedding.sided import SidedEncoder
from embedft.encode import Encoder, EncodeSettings
from embedft.errors import UsageError

SCORES = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "hit@1": "success_1", "hit@5": "success_5", "hit@10": "success_10"}


def expect_mteb() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("mteb") is None:
        raise UsageError("--mteb needs the package mteb: pip install 'embedft[mteb]'")


def through_mteb(
    model: Any, folder: Path, settings: EncodeSettings, data: RetrievalSet, *, side: str, batch_size: int = 64
) -> dict[str, float]:
    """nDCG@10, recall@10 and hits by mteb.evaluate, from its scores of every query: its means are rounded to five places.

    MTEB breaks ties in its own way, so documents with equal vectors may be ranked differently.
    """
    import mteb

    encoder = _Encoder(SidedEncoder(model, folder, settings, side=side), batch_size=batch_size)
    task = _task(data)
    mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)  # pyright: ignore
    return {name: sum(row[theirs] for row in task.scores.values()) / len(task.scores) for name, theirs in SCORES.items()}


def _task(data: RetrievalSet) -> Any:
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Given(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="EmbedftRetrieval",
            description="The retrieval set that embedft was given.",
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )
        scores: Mapping[str, Mapping[str, float]]  # of every query

        def task_specific_scores(self, scores: Any, *_: Any, **__: Any) -> dict[str, float]:
            self.scores = scores
            return {}

    task: Any = Given()
    columns = {
        name: {"id": list(texts), "text": list(texts.values())} for name, texts in (("corpus", data.documents), ("queries", data.queries))
    }
    relevant = {query: dict(grades) for query, grades in data.relevant.items()}
    split = {name: Dataset.from_dict(rows) for name, rows in columns.items()}
    task.dataset = {"default": {"test": {**split, "relevant_docs": relevant, "top_ranked": None}}}
    task.data_loaded = True
    return task


class _Encoder:
    """What MTEB asks of a model, answered by ours: prompts and side as the passport has them."""

    mteb_model_meta: Any = None

    def __init__(self, encoder: Encoder, *, batch_size: int) -> None:
        from mteb.models.model_meta import ModelMeta

        self.encoder, self.batch_size = encoder, batch_size
        self.mteb_model_meta = ModelMeta.create_empty({"name": "embedft/adapter", "revision": "1"})

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Any:
        """(n, d) float32. MTEB says query or document."""
        kind: Any = getattr(prompt_type, "value", prompt_type)
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encoder.encode(texts, input_type=kind, batch_size=self.batch_size)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        from sentence_transformers.util import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)
