"""An answer against what was expected, row by row. Plain text; knows no model.

A row may have several references: exact_match and token_f1 take the best of them, BLEU and chrF count them together.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

TEXT = ("bleu", "chrf")  # of whole texts: they say nothing of labels, so they are taken only when asked for


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Equal but for white space at the ends."""
    return float(any(answer.strip() == reference.strip() for reference in references))


def best_f1(answer: str, references: Sequence[str]) -> float:
    return max(token_f1(answer, reference) for reference in references)


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over lower-case words (as SQuAD, arXiv 1606.05250, without its article rule); where
    either has none, as of signs alone, 1 if they are equal."""
    left, right = Counter(_words(answer)), Counter(_words(expected))
    if not left or not right:
        return exact_match(answer, [expected])
    shared = (left & right).total()
    return 2.0 * shared / (left.total() + right.total())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def text_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(metric → a score a row, metric → the score of all rows), in 0 … 100, by sacrebleu's defaults (arXiv 1804.08771).

    A corpus score is no mean of its rows'; the rows' are smoothed sentence scores and serve to compare two models row by row.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    rows: dict[str, list[float]] = {}
    whole: dict[str, float] = {}
    kinds: dict[str, tuple[Any, Any]] = {"bleu": (BLEU(effective_order=True), BLEU()), "chrf": (CHRF(), CHRF())}
    for name, (sentence, corpus) in kinds.items():
        given = zip(answers, references, strict=True)
        rows[name] = [float(sentence.sentence_score(answer, list(expected)).score) for answer, expected in given]
        whole[name] = float(corpus.corpus_score(list(answers), _columns(references)).score)
    return rows, whole


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """One list a reference number, each as long as there are rows; None where a row has fewer."""
    most = max(len(expected) for expected in references)
    return [[expected[number] if number < len(expected) else None for expected in references] for number in range(most)]
