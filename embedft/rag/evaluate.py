"""The matrix: retriever adapter × stage, and retriever adapter × reader adapter, every figure with its 95 % interval.

Data: a BEIR folder (its corpus is indexed), or a file of questions with answers and, where known, the documents that hold them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.causal_lm.scores import token_f1
from embedft.embedding.beir import is_beir, read_beir, splits
from embedft.errors import DataError, InputInvalid, UsageError
from embedft.rag.answer import faithfulness, messages_of, sources_of
from embedft.rag.build import build_index
from embedft.rag.engines import Embedder, Labelled, Reader
from embedft.rag.index import Found, VectorIndex
from embedft.rag.rows import Chunk
from embedft.rag.search import Rerank, Stages, fit_weight, search
from embedft.records import read_records
from embedft.training.statistics import paired_bootstrap

DEPTH = 10
CHUNKS = 5 * DEPTH  # that a stage fetches: so many of them that ten documents come together where each has several
STAGES = ("dense", "bm25", "rrf", "weights", "rerank")
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Question:
    """`relevant`: document id → grade above 0; `answers`: any of them is right. Either may be empty."""

    text: str
    relevant: Mapping[str, int] = field(default_factory=dict[str, int])
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """`corpus`: chunks to index, or None where an index exists. `training`: questions that fusion weights are fitted on."""

    questions: tuple[Question, ...]
    training: tuple[Question, ...] = ()
    corpus: tuple[Chunk, ...] | None = None


def load_questions(source: Path, *, limit: int | None = None, training_limit: int = 200) -> EvaluationSet:
    """A BEIR folder (test split, weights fitted on train) or rows {"question", "answer" or "answers", "document" or "documents"}."""
    if is_beir(str(source)):
        return _beir(source, limit, training_limit)
    if not source.is_file():
        raise UsageError(f"{source}: expected a BEIR folder or a file of questions and answers")
    questions, problems = list[Question](), list[str]()
    for found in read_records(str(source), problems):
        row = found.values
        answers, documents = (row.get(f"{name}s", row.get(name, [])) for name in ("answer", "document"))
        listed: list[list[Any]] = [_listed(value) for value in (answers, documents)]
        asked = row.get("question")
        if isinstance(asked, str) and asked.strip() and all(isinstance(v, str) for side in listed for v in side):
            questions.append(Question(asked, dict.fromkeys(listed[1], 1), tuple(listed[0])))
        else:
            problems.append(f'{found.where}: expected {{"question": text, "answer": text or list, "document": id or list}}')
    if problems or not questions:
        raise DataError(problems or [f"{source.name}: no questions in it"])
    return EvaluationSet(tuple(questions[:limit]))


def _listed(value: Any) -> list[Any]:
    """A CSV's empty field and a Parquet file's null say nothing; what is neither text nor list holds something that is no text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [value] if isinstance(value, str) else value if isinstance(value, list) else [None]


def _beir(folder: Path, limit: int | None, training_limit: int) -> EvaluationSet:
    problems: list[str] = []
    known = splits(folder)
    test = next((name for name in ("test", "dev", "train") if name in known), "test")
    data = read_beir(folder, test, problems)
    train = read_beir(folder, "train", problems) if "train" in known and test != "train" else None
    if problems:
        raise DataError(problems)

    def listed(source: Any, most: int | None) -> tuple[Question, ...]:
        return tuple(Question(source.queries[name], dict(relevant)) for name, relevant in list(source.relevant.items())[:most])

    corpus = tuple(Chunk(name, name, text) for name, text in data.documents.items() if text)  # some engines refuse nothing
    return EvaluationSet(listed(data, limit), listed(train, training_limit) if train else (), corpus)


@dataclass(frozen=True)
class Cell:
    """One row of a matrix: `scores[metric]` (questions,)."""

    retriever: str
    stage: str
    scores: Scores
    reader: str | None = None
    note: str = ""

    def figures(self, against: "Cell | None" = None) -> dict[str, Any]:
        """Means with their 95 % intervals, and the interval of the gain over another row on the same questions."""
        shown: dict[str, Any] = {"retriever": self.retriever, "stage": self.stage, "reader": self.reader, "note": self.note, "metrics": {}}
        for name, values in self.scores.items():
            low, high = paired_bootstrap(np.zeros_like(values), values)
            shown["metrics"][name] = {"mean": float(values.mean()), "ci95": [low, high]}
            if against is not None and against is not self and len(against.scores.get(name, ())) == len(values):
                shown["metrics"][name]["gain_ci95"] = list(paired_bootstrap(against.scores[name], values))
        return shown


