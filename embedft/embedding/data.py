"""What a recipe names as data → training examples and a retrieval set. Every fault is reported at once, before any model loads."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedft.embedding.beir import is_beir, read_beir, splits
from embedft.embedding.pairs import Example, parse
from embedft.errors import DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from embedft.records import first, read_records

HELD_OUT = 0.1  # share of the queries kept for evaluation where the recipe names no eval data
HELD_OUT_MOST = 500


@dataclass(frozen=True)
class Examples:
    """Training rows without repeats. `relevant`: query text → every document text known to answer it. `hash`: of the rows in order.
    `left_out`: a line for each kind of row that was given and is not used."""

    rows: tuple[Example, ...]
    relevant: Mapping[str, frozenset[str]]
    hash: str
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def negatives(self) -> int:
        """Negatives that every row has: as many as the row with the fewest."""
        return min((len(row.negatives) for row in self.rows), default=0)


@dataclass(frozen=True)
class RetrievalSet:
    """`relevant`: query id → document id → grade above 0. Every query has at least one relevant document here.
    `capped`: the texts of queries that a cap took out."""

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]
    hash: str
    capped: frozenset[str] = frozenset()

    @property
    def asked(self) -> frozenset[str]:
        """Every query text, capped ones too: `embedft eval` asks them all."""
        return self.capped.union(self.queries.values())


def load_data(data: EmbeddingData, evaluation: EmbeddingEval, *, scored: bool, taught: bool = False) -> tuple[Examples, RetrievalSet]:
    """Both sets of a recipe. A training row whose query is also an evaluation query is left out. Raises DataError.

    `scored` and `taught`: what the loss takes, as `parse` has it.
    """
    problems: list[str] = []
    rows = _all_examples(data, problems, scored=scored, taught=taught)
    problems += [] if taught else answering_negatives(rows)  # a teacher's score says how much one answers
    told: tuple[str, ...] = ()
    source = data.eval or (data.train if is_beir(data.train) else None)
    if data.eval is None and source and {"test", "dev"}.isdisjoint(splits(Path(source))):
        raise DataError([*problems, f"{Path(source).name}/qrels: neither test.tsv nor dev.tsv to be judged by; expected one, or data.eval"])
    if source is None and scored:
        problems.append("data.eval: a loss of scored pairs needs its own evaluation data; expected pairs or a BEIR folder")
    if source is None:
        rows, held = _hold_out(rows)
        told = (f"without data.eval it is judged by {len({row.query for row in held})} of the training queries, which are held out",)
        retrieval = of_pairs(held, extra_documents=[row.document for row in rows])
    else:
        retrieval = load_retrieval(source, problems, format=data.format if source == data.train else None)
    if problems:
        raise DataError(problems)
    examples = _unasked(rows, retrieval.asked, by="the evaluation", left_out=told)
    retrieval = reduce_to(retrieval, queries=evaluation.queries, documents=evaluation.documents)
    if len(examples) < 2:
        raise DataError([f"{Path(data.train).name}: {len(examples)} usable rows besides the evaluation's queries; expected at least 2"])
    return examples, retrieval


def load_retrieval(
    source: str, problems: list[str] | None = None, *, format: str | None = None, prefer: tuple[str, ...] = ("test", "dev")
) -> RetrievalSet:
    """Evaluation data: the split of a BEIR folder that comes first in `prefer`, or pairs, whose documents are the corpus. DataError."""
    faults = [] if problems is None else problems
    before = len(faults)
    if _as_beir(source, format):
        folder = Path(source)
        known = splits(folder)
        beir = read_beir(folder, next((name for name in prefer if name in known), prefer[0]), faults)
        queries = {identifier: beir.queries[identifier] for identifier in beir.relevant}
        retrieval = _retrieval(queries, beir.documents, beir.relevant)
    else:
        rows = list(parse(read_records(source, faults, split=prefer[0]), faults, scored=False))
        retrieval = of_pairs(rows, extra_documents=[text for row in rows for text in row.negatives])
    if not retrieval.queries and len(faults) == before:
        faults.append(f"{Path(source).name}: no query with a relevant document to evaluate on; expected at least 1")
    if problems is None and faults:
        raise DataError(faults)
    return retrieval


def make_examples(rows: Iterable[Example], *, left_out: tuple[str, ...] = ()) -> Examples:
    """Drop repeated rows and collect each query's relevant documents."""
    kept = tuple(dict.fromkeys(rows))
    relevant: dict[str, set[str]] = {}
    for row in kept:
        relevant.setdefault(row.query, set()).add(row.document)
    content = [
        [
            row.query,
            row.document,
            row.negatives,
            row.score,
            *([row.scores] if row.scores else []),
            *([row.weight] if row.weight != 1 else []),
        ]
        for row in kept
    ]
    return Examples(kept, {query: frozenset(texts) for query, texts in relevant.items()}, _hash(content), left_out)


