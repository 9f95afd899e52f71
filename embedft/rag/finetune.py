"""AdapterFinetuneEngine: what users of llama-index's SentenceTransformersFinetuneEngine change their import to.

It trains an adapter where theirs trains a copy of the model. Knows of their dataset only its three fields.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from embedft.errors import DataError, UsageError
from embedft.rag.embedding import AdapterEmbedding

if TYPE_CHECKING:
    from embedft.training.measure import AdapterResult


class QADataset(Protocol):
    """EmbeddingQAFinetuneDataset's fields: id → text, id → text, query id → ids of its documents."""

    @property
    def queries(self) -> Mapping[str, str]: ...

    @property
    def corpus(self) -> Mapping[str, str]: ...

    @property
    def relevant_docs(self) -> Mapping[str, Sequence[str]]: ...


class AdapterFinetuneEngine:
    """Their arguments under their names; `model_output_path` is the folder of the adapter store, and `name` the adapter's name in it.

    `recipe`: more keys of a recipe, dotted, such as {"adapter.side": "query", "train.lr": 1e-3}. `loss` is the name of one of ours.
    The gain over the base is measured at the end, on `val_dataset` or on held-out queries, so `evaluation_steps` has no effect.
    """

    def __init__(
        self,
        dataset: QADataset,
        model_id: str = "minilm",
        model_output_path: str = "exp_finetune",
        batch_size: int = 10,
        val_dataset: QADataset | None = None,
        loss: str | None = None,
        epochs: int = 2,
        show_progress_bar: bool = True,
        evaluation_steps: int = 50,  # noqa: ARG002
        use_all_docs: bool = False,
        trust_remote_code: bool = False,
        device: Any = None,
        save_checkpoints: bool = False,
        resume_from_checkpoint: bool = False,
        checkpoint_save_steps: int = 500,
        checkpoint_save_total_limit: int = 0,  # noqa: ARG002
        *,
        name: str = "finetuned",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises DataError where an id leads nowhere, UsageError for what only their engine has."""
        if trust_remote_code or device is not None:
            raise UsageError("trust_remote_code and device are not for this engine: it runs no foreign code, and finds the device itself")
        if loss is not None and not isinstance(loss, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"loss: expected the name of a loss, such as 'mnrl', and got {type(loss).__name__}")
        self.model_id, self.model_output_path, self.name = model_id, model_output_path, name
        self.pairs = _pairs(dataset, every=use_all_docs)
        self.val_dataset = val_dataset
        if val_dataset is not None:
            _pairs(val_dataset, every=True)
        self._progress, self._resume = show_progress_bar, resume_from_checkpoint
        self._keys: dict[str, Any] = {"train.epochs": epochs, "train.batch": batch_size}
        self._keys |= {"loss.name": loss} if loss else {}
        self._keys |= {"train.checkpoint_every": checkpoint_save_steps} if save_checkpoints else {}
        self._keys |= recipe or {}
        self.result: AdapterResult | None = None

    def finetune(self) -> None:
        """Train, measure, and put the adapter into the store. `result` holds its metrics."""
        from embedft.adapters.store import AdapterStore
        from embedft.embedding.train import train
        from embedft.recipe_file import load_recipe

        store = AdapterStore(Path(self.model_output_path))
        folder = store.root / ".finetune" / self.name  # where it stays until it is trained on: a resumed run asks for the same data
        folder.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"query": query, "document": document}) for query, document in self.pairs)
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        data = {"train": "train.jsonl", **({"eval": _write_beir(self.val_dataset, folder)} if self.val_dataset else {})}
        (folder / "recipe.yaml").write_text(json.dumps({"task": "embedding", "name": self.name, "data": data}), encoding="utf-8")
        keys = {"base.model": self.model_id, **self._keys}
        loaded: Any = load_recipe(str(folder / "recipe.yaml"), [f"{key}={json.dumps(value)}" for key, value in keys.items()])
        self.result = train(loaded, store=store, resume=self._resume, progress=self._progress)  # pyright: ignore[reportAttributeAccessIssue]
        shutil.rmtree(folder)

    def get_finetuned_model(self, **settings: Any) -> AdapterEmbedding:
        """An embedding over the base with the trained adapter, from the store; `settings` are AdapterEmbedding's."""
        chosen: dict[str, Any] = {"adapters": self.model_output_path, "adapter": self.name, **settings}
        return AdapterEmbedding(**chosen)


def _pairs(dataset: QADataset, *, every: bool) -> list[tuple[str, str]]:
    """(query, document) texts; only each query's first document unless `every`, as in their engine."""
    made, problems = list[tuple[str, str]](), list[str]()
    for identity, query in dataset.queries.items():
        relevant = dataset.relevant_docs.get(identity, [])
        if not relevant:
            problems.append(f"query {identity}: no document in relevant_docs; expected at least 1")
        for document in relevant if every else relevant[:1]:
            if document not in dataset.corpus:
                problems.append(f"query {identity}: document {document} is not in the corpus")
            else:
                made.append((query, dataset.corpus[document]))
    if problems or not made:
        raise DataError(problems or ["the dataset holds no query"])
    return made


def _write_beir(dataset: QADataset, folder: Path) -> str:
    """A BEIR folder below `folder` whose test split is the dataset; returns its name."""
    place = folder / "eval"
    (place / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", dataset.corpus), ("queries", dataset.queries)):
        rows = (json.dumps({"_id": identity, "title": "", "text": text}) for identity, text in texts.items())
        (place / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = [f"{query}\t{document}\t1" for query, relevant in dataset.relevant_docs.items() for document in relevant]
    (place / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n", encoding="utf-8")
    return place.name
