"""What is wrong with retrieval data before anyone trains on it, with examples, and a cleaned copy of it. Loads no model.

Each check is a function from the rows to a Finding; `remedy` says what --fix does about it.
"""

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedft.embedding.beir import drop_unreadable, is_beir, read_beir, splits
from embedft.embedding.near import NearIndex
from embedft.embedding.pairs import QUERY, as_list, columns_of, no_text, plays_a_part
from embedft.embedding.phrases import phrases_in, without
from embedft.errors import DataError
from embedft.files import expect_jsonl, expect_room, staged_folder, write_jsonl
from embedft.recipe import EmbeddingTrain
from embedft.records import Record, read_records
from embedft.words import folded, words

EXAMPLES = 3
MAX_LENGTH = EmbeddingTrain().max_length  # of a recipe that does not say


@dataclass(frozen=True)
class Pair:
    """One row as it stands; `label` None where the file has no such column. `scores`: a teacher's, of the document and each negative.
    `ids`: query and document id in a BEIR folder, `grade` what its qrels give the pair. `others`: columns that mean nothing here."""

    where: str
    query: str
    document: str
    negatives: tuple[str, ...] = ()
    label: Any = None
    scores: tuple[Any, ...] = ()
    ids: tuple[str, str] | None = None
    grade: int = 1
    others: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Finding:
    """`count` rows (or texts) of `of`; `examples`: 'where: what'. `remedy`: what --fix does; '' where only a person can judge."""

    kind: str
    count: int
    of: int
    says: str
    remedy: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    rows: int
    findings: tuple[Finding, ...]
    kept: int | None = None
    written: str | None = None

    @property
    def clean(self) -> bool:
        return not self.findings


@dataclass
class _State:
    """Rows still kept; each check may drop or change some when fixing."""

    pairs: list[Pair]
    findings: list[Finding] = field(default_factory=list[Finding])

    def note(self, kind: str, hits: Sequence[tuple[Pair, str]], says: str, remedy: str) -> None:
        if hits:
            examples = tuple(f"{pair.where}: {text}" for pair, text in hits[:EXAMPLES])
            self.findings.append(Finding(kind, len(hits), len(self.pairs), says, remedy, examples))


def check(
    train: str, *, eval: str | None = None, max_length: int = MAX_LENGTH, base: str = "minilm", fix: Path | None = None
) -> CheckReport:
    """Examine training rows, and their likeness to the evaluation's. Raises DataError where nothing can be read, or where `fix`
    would hold no row, or where `eval` asks nothing that can be read.

    `max_length` in tokens of `base`'s tokenizer. `fix`: a new file (.jsonl) or, for a BEIR folder, a new folder.
    """
    if fix is not None and not is_beir(train):
        expect_jsonl(fix)
    if fix is not None and fix.exists():
        raise DataError([f"{fix} exists already: name a new place for the cleaned copy"])
    if fix is not None and is_beir(train) and fix.resolve().is_relative_to(Path(train).resolve()):
        raise DataError([f"{fix} lies in {train}, which is copied: name a place beside it"])
    state = _State([])
    state.pairs = _read(train, state)
    rows = len(state.pairs)
    if not rows and not state.findings:
        raise DataError([f"{Path(train).name}: no rows; expected pairs of a query and a document, or a BEIR folder with a train split"])
    if fix is not None:
        expect_room(fix)
    for step in (_labels, _swapped, _templates, _empty, _negatives, _repeated, _false_negatives):
        step(state)
    _too_long(state, max_length=max_length, base=base)
    source = eval or (train if is_beir(train) and not {"test", "dev"}.isdisjoint(splits(Path(train))) else None)
    if source:
        _leaks(state, _evaluation_queries(source, state))
    if fix is None:
        return CheckReport(rows, tuple(state.findings))
    if not state.pairs:
        reasons = [f"{found.kind}: {found.count:,} of {found.of:,} {found.says} ({found.examples[0]})" for found in state.findings]
        raise DataError([f"{fix} is not written: no row is left of {Path(train).name}", *reasons])
    _write(train, fix, state.pairs)
    return CheckReport(rows, tuple(state.findings), len(state.pairs), str(fix))


def _read(source: str, state: _State) -> list[Pair]:
    problems: list[str] = []
    if is_beir(source):
        beir = read_beir(Path(source), "train", problems)
        pairs = [
            Pair(f"{query}/{document}", beir.queries[query], beir.documents[document], ids=(query, document), grade=grade)
            for query, grades in beir.relevant.items()
            for document, grade in grades.items()
        ]
    else:
        pairs: list[Pair] = []
        for row in read_records(source, problems):
            faults: list[str] = []
            if pair := _pair(row, faults):
                pairs.append(pair)
            problems.extend(faults[:1])  # a row counts once
    if problems:
        finding = Finding(
            "unreadable", len(problems), len(pairs) + len(problems), "cannot be read as rows", "left out", tuple(problems[:EXAMPLES])
        )
        state.findings.append(finding)
    return pairs