def evaluate(
    data: EvaluationSet,
    embedder: Embedder,
    *,
    adapters: Sequence[str | None],
    readers: Sequence[tuple[str | None, Reader]] = (),
    out: Path,
    index: Path | None = None,
    rerank: Callable[[str | None], Rerank] | None = None,
    answered: int = 100,
    max_tokens: int = 48,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything that the report shows. Adapters whose documents have one lineage share one index.

    `rerank(adapter)`: the reranker to measure; `answered`: how many questions are put to the readers, k = 5 passages each.
    Raises LineageMismatch where `index` was built with vectors that an adapter may not be compared with, DataError where it has none of
    the documents that the questions name, and where there is nothing to score.
    """
    if not readers and not any(question.relevant for question in data.questions):
        raise DataError(
            [
                "no question names a document that holds its answer, and there is no reader: nothing can be scored; "
                "expected a column document, or --lm-base or --lm-adapter"
            ]
        )
    retrieval, answers, indexes = list[Cell](), list[Cell](), dict[str, Any]()
    notes = _unscored(data.questions)
    if index is not None:
        opened = VectorIndex.open(index)
        for adapter in adapters:  # before the time that the first ones take
            lineage, made_by = embedder.document_lineage(adapter)
            opened.check(lineage=lineage, made_by=made_by)
        notes += _missing(data.questions, opened.documents())
    for note in notes:
        tell(note)
    for adapter in adapters:
        name = adapter or "base"
        opened = _index_of(data, embedder, adapter, out, index, indexes, tell)
        tell(f"{name}: {len(data.questions)} questions")
        vectors = _vectors(embedder, data.questions, adapter)
        ranked: dict[str, list[list[Found]]] = {}
        for stage, stages, note in _stages(opened, data, embedder, adapter, rerank):
            if stage == "bm25" and any(cell.stage == "bm25" for cell in retrieval):
                continue  # the same for every adapter
            ranked[stage] = [search(opened, q.text, v, stages) for q, v in zip(data.questions, vectors, strict=True)]
            if any(question.relevant for question in data.questions):
                retrieval.append(Cell("–" if stage == "bm25" else name, stage, _retrieval_scores(data.questions, ranked[stage]), note=note))
        for lm, reader in readers:
            tell(f"{name} × {lm or 'base'}: {min(answered, len(data.questions))} answers")
            answers.append(_answered(data.questions[:answered], ranked["dense"], reader, name, lm, max_tokens))
    return {
        "questions": len(data.questions),
        "notes": notes,
        "indexes": list(indexes.values()),
        "retrieval": [cell.figures(retrieval[0]) for cell in retrieval],
        "answers": [cell.figures(answers[0]) for cell in answers],
    }


def _unscored(questions: Sequence[Question]) -> list[str]:
    """A note where retrieval is scored on fewer questions than there are."""
    named, of = sum(bool(question.relevant) for question in questions), len(questions)
    if not 0 < named < of:
        return []
    return [f"{of - named} of the {of} questions name no document: what is found is scored on the other {named}"]


def _missing(questions: Sequence[Question], documents: Sequence[str]) -> list[str]:
    """A note where the index lacks some of the documents that the questions name. DataError where it has none of them."""
    named = {document for question in questions for document in question.relevant}
    if not (missing := sorted(named.difference(documents))):
        return []
    if len(missing) == len(named):
        has = f"the index has {documents[0]}" if documents else "the index is empty"
        raise DataError([f"none of the {len(named)} documents that the questions name is in the index: they say {missing[0]}, {has}"])
    which = f"{len(missing)} of the {len(named)} documents that the questions name are not in the index"
    return [f"{which}, such as {missing[0]}: they count as missed"]


def _index_of(
    data: EvaluationSet,
    embedder: Embedder,
    adapter: str | None,
    out: Path,
    index: Path | None,
    made: dict[str, Any],
    tell: Callable[[str], None],
) -> VectorIndex:
    lineage, made_by = embedder.document_lineage(adapter)
    if index is not None:
        opened = VectorIndex.open(index)
        opened.check(lineage=lineage, made_by=made_by)
        made[lineage] = {"lineage": lineage, "made_by": opened.made_by, "chunks": len(opened), "kind": opened.kind, "adapters": []}
        return opened
    if data.corpus is None:
        raise UsageError("a file of questions says nothing of the documents: give --index, or a BEIR folder")
    folder = out / "indexes" / lineage[:16]
    if lineage not in made:
        tell(f"{adapter or 'base'}: indexing {len(data.corpus)} documents")
        report = build_index(folder, data.corpus, embedder, adapter=adapter)
        size = sum(path.stat().st_size for path in (folder / "versions" / report.version).rglob("*") if path.is_file())
        made[lineage] = {"lineage": lineage, "made_by": made_by, "chunks": report.chunks, "kind": report.kind, "adapters": []}
        made[lineage] |= {"bytes": size, "seconds": report.seconds, "embedded": report.embedded, "truncated": report.truncated}
    made[lineage]["adapters"].append(adapter or "base")
    return VectorIndex.open(folder)


def _stages(
    index: VectorIndex, data: EvaluationSet, embedder: Embedder, adapter: str | None, rerank: Callable[[str | None], Rerank] | None
) -> list[tuple[str, Stages, str]]:
    listed = [("dense", Stages(k=CHUNKS), "")]
    if index.bm25 is not None:
        listed += [("bm25", Stages(k=CHUNKS, fusion="sparse"), ""), ("rrf", Stages(k=CHUNKS, fusion="rrf"), "")]
        training = [question for question in data.training if question.relevant]
        if training:
            weight, reached = fit_weight(_lists(index, training, _vectors(embedder, training, adapter)))
            note = f"weight of dense {weight:.2f}, fitted on {len(training)} training queries (their MRR@10 {reached:.3f})"
            listed.append(("weights", Stages(k=CHUNKS, fusion="weights", weight=weight), note))
    if rerank is not None:
        fusion = "rrf" if index.bm25 is not None else "none"
        listed.append(("rerank", Stages(k=CHUNKS, fusion=fusion, rerank=rerank(adapter)), f"over {fusion}"))
    return listed


def _lists(index: VectorIndex, questions: Sequence[Question], vectors: Sequence[Labelled]) -> list[Any]:
    """What fit_weight needs of each training question."""
    made: list[Any] = []
    for question, vector in zip(questions, vectors, strict=True):
        dense = index.search(vector, 50)
        sparse = index.by_words(question.text, 50)
        rows = {hit.row for hit in dense if hit.chunk.document in question.relevant}
        rows |= {hit.row for hit in index.found(sparse) if hit.chunk.document in question.relevant}
        made.append(([(hit.row, hit.score) for hit in dense], sparse, rows))
    return made


def _vectors(embedder: Embedder, questions: Sequence[Question], adapter: str | None) -> list[Labelled]:
    return Labelled.of(embedder.embed([question.text for question in questions], input_type="query", adapter=adapter))


def _retrieval_scores(questions: Sequence[Question], ranked: Sequence[Sequence[Found]]) -> Scores:
    """hit@1, hit@5, MRR@10 and nDCG@10 (linear gains) over documents, each by its best chunk; of questions with known documents."""
    rows: list[tuple[float, ...]] = []
    for question, found in zip(questions, ranked, strict=True):
        if not question.relevant:
            continue
        best = list(dict.fromkeys(hit.chunk.document for hit in found))[:DEPTH]
        gains = np.array([question.relevant.get(document, 0) for document in best], dtype=np.float64)
        ideal = np.sort(np.array(list(question.relevant.values()), dtype=np.float64))[::-1][:DEPTH]
        hits = np.flatnonzero(gains)
        discounts = 1.0 / np.log2(np.arange(2, DEPTH + 2))
        first = int(hits[0]) if len(hits) else DEPTH
        ndcg = float(gains @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)]))
        rows.append((float(first < 1), float(first < 5), 1.0 / (first + 1) if first < DEPTH else 0.0, ndcg))
    table = np.array(rows, dtype=np.float64)
    return {name: table[:, column] for column, name in enumerate(("hit@1", "hit@5", "mrr@10", "ndcg@10"))}


def _answered(
    questions: Sequence[Question], ranked: Sequence[Sequence[Found]], reader: Reader, retriever: str, lm: str | None, max_tokens: int
) -> Cell:
    """Exact match and F1 (best over the references; only where there are some) and faithfulness by token overlap.

    A prompt that the reader refuses scores 0 and is counted in the note. Raises InputInvalid where it refuses all of them.
    """
    scores: dict[str, list[float]] = {"exact_match": [], "f1": [], "faithfulness": []}
    refused = list[InputInvalid]()
    for question, found in zip(questions, ranked, strict=False):
        sources = sources_of(found[:5])
        said: str | None = None
        try:
            said = reader.chat(messages_of(question.text, sources), adapter=lm, max_tokens=max_tokens, temperature=0.0).strip()
        except InputInvalid as error:
            refused.append(error)
        scores["faithfulness"].append(0.0 if said is None else faithfulness(said, sources))
        if question.answers:
            same = said is not None and any(said.lower() == answer.strip().lower() for answer in question.answers)
            scores["exact_match"].append(float(same))
            scores["f1"].append(max(token_f1(said, answer) for answer in question.answers) if said else 0.0)
    asked = len(scores["faithfulness"])
    if refused and len(refused) == asked:
        raise refused[0]
    kept = {name: np.array(values, dtype=np.float64) for name, values in scores.items() if values}
    note = f"{len(refused)} of {asked} prompts refused and scored 0: {refused[0]}" if refused else ""
    return Cell(retriever, "dense", kept, reader=lm or "base", note=note)