def _unasked(rows: Sequence[Example], asked: Collection[str], *, by: str, left_out: tuple[str, ...] = ()) -> Examples:
    """The rows whose query nobody asks who judges by it."""
    kept = [row for row in rows if row.query not in asked]
    line = f"{len(rows) - len(kept)} of {len(rows)} training rows are not used: {by} asks their queries"
    return make_examples(kept, left_out=left_out if len(kept) == len(rows) else (*left_out, line))


def answering_negatives(rows: Sequence[Example]) -> list[str]:
    """A line for each negative that another row of its query calls its document: to learn from both is to learn nothing."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.query, set()).add(row.document)
    lines = (
        f"query {row.query[:60]!r}: its negative {text[:60]!r} is its document in another row; `embedft data check --fix` takes it out"
        for row in rows
        for text in row.negatives
        if text in answers[row.query]
    )
    return list(dict.fromkeys(lines))


def reduce_to(retrieval: RetrievalSet, *, queries: int | None, documents: int | None) -> RetrievalSet:
    """At most so many queries and documents, chosen by the hash of their ids; relevant documents stay, even above the cap."""
    if (queries is None or queries >= len(retrieval.queries)) and (documents is None or documents >= len(retrieval.documents)):
        return retrieval
    chosen = sorted(retrieval.queries, key=_rank)[:queries]
    relevant = {identifier: retrieval.relevant[identifier] for identifier in chosen}
    kept = {identifier for grades in relevant.values() for identifier in grades}
    others = [identifier for identifier in sorted(retrieval.documents, key=_rank) if identifier not in kept]
    kept.update(others if documents is None else others[: max(0, documents - len(kept))])
    texts = {identifier: text for identifier, text in retrieval.documents.items() if identifier in kept}
    reduced = _retrieval({identifier: retrieval.queries[identifier] for identifier in chosen}, texts, relevant)
    return replace(reduced, capped=retrieval.asked.difference(reduced.queries.values()))


def data_hash(examples: Examples, *sets: RetrievalSet) -> str:
    """64 hex digits for a passport: the same rows and the same evaluation give the same hash."""
    return _hash([examples.hash, *(given.hash for given in sets)])


def _as_beir(source: str, format: str | None) -> bool:
    if format == "beir" and not is_beir(source):
        raise DataError(
            [f"{Path(source).name}: data.format is beir, but this is no folder; expected corpus.jsonl, queries.jsonl and qrels/"]
        )
    return is_beir(source)


def _all_examples(data: EmbeddingData, problems: list[str], *, scored: bool, taught: bool) -> list[Example]:
    """The rows of every training set, each with its set's weight."""
    rows: list[Example] = []
    for source, weight in ((data.train, data.weight), *((part.train, part.weight) for part in data.also)):
        found = _examples(source, data.limit, problems, scored=scored, taught=taught, format=data.format)
        rows += found if weight == 1 else [replace(row, weight=weight) for row in found]
    return rows