def _pair(row: Record, problems: list[str]) -> Pair | None:
    """By the trainer's own rules, so that what passes here is read there."""
    columns = columns_of(row, problems)
    if columns is None:
        return None
    values, sides = row.values, (columns.query, columns.document)
    if wrong := [name for name in sides if not isinstance(values[name], str | None)]:
        problems += (f"{row.where}: {no_text(name, values[name])}" for name in wrong)
        return None
    query, document = ((values[name] or "").strip() for name in sides)
    negatives = tuple(
        text.strip() if isinstance(text, str) else "" for name in columns.negatives for text in as_list(values[name], column=name)
    )
    label = values[columns.label] if columns.label else None
    scores = tuple(as_list(values[columns.scores], column=columns.scores)) if columns.scores else ()
    others = {name: value for name, value in values.items() if not plays_a_part(name)}
    return Pair(row.where, query, document, negatives, label, scores, others=others)


def _relevant(label: Any) -> bool:
    """What a label says of its row: a number above 0, or a word of assent."""
    try:
        return float(label) > 0
    except (TypeError, ValueError):
        return str(label).strip().lower() in {"yes", "true", "relevant", "positive"}


def _keep_negatives(pair: Pair, unwanted: Collection[str]) -> Pair:
    """Without some of its negatives, and without the teacher's scores of them."""
    kept = [number for number, text in enumerate(pair.negatives) if text not in unwanted]
    scores = pair.scores
    if len(scores) == 1 + len(pair.negatives):
        scores = (scores[0], *(scores[1 + number] for number in kept))
    return replace(pair, negatives=tuple(pair.negatives[number] for number in kept), scores=scores)


def _labels(state: _State) -> None:
    hits = [(pair, f"label {pair.label}") for pair in state.pairs if pair.label is not None]
    remedy = "rows dropped whose label is no number above 0 and no yes"
    state.note("label_column", hits, "carry a label, and every row of pairs counts as relevant", remedy)
    state.pairs = [replace(pair, label=None) for pair in state.pairs if pair.label is None or _relevant(pair.label)]


def _swapped(state: _State) -> None:
    """A query is a question, a document what answers it: where nearly all queries are far longer, the columns are swapped."""
    if len(state.pairs) < 5:
        return
    longer = [pair for pair in state.pairs if len(pair.query) > 1.5 * len(pair.document)]
    ratio = statistics.median(len(pair.query) / max(1, len(pair.document)) for pair in state.pairs)
    if len(longer) < 0.8 * len(state.pairs) or ratio < 2:
        return
    shown = [(pair, f"query of {len(pair.query)} characters, document of {len(pair.document)}") for pair in longer]
    swappable = all(pair.ids is None for pair in state.pairs)
    state.note("swapped_columns", shown, "have a query far longer than its document", "columns swapped back" if swappable else "")
    if swappable:
        state.pairs = [replace(pair, query=pair.document, document=pair.query) for pair in state.pairs]


def _empty(state: _State) -> None:
    hits = [(pair, "empty " + ("query" if not pair.query else "document")) for pair in state.pairs if not pair.query or not pair.document]
    hits += [(pair, "the query is its document") for pair in state.pairs if pair.query and pair.query == pair.document]
    _drop(state, "empty", hits, "have no text on one side, or the same on both", "dropped")


def _negatives(state: _State) -> None:
    """Negatives that no trainer takes."""
    hits = [(pair, _short(pair.query)) for pair in state.pairs if {"", pair.document}.intersection(pair.negatives)]
    state.note("bad_negatives", hits, "have a negative without text, or their document as one", "those negatives taken out")
    state.pairs = [_keep_negatives(pair, {"", pair.document}) for pair in state.pairs]


def _repeated(state: _State) -> None:
    seen: dict[tuple[str, str], str] = {}
    hits: list[tuple[Pair, str]] = []
    for pair in state.pairs:
        key = (folded(pair.query), folded(pair.document))
        if key in seen:
            hits.append((pair, f"the same pair as {seen[key]}: {_short(pair.query)}"))
        seen.setdefault(key, pair.where)
    _drop(state, "duplicates", hits, "repeat an earlier row", "dropped")


def _false_negatives(state: _State) -> None:
    """A negative that another row calls this query's document, however either is written."""
    relevant: dict[str, set[str]] = {}
    for pair in state.pairs:
        relevant.setdefault(folded(pair.query), set()).add(folded(pair.document))
    wrong = [{text for text in pair.negatives if folded(text) in relevant[folded(pair.query)]} for pair in state.pairs]
    hits = [(pair, _short(pair.query)) for pair, found in zip(state.pairs, wrong, strict=True) if found]
    state.note("false_negatives", hits, "have a negative that is a document of the same query", "those negatives taken out")
    state.pairs = [_keep_negatives(pair, found) for pair, found in zip(state.pairs, wrong, strict=True)]


