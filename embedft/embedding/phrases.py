"""Phrases that many queries share, as a generator's template leaves them behind, and queries without them. Knows no data format."""

from collections import Counter
from collections.abc import Sequence

from embedft.words import words

PHRASE, LONGEST = 4, 12  # words; shorter phrases are language, not a template
SHARE, LEAST = 0.1, 8  # of the distinct queries, and so many, that must hold a phrase
ASKING = frozenset(("what", "how", "which", "who", "whom", "whose", "when", "where", "why", "is", "are", "was", "were")) | frozenset(
    ("can", "could", "do", "does", "did", "should", "would")
)


def phrases_in(queries: Sequence[str]) -> list[str]:
    """Word sequences of at least PHRASE words in many queries, each as long as it can be without losing a fifth of them.

    With a question word in it a phrase is how people ask ("what is the role of"), not what a generator left behind.
    """
    counts = _common([words(query) for query in queries], least=max(LEAST, SHARE * len(queries)))
    long = (gram for gram in counts if len(gram) >= PHRASE and len("".join(gram)) >= 2 * PHRASE)  # a Chinese word is two characters
    common = sorted(long, key=lambda gram: (-len(gram), -counts[gram], gram))
    kept: list[tuple[str, ...]] = []
    for gram in common:
        text = f" {' '.join(gram)} "
        inside = [other for other in kept if text in f" {' '.join(other)} " and counts[other] >= 0.8 * counts[gram]]
        overlapping = [other for other in kept if set(gram) & set(other) and counts[other] >= 0.8 * counts[gram]]
        if not inside and not overlapping:
            kept.append(gram)
    return [" ".join(gram) for gram in kept[:5]]


def _common(tokens: Sequence[Sequence[str]], *, least: float) -> dict[tuple[str, ...], int]:
    """Word sequences of up to LONGEST words that are in so many rows, and in how many. The parts of one are in as many at least: what
    is longer is counted only where its two ends are here already (Agrawal and Srikant 1994), else millions would be."""
    kept: dict[tuple[str, ...], int] = {(): len(tokens)}
    for size in range(1, LONGEST + 1):
        counts: Counter[tuple[str, ...]] = Counter()
        for row in tokens:
            grams = {tuple(row[start : start + size]) for start in range(len(row) - size + 1)}
            counts.update(gram for gram in grams if gram[1:] in kept and gram[:-1] in kept and ASKING.isdisjoint(gram))
        found = {gram: count for gram, count in counts.items() if count >= least}
        if not found:
            break
        kept |= found
    return kept


def without(query: str, phrase: str) -> str:
    """The query without the phrase at its beginning or end; '' where it is in the middle or nothing is left."""
    parts, target = query.split(), phrase.split()
    said = [words(part) for part in parts]
    if end := _begins(said, target):
        rest = " ".join(parts[end:]).lstrip(" ,:;-–")
        return rest[:1].upper() + rest[1:]
    if end := _begins([part[::-1] for part in said[::-1]], target[::-1]):
        return " ".join(parts[:-end]).rstrip(" ,:;-–")
    return ""


def _begins(said: Sequence[list[str]], target: list[str]) -> int:
    """With how many of its parts, but not with all, a query says the target; 0 where it begins otherwise."""
    found: list[str] = []
    for end, part in enumerate(said[:-1], start=1):
        found += part
        if found == target:
            return end
        if len(found) > len(target):
            break
    return 0