def split_dev(examples: Examples, evaluated: RetrievalSet, dev: str | None) -> tuple[Examples, RetrievalSet]:
    """The queries that choose the best checkpoint: `dev` (a BEIR folder's dev split, else its test split), or a part of the training
    queries. Training does not see them, and none is one that the adapter is judged by: the best of many would seem better than it is."""
    if dev is not None:
        given = load_retrieval(dev, prefer=("validation", "dev", "test"))  # "validation" is the hub's word
        retrieval, told = without_queries(given, evaluated.asked), examples.left_out
        if not retrieval.queries:
            raise DataError(
                [
                    f"data.dev: the evaluation asks all of its {len(given.queries)} queries, so they must not choose the step that it "
                    "judges; expected other queries, or no data.dev: then a part of the training queries is held out"
                ]
            )
        if more := len(given.queries) - len(retrieval.queries):
            told = (*told, f"{more} of {len(given.queries)} dev queries choose no step: the evaluation asks them")
        kept = _unasked(examples.rows, set(retrieval.queries.values()), by="data.dev", left_out=told)
    else:
        rest, held = _hold_out(examples.rows)
        if any(row.score is not None for row in held):
            raise DataError(["data.dev: a loss of scored pairs needs its own dev data; expected pairs or a BEIR folder"])
        retrieval = of_pairs(held, extra_documents=[row.document for row in rest])
        told = f"without data.dev its best step is chosen by {len(retrieval.queries)} of the training queries, which are held out"
        kept = make_examples(rest, left_out=(*examples.left_out, told))
    if len(kept) < 2:
        raise DataError([f"data.dev: {len(kept)} training rows besides the dev queries; expected at least 2"])
    return kept, retrieval


def without_queries(retrieval: RetrievalSet, asked: Collection[str]) -> RetrievalSet:
    """The same documents, and the queries that are not among `asked`."""
    queries = {identifier: text for identifier, text in retrieval.queries.items() if text not in asked}
    if len(queries) == len(retrieval.queries):
        return retrieval
    return _retrieval(queries, retrieval.documents, {identifier: retrieval.relevant[identifier] for identifier in queries})


def _examples(
    source: str, limit: int | None, problems: list[str], *, scored: bool, taught: bool = False, format: str | None
) -> list[Example]:
    if not _as_beir(source, format):
        return list(parse(first(read_records(source, problems), limit), problems, scored=scored, taught=taught))
    if scored or taught:
        raise DataError(
            [f"{Path(source).name}: a BEIR folder holds relevant pairs, and this loss takes scored ones; expected rows with a score"]
        )
    beir = read_beir(Path(source), "train", problems)
    pairs = [(query, document) for query, grades in beir.relevant.items() for document in grades if beir.documents[document]]
    return [Example(beir.queries[query], beir.documents[document]) for query, document in pairs[:limit]]


def _hold_out(rows: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split by query, so that no query is on both sides; the same queries whatever the order of the rows."""
    queries = sorted({row.query for row in rows}, key=_rank)
    held = set(queries[: min(HELD_OUT_MOST, max(1, round(HELD_OUT * len(queries))))])
    return [row for row in rows if row.query not in held], [row for row in rows if row.query in held]


def of_pairs(rows: Sequence[Example], *, extra_documents: Iterable[str]) -> RetrievalSet:
    """Pairs and further documents as a retrieval set; equal texts become one query or one document."""
    queries = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(row.query for row in rows))}
    texts = dict.fromkeys([row.document for row in rows])
    texts.update(dict.fromkeys(extra_documents))
    documents = {text: f"d{number}" for number, text in enumerate(texts)}
    relevant: dict[str, dict[str, int]] = {}
    for row in rows:
        relevant.setdefault(queries[row.query], {})[documents[row.document]] = 1
    return _retrieval({v: k for k, v in queries.items()}, {v: k for k, v in documents.items()}, relevant)


def _retrieval(queries: Mapping[str, str], documents: Mapping[str, str], relevant: Mapping[str, Mapping[str, int]]) -> RetrievalSet:
    return RetrievalSet(queries, documents, relevant, _hash([queries, documents, relevant]))


def _rank(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