def _templates(state: _State) -> None:
    """The same phrase in many queries; a phrase at their beginning or end is cut off by --fix."""
    queries = list(dict.fromkeys(pair.query for pair in state.pairs))
    phrases = phrases_in(queries)
    for phrase in phrases:
        hits = [(pair, _short(pair.query)) for pair in state.pairs if phrase in " ".join(words(pair.query))]
        outer = [pair for pair, _ in hits if pair.ids is None and without(pair.query, phrase)]
        remedy = "cut off where it begins or ends the query" if outer else ""
        state.note("template", hits, f"say {phrase!r} in the query", remedy)
        state.pairs = [replace(pair, query=without(pair.query, phrase) or pair.query) if pair.ids is None else pair for pair in state.pairs]


def _too_long(state: _State, *, max_length: int, base: str) -> None:
    from tokenizers import Tokenizer

    from embedft.base import BaseSpec, config_folder

    tokenizer = Tokenizer.from_file(str(config_folder(BaseSpec(base)) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = list(dict.fromkeys(text for pair in state.pairs for text in (pair.query, pair.document)))
    sizes = dict(zip(texts, (len(encoding.ids) for encoding in tokenizer.encode_batch(texts)), strict=True))
    for part in ("query", "document"):
        hits = [(pair, f"{sizes[getattr(pair, part)]} tokens") for pair in state.pairs if sizes[getattr(pair, part)] > max_length]
        says = f"have a {part} longer than {max_length} tokens; what is beyond is never read"
        state.note(f"long_{part}", hits, says, "")


def _evaluation_queries(source: str, state: _State) -> list[str]:
    """What the evaluation asks; rows need no document for that. DataError where it asks nothing: no leak would be found in it."""
    problems: list[str] = []
    if is_beir(source):
        known = splits(Path(source))
        beir = read_beir(Path(source), next((name for name in ("test", "dev") if name in known), "test"), problems)
        queries = {beir.queries[query] for query in beir.relevant}
    else:
        queries = {query for row in read_records(source, problems, split="test") if (query := _asked(row, problems))}
    if not queries:
        nothing = f"{Path(source).name}: no query to compare with; expected rows with a column {' or '.join(QUERY[:3])}, or a BEIR folder"
        raise DataError([nothing, *problems])
    if problems:
        says = "of the evaluation's rows cannot be read, and a leak of theirs is not seen"
        examples = tuple(problems[:EXAMPLES])
        state.findings.append(Finding("unreadable_evaluation", len(problems), len(problems) + len(queries), says, "", examples))
    return sorted(queries)


def _asked(row: Record, problems: list[str]) -> str:
    """A row's query, '' where it has none."""
    named = [name for name in row.values if name.strip().lower() in QUERY]
    query = row.values[named[0]] if len(named) == 1 else None
    if not isinstance(query, str):
        problems.append(f"{row.where}: " + (no_text(named[0], query) if len(named) == 1 else f"{len(named) or 'no'} query columns"))
    elif not query.strip():
        problems.append(f"{row.where}: {named[0]} is empty; expected text")
    return query.strip() if isinstance(query, str) else ""


def _leaks(state: _State, queries: Sequence[str]) -> None:
    index = NearIndex(queries)
    hits: list[tuple[Pair, str]] = []
    for pair in state.pairs:
        found = next(index.like(pair.query), None)
        if found:
            hits.append((pair, f"{_short(pair.query)!r} is {found[1]:.0%} the evaluation's {_short(queries[found[0]])!r}"))
    _drop(state, "leakage", hits, "have a query that the evaluation asks in nearly the same words", "dropped")


def _drop(state: _State, kind: str, hits: Sequence[tuple[Pair, str]], says: str, remedy: str) -> None:
    state.note(kind, hits, says, remedy)
    dropped = {id(pair) for pair, _ in hits}
    state.pairs = [pair for pair in state.pairs if id(pair) not in dropped]


def _short(text: str) -> str:
    return text if len(text) <= 70 else text[:67] + "…"


def _write(source: str, out: Path, pairs: Sequence[Pair]) -> None:
    if not is_beir(source):
        rows: Iterable[dict[str, Any]] = (
            {"query": pair.query, "document": pair.document}
            | json.loads(json.dumps(pair.others, default=str))  # a Parquet file's may be dates
            | ({"negatives": list(pair.negatives)} if pair.negatives else {})
            | ({"scores": list(pair.scores)} if pair.scores and pair.negatives else {})
            for pair in pairs
        )
        write_jsonl(out, rows)
        return
    import shutil

    with staged_folder(out.parent) as stage:
        shutil.copytree(source, stage / "copy")
        lines = ["query-id\tcorpus-id\tscore", *(f"{pair.ids[0]}\t{pair.ids[1]}\t{pair.grade}" for pair in pairs if pair.ids)]
        (stage / "copy" / "qrels" / "train.tsv").chmod(0o644)
        (stage / "copy" / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        drop_unreadable(stage / "copy")
        (stage / "copy").rename(out)
