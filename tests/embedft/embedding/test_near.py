"""Near texts: those, and only those, that comparing all with all would find."""

import random

import pytest

from embedft.embedding.near import NearIndex, jaccard, shingles

SUBJECTS = ("boiler", "tram", "violin", "glacier", "invoice", "beehive", "turbine", "passport", "orchard", "modem", "ferry", "kiln")


def test_near_texts_are_found_at_the_threshold_and_not_below_it() -> None:
    texts = [f"one two three four five six seven eight nine {word}" for word in SUBJECTS]
    index = NearIndex(texts, threshold=0.8)
    best, similarity = next(index.like("One two three, four five six seven eight nine TRAM."))
    assert (best, similarity) == (1, 1.0)
    assert sum(1 for _ in index.like(texts[0])) == len(texts)
    assert not list(index.like("one two three and then all other words entirely"))


def test_near_texts_are_those_that_comparing_all_would_find() -> None:
    generator = random.Random(7)
    texts = [" ".join(generator.choices("abcdefghijklmnop", k=generator.randint(0, 14))) for _ in range(200)]
    asked = [text.replace(generator.choice("abcdefgh"), "z") for text in texts]
    for threshold in (0.5, 0.8, 1.0):
        index = NearIndex(texts, threshold=threshold)
        every = [[i for i, other in enumerate(texts) if jaccard(shingles(text), shingles(other)) >= threshold] for text in asked]
        assert [sorted(number for number, _ in index.like(text)) for text in asked] == every
        assert any(every)


def test_queries_of_one_template_are_not_all_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    monkeypatch.setattr("embedft.embedding.near.jaccard", lambda *sets: compared.append(sets) or jaccard(*sets))
    index = NearIndex([f"what are the treatments for illness{number}" for number in range(500)])
    assert [number for number, _ in index.like("what are the treatments for ILLNESS7?")] == [7]
    assert len(compared) < 5
