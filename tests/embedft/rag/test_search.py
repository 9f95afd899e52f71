"""Fusion, its fitted weights, and what each stage is handed."""

from pathlib import Path

import pytest

from embedft.errors import EngineFailed, UsageError
from embedft.rag.answer import Source, cited, faithfulness, messages_of
from embedft.rag.index import VectorIndex
from embedft.rag.rows import Chunk
from embedft.rag.search import Stages, fit_weight, rrf, search, weighted
from tests.embedft.rag.test_index import filled, label, vectors

DENSE, SPARSE = [(1, 0.9), (2, 0.8), (3, 0.1)], [(3, 12.0), (4, 6.0)]


def test_reciprocal_ranks_add_up() -> None:
    assert rrf([DENSE, SPARSE])[0] == (3, pytest.approx(1 / 63 + 1 / 61))
    assert [row for row, _ in rrf([DENSE, []])] == [1, 2, 3]


def test_weights_scale_each_list_before_they_are_added() -> None:
    assert dict(weighted(DENSE, SPARSE, 0.25)) == pytest.approx({1: 0.25, 2: 0.25 * 0.875, 3: 0.75, 4: 0.0})
    assert weighted(DENSE, SPARSE, 1.0)[0][0] == 1


def test_a_weight_is_fitted_to_where_the_relevant_rows_are() -> None:
    # weighted, row 1 has w, row 2 0.875 w, row 3 1 - w, and row 4 nothing
    assert fit_weight([(DENSE, SPARSE, {3})]) == pytest.approx((0.0, 1.0))
    assert fit_weight([(DENSE, SPARSE, {1})]) == pytest.approx((0.5, 1.0))
    assert fit_weight([(DENSE, SPARSE, {2})] * 3) == pytest.approx((0.55, 0.5))  # second once 0.875 w > 1 - w
    assert fit_weight([(DENSE, SPARSE, {1}), (DENSE, SPARSE, {2})]) == pytest.approx((0.55, 0.75))
    assert fit_weight([(DENSE, SPARSE, {1}), (DENSE, SPARSE, {3})] * 2)[1] == pytest.approx(0.75)
    with pytest.raises(UsageError):
        fit_weight([])


def test_each_stage_can_be_left_out(tmp_path: object) -> None:
    rows = vectors(30)
    index = filled(tmp_path / "i", rows)  # type: ignore[operator]
    with pytest.raises(UsageError, match="without BM25"):
        search(index, "number7", label(rows[3]), Stages(fusion="rrf"))
    index.save()
    assert search(index, "number7", label(rows[3]), Stages(k=1))[0].chunk.id == "c3"
    assert search(index, "number7", None, Stages(k=1, fusion="sparse"))[0].chunk.id == "c7"
    assert {hit.chunk.id for hit in search(index, "number7", label(rows[3]), Stages(k=2, fusion="rrf"))} == {"c3", "c7"}
    only_dense = Stages(k=1, fusion="weights", weight=1.0)
    assert search(index, "number7", label(rows[3]), only_dense)[0].chunk.id == "c3"
    last = Stages(k=2, rerank=lambda _, texts: range(len(texts)), rerank_depth=5)
    dense = search(index, "", label(rows[3]), Stages(k=5))
    assert [hit.chunk.id for hit in search(index, "", label(rows[3]), last)] == [dense[4].chunk.id, dense[3].chunk.id]
    with pytest.raises(EngineFailed, match="1 scores for 5"):
        search(index, "", label(rows[3]), Stages(k=2, rerank=lambda *_: [1.0], rerank_depth=5))


def test_words_are_not_looked_up_in_less_than_the_index_holds(tmp_path: Path) -> None:
    rows = vectors(3)
    index = VectorIndex(tmp_path / "i", lineage="L", made_by="base")
    index.save()
    assert index.by_words("green", 5) == []
    for number in range(3):
        index.add([Chunk(f"c{number}", "d", "green tea")], rows[number : number + 1], lineage="L", made_by="base")
        with pytest.raises(UsageError, match="has new chunks without BM25 until it is saved: save it"):
            search(index, "green", label(rows[0]), Stages(fusion="rrf"))
        index.save(bm25=number < 2)
        if number < 2:
            assert len(search(index, "green", None, Stages(fusion="sparse"))) == number + 1
    with pytest.raises(UsageError, match="was made without BM25"):
        index.by_words("green", 5)


def test_a_question_is_looked_up_in_the_table_once_and_reranked_by_what_was_embedded(tmp_path: Path) -> None:
    rows, asked = vectors(2), list[str]()
    index = VectorIndex(tmp_path / "i", lineage="L", made_by="base")
    index.add([Chunk("c0", "d", "green", embedded="Tea\ngreen"), Chunk("c1", "d", "white")], rows, lineage="L", made_by="base")
    index.save()
    index._table._db.set_trace_callback(asked.append)
    read = list[str]()
    stages = Stages(k=2, fusion="rrf", rerank=lambda _, texts: (read.extend(texts), [1.0] * len(texts))[1])
    assert len(search(index, "green", label(rows[0]), stages)) == 2
    assert len([query for query in asked if "FROM chunk WHERE row IN" in query]) == 1
    assert sorted(read) == ["Tea\ngreen", "white"]


def test_citations_and_faithfulness() -> None:
    sources = [Source(1, "a", "a#0", 1.0, "Green tea at eighty degrees"), Source(2, "b", "b#0", 0.5, "Bread needs flour")]
    assert "[2] Bread needs flour" in messages_of("Why?", sources)[0]["content"]
    assert cited("see [2] and [9]", sources) == [2]
    assert cited("eighty degrees", sources) == [1]
    assert cited("nothing alike", sources) == []
    assert faithfulness("eighty flour moon", sources) == pytest.approx(2 / 3)


def test_what_was_deleted_since_the_last_save_takes_no_place_among_the_words_found(tmp_path: Path) -> None:
    index = filled(tmp_path / "i", vectors(3))
    index.add([Chunk("e", "e", "number0 number0")], vectors(1, seed=5), lineage="L", made_by="base")
    with pytest.raises(UsageError, match="save it"):
        search(index, "number0", None, Stages(k=1, fusion="sparse"))
    index.save()
    assert search(index, "number0", None, Stages(k=1, fusion="sparse"))[0].chunk.id == "e"
    index.delete(ids=["e"])
    assert [hit.chunk.id for hit in search(index, "text number0", None, Stages(k=1, fusion="sparse"))] == ["c0"]


def test_an_index_saved_in_the_middle_of_a_search_does_not_mix_up_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = vectors(30)
    index = filled(tmp_path / "i", rows)
    index.save()

    def busy(*_: object) -> list[tuple[int, float]]:
        index.delete(document="d0")  # the rows behind it move up by ten
        index.save()
        return []

    monkeypatch.setattr(index.bm25, "search", busy)
    assert search(index, "anything", label(rows[15]), Stages(k=1, fusion="rrf"))[0].chunk.id == "c15"
