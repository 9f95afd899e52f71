"""Words of texts in many scripts."""

import pytest

from embedft.words import content_words, folded, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The read_csv of C-3PO!", ["the", "read", "csv", "of", "c", "3po"]),
        ("什么是AI？ことば", ["什", "么", "是", "ai", "こ", "と", "ば"]),
        ("दिन और दान", ["दिन", "और", "दान"]),  # day and donation, told apart by a vowel's mark alone
        ("cafe\u0301", ["café"]),
        ("دِن 기계 학습", ["دِن", "기계", "학습"]),
        ("?!", []),
    ],
)
def test_words_are_those_of_the_script(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_stop_words_are_left_out() -> None:
    assert content_words("The cat is on the mat") == ["cat", "mat"]


def test_texts_are_the_same_but_for_case_space_and_their_end_and_no_sign_within_is_lost() -> None:
    assert folded(" What is  C++?\n") == folded("what IS c++")
    assert len({folded(text) for text in ("a + b", "a - b", "What is C++?", "What is C#?", "What is C?")}) == 5
