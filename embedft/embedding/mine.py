"""Hard negatives for training pairs: documents that rankers put high and that do not answer. Trains nothing.

A document is kept out where it is known to answer, says nearly the same as an answer, or scores too near to one (absolute and
relative margin; de Souza Moreira et al. 2024, arXiv 2407.15831). Where all rankers put a document above the labelled answer, the
label is in doubt: it goes to the review file, not into training.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedft.embedding.beir import is_beir, read_beir
from embedft.embedding.data import answering_negatives, make_examples
from embedft.embedding.evaluate import bm25_top
from embedft.embedding.near import jaccard
from embedft.embedding.near import shingles as shingles_of
from embedft.embedding.pairs import Example, parse
from embedft.embedding.sided import SidedEncoder
from embedft.encode import Encoder, Progress
from embedft.errors import DataError
from embedft.files import expect_jsonl, expect_room, write_jsonl
from embedft.ranks import reciprocal
from embedft.records import read_records
from embedft.vectors import published_settings, unit

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore

SAME = 0.9  # Jaccard similarity of words and word pairs from which a document says what an answer says
shingles = lru_cache(maxsize=1 << 12)(shingles_of)  # of a document once, not of every query that it is near; some 100 MB at most


@dataclass(frozen=True)
class Mining:
    """`depth`: candidates a ranker. A negative's cosine stays below the answer's − `absolute` and below (1 − `relative`) of it."""

    negatives: int = 4
    depth: int = 50
    absolute: float = 0.0
    relative: float = 0.05
    seed: int = 7


@dataclass(frozen=True)
class MineReport:
    """`kept_out`: candidates and pairs by reason. `negatives`: those added. `filled`: drawn at random where the rankers gave too few."""

    rows: int
    negatives: int
    filled: int
    short: int
    review: int
    kept_out: dict[str, int]
    path: str
    review_path: str | None


@dataclass
class _Query:
    """One query: its documents known to answer, and what each ranker lists (rows of the corpus, best first).

    `similar`: each ranker's vectors of the corpus (n, d), all queries', and of the query (d,); a cosine is computed when it is asked for.
    """

    text: str
    answers: frozenset[int]
    lists: dict[str, list[int]]
    similar: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    doubtful: list[int] = field(default_factory=list[int])


def mine(
    source: str,
    out: Path,
    *,
    mining: Mining,
    base: str | None = None,
    quantization: str = "none",
    adapter: str | None = None,
    store: "AdapterStore | None" = None,
    max_length: int = 256,
    cross_encoder: str | None = None,
    review: Path | None = None,
    encoded: Progress | None = None,
) -> MineReport:
    """Write `source`'s training pairs with `mining.negatives` more negatives each to `out` (JSONL: query, document, negatives).

    A pair that is left without any is not written: a loss takes as many negatives of every row as the poorest row has.

    `base`: the model that ranks (default: minilm). `adapter`: also ranks with this adapter of the store, on the base that it was
    trained on (`base`: where its passport's name does not lead there). `cross_encoder`: a model folder; what it
    scores as high as the answer is kept out, and its scores are written (column `scores`: the answer's, then each negative's).
    `encoded` is told of the texts that each ranker encodes. Raises DataError, AdapterNotFound, BaseNotFound.
    """
    for path in (out, review):
        if path:
            expect_jsonl(path)
    if review and review.resolve() == out.resolve():
        raise DataError([f"{review}: doubtful labels and mined rows cannot go to one file: name another for --review"])
    if out.exists() or (review and review.exists()):
        raise DataError([f"{out if out.exists() else review} exists already: name a new file"])
    rows, documents = _read(source)
    for path in (out, review):
        if path:
            expect_room(path)
    rankers = _rankers(base, quantization, adapter, store, max_length)
    for encoder in rankers.values():
        encoder.progress = encoded
    judge = _judge(cross_encoder)
    queries = _queries(rows, documents, rankers, mining)
    reasons: Counter[str] = Counter()
    chosen = {query.text: _choose(query, documents, mining, reasons) for query in queries}
    lines, counts, filled = _rows(rows, documents, queries, chosen, mining, judge, reasons)
    if not lines:
        raise DataError(
            [f"{Path(source).name}: no pair has a negative left ({dict(reasons)}); expected more documents, or smaller margins"]
        )
    write_jsonl(out, lines)
    doubts = [row for query in queries for row in _doubts(query, documents)]
    if review:
        write_jsonl(review, doubts)
    short = sum(count < mining.negatives for count in counts)
    where = str(review) if review else None
    return MineReport(len(lines), sum(counts), filled, short, len(doubts), dict(reasons), str(out), where)


def _read(source: str) -> tuple[tuple[Example, ...], list[str]]:
    """Training pairs and every document there is."""
    problems: list[str] = []
    if is_beir(source):
        beir = read_beir(Path(source), "train", problems)
        rows = [Example(beir.queries[q], beir.documents[d]) for q, grades in beir.relevant.items() for d in grades if beir.documents[d]]
        documents = list(dict.fromkeys(text for text in beir.documents.values() if text))
    else:
        rows = list(parse(read_records(source, problems), problems, scored=False))
        documents = list(dict.fromkeys(text for row in rows for text in (row.document, *row.negatives)))
        problems += answering_negatives(rows)
    if problems:
        raise DataError(problems)
    examples = make_examples(rows)
    if len(examples) < 1 or len(documents) < 2:
        raise DataError([f"{Path(source).name}: {len(examples)} pairs and {len(documents)} documents; expected at least 1 and 2"])
    return examples.rows, documents


def _rankers(base: str | None, quantization: str, adapter: str | None, store: "AdapterStore | None", max_length: int) -> dict[str, Encoder]:
    """Name → encoder. With an adapter: itself, and its base with it switched off."""
    from embedft.base import BaseSpec, base_folder, load_model
    from embedft.model_folder import describe

    if adapter is None:
        folder = base_folder(BaseSpec(base or "minilm", quantization))
        info = describe(folder)
        settings = published_settings(info, min(max_length, info.max_length))
        return {"base": Encoder(load_model(folder, task="embedding"), folder, settings)}
    from embedft.adapters.store import AdapterStore
    from embedft.embedding.proof import open_adapter
    from embedft.verify import settings_of

    model, folder, passport = open_adapter(adapter, store or AdapterStore(), base=base)
    settings = settings_of(passport)
    return {name: SidedEncoder(model, folder, settings, side=side) for name, side in (("base", "none"), ("adapter", passport.side))}


def _queries(rows: Sequence[Example], documents: Sequence[str], rankers: Mapping[str, Encoder], mining: Mining) -> list[_Query]:
    numbers = {text: number for number, text in enumerate(documents)}
    answers: dict[str, set[int]] = {}
    for row in rows:
        answers.setdefault(row.query, set()).add(numbers[row.document])
    texts = list(answers)
    lexical = bm25_top(texts, documents, depth=mining.depth)
    queries = [_Query(text, frozenset(answers[text]), {"bm25": lexical[i]}, {}) for i, text in enumerate(texts)]
    for name, encoder in rankers.items():
        vectors, corpus = unit(encoder.encode(texts, input_type="query")), unit(encoder.encode(documents, input_type="document"))
        for query, vector in zip(queries, vectors, strict=True):
            similar = corpus @ vector
            query.similar[name] = corpus, vector
            query.lists[name] = [int(row) for row in np.argsort(-similar, kind="stable")[: mining.depth]]
    return queries


def _choose(query: _Query, documents: Sequence[str], mining: Mining, reasons: Counter[str]) -> list[int]:
    """Twice as many as are asked for, the rankers taking turns; a cross-encoder may strike some."""
    said = [shingles(documents[row]) for row in query.answers]
    kept: list[int] = []
    turns = dict.fromkeys(row for turn in zip_longest(*query.lists.values()) for row in turn if row is not None)
    for row in turns:
        if row in query.answers:
            continue
        reason = _reason(query, row, documents, said, mining)
        if reason == "outranks the answer everywhere":
            query.doubtful.append(row)
        if reason:
            reasons[reason] += 1
        else:
            kept.append(row)
        if len(kept) == 2 * mining.negatives:
            break
    return kept


def _reason(query: _Query, row: int, documents: Sequence[str], said: Sequence[frozenset[str]], mining: Mining) -> str:
    """Why this document is no negative of the query; '' where it is one."""
    content = shingles(documents[row])
    if any(jaccard(content, answer) >= SAME for answer in said):
        return "says what the answer says"
    if all(_rank(ranked, {row}) < _rank(ranked, query.answers) for ranked in query.lists.values()):
        return "outranks the answer everywhere"
    return "scores too near to the answer" if _too_near(query, row, mining) else ""


def _too_near(query: _Query, row: int, mining: Mining) -> bool:
    for corpus, vector in query.similar.values():
        best = float((corpus[sorted(query.answers)] @ vector).max())
        if float(corpus[row] @ vector) > min(best - mining.absolute, best - abs(best) * mining.relative):
            return True
    return False


def _rank(ranked: Sequence[int], rows: Iterable[int]) -> int:
    places = {row: place for place, row in enumerate(ranked)}
    return min((places.get(row, len(ranked)) for row in rows), default=len(ranked))


def _rows(
    rows: Sequence[Example],
    documents: Sequence[str],
    queries: Sequence[_Query],
    chosen: Mapping[str, list[int]],
    mining: Mining,
    judge: Any,
    reasons: Counter[str],
) -> tuple[list[dict[str, Any]], list[int], int]:
    """What is written, how many negatives each line got, and how many of all were drawn at random."""
    known, filled = {query.text: query for query in queries}, 0
    lines: list[dict[str, Any]] = []
    counts: list[int] = []
    for row in rows:
        query, candidates = known[row.query], [c for c in chosen[row.query] if documents[c] not in row.negatives]
        scores: dict[str, float] = {}
        if judge is not None:
            texts = [row.document, *row.negatives, *(documents[c] for c in candidates)]
            scores = dict(zip(texts, map(float, judge.predict([(row.query, text) for text in texts])), strict=True))
            struck = [c for c in candidates if scores[documents[c]] >= scores[row.document]]
            reasons["the cross-encoder prefers it"] += len(struck)
            candidates = [c for c in candidates if c not in struck]
        picked = candidates[: mining.negatives]
        extra = _fill(query, documents, picked, mining, own=row.negatives) if judge is None else []
        negatives = [*row.negatives, *(documents[c] for c in (*picked, *extra))]
        if not negatives:
            reasons["pairs without a negative, not written"] += 1
            continue
        filled += len(extra)
        line: dict[str, Any] = {"query": row.query, "document": row.document, "negatives": negatives}
        if judge is not None:
            line["scores"] = [round(scores[text], 6) for text in (row.document, *negatives)]
        lines.append(line)
        counts.append(len(picked) + len(extra))
    return lines, counts, filled


def _fill(query: _Query, documents: Sequence[str], picked: Sequence[int], mining: Mining, *, own: Sequence[str]) -> list[int]:
    """Documents drawn at random, always the same for a query, so that every row has as many negatives."""
    missing, taken = mining.negatives - len(picked), {*picked, *query.answers}
    if missing <= 0:
        return []
    said = [shingles(documents[row]) for row in query.answers]
    order = list(range(len(documents)))
    random.Random(f"{mining.seed}-{query.text}").shuffle(order)
    found: list[int] = []
    for row in order:
        if row not in taken and documents[row] not in own and not _reason(query, row, documents, said, mining):
            found.append(row)
            if len(found) == missing:
                break
    return found


def _doubts(query: _Query, documents: Sequence[str]) -> list[dict[str, Any]]:
    """One line for a person to judge: does this document answer the query as well?"""

    def fused(rows: Iterable[int]) -> float:
        return sum(reciprocal(_rank(ranked, rows) + 1) for ranked in query.lists.values())

    answer = documents[min(query.answers, key=lambda row: -fused([row]))]
    return [
        {
            "query": query.text,
            "candidate": documents[row],
            "answer": answer,
            "ranks": {name: _rank(ranked, [row]) + 1 for name, ranked in query.lists.items()},
            "answer_ranks": {name: _rank(ranked, query.answers) + 1 for name, ranked in query.lists.items()},
            "fused": round(fused([row]), 5),
            "answer_fused": round(fused(query.answers), 5),
        }
        for row in query.doubtful
    ]


_CLASSIFIER = "ForSequenceClassification"


def _judge(folder: str | None) -> Any:
    if folder is None:
        return None
    from sentence_transformers import CrossEncoder
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        if not (Path(folder, "modules.json").is_file() or any(name.endswith(_CLASSIFIER) for name in config.architectures or ())):
            raise ValueError("it is no sequence classifier, so what scores pairs would be drawn at random")
        return CrossEncoder(folder)
    except (OSError, ValueError) as error:
        raise DataError([f"cross-encoder {folder}: cannot be loaded: {str(error).splitlines()[0][:200]}"]) from None
