"""The words of a text in any script: what BM25, near-duplicates and overlaps count. Knows no language but English's stop words.

Chinese and Japanese put no space between words: there each character is one. A letter keeps its marks (vowels in Hindi or Arabic).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bm25s import BM25

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han, for a class in a pattern
_LAST = " .!?…。！？"


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation; split at underscores."""
    return _pattern().findall(unicodedata.normalize("NFC", text).lower())


@cache
def _pattern() -> re.Pattern[str]:
    """Made when it is first wanted: all of Unicode's marks are looked for."""
    marks = "".join(re.escape(chr(code)) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[{UNSPACED}][{marks}]*|(?:[^\W_{UNSPACED}][{marks}]*)+")


def content_words(text: str) -> list[str]:
    """`words` without English's stop words."""
    skipped = _stop_words()
    return [word for word in words(text) if word not in skipped]


@cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


def folded(text: str) -> str:
    """The same for texts that differ only in case, in white space and in the mark that ends them."""
    return " ".join(text.casefold().split()).rstrip(_LAST)


def bm25_of(texts: Sequence[str]) -> "BM25 | None":
    """BM25 (Robertson's, bm25s' defaults) over the texts' content words; None where there is none."""
    import bm25s

    tokens = [content_words(text) for text in texts]
    if not any(tokens):
        return None
    index: Any = bm25s.BM25()
    index.index(tokens, show_progress=False)
    return index
