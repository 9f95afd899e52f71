"""The index: what it finds, what it refuses, and what is left of it after a restart, a crash or damage."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from embedft.errors import IndexInvalid, IndexNotFound, LineageMismatch, UsageError
from embedft.rag.ann import AnnSettings, Kind
from embedft.rag.engines import Labelled, Rows
from embedft.rag.index import VectorIndex
from embedft.rag.linear_map import fit
from embedft.rag.rows import Chunk
from embedft.rag.versions import current_version

D = 32
LISTS = {"lists": 4, "probes": 4, "bits": 4, "refine": 32}  # IVF-PQ that is trained in an instant


def vectors(count: int, *, seed: int = 0) -> Rows:
    made = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def chunks(count: int, *, first: int = 0) -> list[Chunk]:
    return [Chunk(f"c{i}", f"d{i // 10}", f"text number{i}") for i in range(first, first + count)]


def label(row: Rows, lineage: str = "L") -> Labelled:
    return Labelled(row.tolist(), lineage=lineage, documents=lineage, made_by=f"adapter of {lineage}")


def filled(folder: Path, rows: Rows, **settings: object) -> VectorIndex:
    index = VectorIndex(folder, lineage="L", made_by="base", settings=AnnSettings(**settings))  # type: ignore[arg-type]
    index.add(chunks(len(rows)), rows, lineage="L", made_by="base")
    return index


def ids(index: VectorIndex, row: Rows, k: int = 3) -> list[str]:
    return [hit.chunk.id for hit in index.search(label(row), k)]


@pytest.mark.parametrize(("kind", "count"), [("flat", 500), ("hnsw", 2000), ("ivfpq", 1500)])
def test_each_kind_finds_the_nearest_before_and_after_a_restart(tmp_path: Path, kind: Kind, count: int) -> None:
    rows = vectors(count)
    index = filled(tmp_path / "i", rows, kind=kind, **LISTS)
    index.save()
    again = VectorIndex.open(tmp_path / "i", verify=True)
    assert again.kind == kind
    for number in (0, 7, count - 1):
        query = rows[number] + 0.05 * vectors(1, seed=9)[0]
        assert ids(index, query)[0] == ids(again, query)[0] == f"c{number}"
    np.testing.assert_array_equal(again.vectors(np.array([3, 5])), rows[[3, 5]])  # exact, whatever the kind


@pytest.mark.parametrize(("kind", "count"), [("flat", 300), ("hnsw", 2000), ("ivfpq", 1500)])
def test_deletes_and_updates_survive_a_restart(tmp_path: Path, kind: Kind, count: int) -> None:
    rows = vectors(count)
    filled(tmp_path / "i", rows, kind=kind, **LISTS).save()
    index = VectorIndex.open(tmp_path / "i")
    assert index.delete(ids=["c5"]) == 1
    assert index.delete(document="d2") == 10
    changed = vectors(1, seed=3)
    index.add([Chunk("c7", "d0", "new text")], changed, lineage="L", made_by="base")
    before = [ids(index, row) for row in (rows[5], rows[25], rows[7], changed[0])]
    index.save()
    again = VectorIndex.open(tmp_path / "i", verify=True)
    for opened in (index, again):
        assert len(opened) == count - 11
        assert "c5" not in ids(opened, rows[5])
        assert "c25" not in ids(opened, rows[25])
        assert ids(opened, changed[0])[0] == "c7"
        assert opened.chunks(["c7"])[0].text == "new text"
        assert "c7" not in ids(opened, rows[7])[:1]
        assert [ids(opened, row) for row in (rows[5], rows[25], rows[7], changed[0])] == before
    grown = kind != "flat"  # a graph or lists are added to; flat is written anew without the dead
    assert json.loads((tmp_path / "i" / "versions" / (again.version or "") / "meta.json").read_text())["rows"] == (
        count + 1 if grown else count - 11
    )


def test_a_graph_with_many_dead_is_built_anew(tmp_path: Path) -> None:
    rows = vectors(1000)
    index = filled(tmp_path / "i", rows, kind="hnsw")
    index.save()
    index.delete(ids=[f"c{i}" for i in range(300)])
    index.save()
    assert json.loads((tmp_path / "i" / "versions" / (index.version or "") / "meta.json").read_text())["rows"] == 700
    assert ids(index, rows[999])[0] == "c999"
    assert index.bm25
    assert index.found(index.bm25.search("number999", 1))[0].chunk.id == "c999"  # renumbered rows: BM25 and text still fit


def test_foreign_vectors_and_queries_are_refused_and_both_lineages_named(tmp_path: Path) -> None:
    index = filled(tmp_path / "i", vectors(20))
    with pytest.raises(LineageMismatch, match=r"lineage L \(by base\).*lineage M \(by adapter of M\).*max_length and prompt are the same"):
        index.search(label(vectors(1)[0], "M"), 1)
    with pytest.raises(LineageMismatch):
        index.add(chunks(1), vectors(1), lineage="M", made_by="m")
    with pytest.raises(IndexInvalid, match=r"32 dimensions.*16"):
        index.add(chunks(1), vectors(1)[:, :16], lineage="L", made_by="base")
    with pytest.raises(IndexInvalid, match=r"32 dimensions, and the query has 16"):
        index.search(label(vectors(1)[0][:16]), 1)


def test_a_query_only_adapter_searches_the_shared_documents(tmp_path: Path) -> None:
    rows = vectors(20)
    index = filled(tmp_path / "i", rows)
    query = Labelled(rows[4].tolist(), lineage="Q", documents="L", made_by="q@1")
    assert index.search(query, 1)[0].chunk.id == "c4"


def test_a_fitted_map_is_used_only_when_asked_for_and_measures_its_recall(tmp_path: Path) -> None:
    rows = vectors(600)
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0].astype(np.float32)
    index = filled(tmp_path / "i", rows)
    index.save()
    exact = fit(rows @ turned, rows, vectors(50, seed=5) @ turned, source="M", target="L")
    assert exact.recall > 0.99
    assert fit(vectors(600, seed=8), rows, vectors(50, seed=5), source="M", target="L").recall < 0.2  # nothing in common: it says so
    with pytest.raises(LineageMismatch):
        index.search(label(rows[3] @ turned, "M"), 1, mapped=True)  # none fitted yet
    exact.save(tmp_path / "i" / "maps" / "M.npz")
    assert index.search(label(rows[3] @ turned, "M"), 1, mapped=True)[0].chunk.id == "c3"
    with pytest.raises(LineageMismatch):
        index.search(label(rows[3] @ turned, "M"), 1)
    with pytest.raises(UsageError, match="at least 50"):
        fit(rows[:10], rows[:10], rows[:5], source="M", target="L")


def test_a_save_that_dies_leaves_the_last_version_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = vectors(50)
    index = filled(tmp_path / "i", rows)
    first = index.save()
    index.delete(ids=["c1"])
    monkeypatch.setattr("embedft.rag.versions.write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        index.save()
    monkeypatch.undo()
    again = VectorIndex.open(tmp_path / "i")
    assert (again.version, len(again)) == (first, 50)
    again.delete(ids=["c2"])
    again.save()
    assert len(VectorIndex.open(tmp_path / "i", verify=True)) == 49
    assert not list((tmp_path / "i" / "versions").glob(".stage*"))


def test_a_reader_keeps_its_version_while_others_publish(tmp_path: Path) -> None:
    rows = vectors(50)
    writer = filled(tmp_path / "i", rows)
    writer.save()
    reader = VectorIndex.open(tmp_path / "i")
    for number in range(4):
        writer.delete(ids=[f"c{number}"])
        writer.save()
    assert ids(reader, rows[0])[0] == "c0"
    assert ids(VectorIndex.open(tmp_path / "i"), rows[0])[0] != "c0"
    assert len(list((tmp_path / "i" / "versions").iterdir())) == 2
    reader.delete(ids=["c9"])
    with pytest.raises(IndexInvalid, match="another process"):
        reader.save()


PARTS = ("rows.npy", "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "params.index.json", "vocab.index.json")


@pytest.mark.parametrize("damaged", ["vectors.faiss", "rows.sqlite", "meta.json", "vectors.f32", *(f"bm25/{part}" for part in PARTS)])
def test_damage_is_named(tmp_path: Path, damaged: str) -> None:
    index = filled(tmp_path / "i", vectors(650), kind="ivfpq", **LISTS) if damaged == "vectors.f32" else filled(tmp_path / "i", vectors(50))
    index.save()
    path = tmp_path / "i" / "versions" / (index.version or "") / damaged
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(IndexInvalid, match=f"{damaged}.*index again"):
        VectorIndex.open(tmp_path / "i")
    if damaged != "meta.json":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(IndexInvalid, match=f"{damaged} is not what was written"):
            VectorIndex.open(tmp_path / "i", verify=True)


def test_leftovers_of_the_next_number_never_outlive_the_version_that_has_it(tmp_path: Path) -> None:
    index = filled(tmp_path / "i", vectors(20))
    first = index.save()
    for lineage in ("xxxxxxxx", "yyyyyyyy"):  # crashes between publishing and switching, of adapters whose names sort behind this one's
        (tmp_path / "i" / "versions" / f"000002-{lineage}").mkdir()
    index.delete(ids=["c1"])
    second = index.save()
    assert len(VectorIndex.open(tmp_path / "i", verify=True)) == 19
    assert {path.name for path in (tmp_path / "i" / "versions").iterdir()} == {first, second}


def test_what_passes_over_the_dead_is_made_once_for_many_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    made, real = list[int](), faiss.IDSelectorBatch
    monkeypatch.setattr(faiss, "IDSelectorBatch", lambda rows: (made.append(len(rows)), real(rows))[1])
    rows = vectors(100)
    index = filled(tmp_path / "i", rows)
    index.save()
    for gone in (["c1"], ["c2", "c3"]):
        index.delete(ids=gone)
        for number in range(1, 6):
            assert (ids(index, rows[number])[0] == f"c{number}") == bool(index.chunks([f"c{number}"]))
    assert made == [1, 3]


def test_what_is_no_index_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFound, match="embedft rag index"):
        VectorIndex.open(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index_store.json").write_text("{}")
    with pytest.raises(IndexInvalid, match="no index of embedft"):
        VectorIndex.open(tmp_path / "other")


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path / "i", lineage="L", made_by="base")
    assert index.search(label(vectors(1)[0]), 3) == []
    index.save()
    assert VectorIndex.open(tmp_path / "i").search(label(vectors(1)[0]), 3) == []


def test_ivfpq_of_too_few_rows_is_flat_until_there_are_enough(tmp_path: Path) -> None:
    settings = AnnSettings(kind="ivfpq", bits=4)
    assert [settings.chosen(rows) for rows in (623, 624)] == ["flat", "ivfpq"]
    assert [AnnSettings(kind="ivfpq").chosen(rows) for rows in (9983, 9984)] == ["flat", "ivfpq"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"../../elsewhere\n", b"000009-gone\n"])
def test_an_index_whose_current_version_is_unreadable_says_so_and_can_be_made_again(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path / "i", vectors(20)).save()
    (tmp_path / "i" / "current").write_bytes(content)
    with pytest.raises(IndexInvalid, match="index again"):
        VectorIndex.open(tmp_path / "i")
    index = filled(tmp_path / "i", vectors(20))
    index.version = current_version(tmp_path / "i")
    index.save()
    assert len(VectorIndex.open(tmp_path / "i", verify=True)) == 20


def test_what_a_killed_save_has_written_is_gone_after_the_next(tmp_path: Path) -> None:
    index = filled(tmp_path / "i", vectors(20))
    index.save()
    left = tmp_path / "i" / "versions" / ".stage-killed"
    left.mkdir()
    (left / "vectors.faiss").write_bytes(b"half")
    index.save()
    assert not left.exists()


def test_threads_search_while_another_adds_deletes_and_saves(tmp_path: Path) -> None:
    rows = vectors(200)
    index = filled(tmp_path / "i", rows)
    index.save()
    ended, wrong = threading.Event(), list[str]()

    def ask() -> None:
        while not ended.is_set():
            try:
                wrong.extend(hit.chunk.id for hit in index.search(label(rows[199]), 1) if hit.chunk.id != "c199")
            except Exception as error:
                wrong.append(repr(error))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for number in range(10):  # a crash of the interpreter before chunks were read apart from what is written
        index.add([Chunk(f"n{number}", "new", "new")], vectors(1, seed=number + 1), lineage="L", made_by="base")
        index.delete(ids=[f"c{number}"])
        index.save()
    ended.set()
    for thread in asking:
        thread.join()
    assert not wrong
    assert len(index) == 200


def test_rows_added_one_at_a_time_are_all_found(tmp_path: Path) -> None:
    rows = vectors(70)
    index = filled(tmp_path / "i", rows[:9])
    for number in range(9, 70):
        index.add(chunks(1, first=number), rows[number : number + 1], lineage="L", made_by="base")
    assert [ids(index, row, 1)[0] for row in rows] == [f"c{number}" for number in range(70)]
    np.testing.assert_array_equal(index.vectors(np.array([69, 3, 40])), rows[[69, 3, 40]])
