"""What an evaluation proves: strata, one adapter against another, MTEB's evaluator, and the forgetting guard."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.store import AdapterStore
from embedft.cli import main
from embedft.embedding.data import RetrievalSet
from embedft.embedding.evaluate import Towers, fuse, score
from embedft.embedding.guard import general_set
from embedft.embedding.proof import comparison, evaluate_adapter, overlaps
from embedft.embedding.train import train
from embedft.errors import AdapterNotFound, BaseError, DataError, Forgotten, UsageError
from embedft.recipe import GuardSection, parse_recipe
from tests.embedft.adapter_fixtures import make_adapter
from tests.fixtures_embedding import TOPICS, text, tiny_encoder, write_beir, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def base(root: Path) -> str:
    return str(tiny_encoder(root / "base", pooling="mean"))


@pytest.fixture(scope="module")
def beir(root: Path) -> str:
    return write_beir(root / "beir", train=96, test=48)


def recipe_of(base: str, beir: str, name: str, **sections: Any) -> Any:
    train_section = {"batch": 16, "lr": 5e-3, "epochs": 2, "max_length": 16} | sections.pop("train", {})
    content = {"task": "embedding", "name": name, "base": {"model": base}, "data": {"train": beir}, "eval": {"guard": None}}
    return parse_recipe(content | {"train": train_section} | sections)


@pytest.fixture(scope="module")
def store(root: Path, base: str, beir: str) -> AdapterStore:
    """`both` and `query`: the same recipe on either side."""
    store = AdapterStore(root / "store")
    for side in ("both", "query"):
        train(recipe_of(base, beir, side, adapter={"side": side}), store=store, progress=False)
    return store


def test_strata_go_by_the_words_that_a_query_shares_with_its_documents() -> None:
    queries = {"a": "purple elephants dance", "b": "the purple elephants", "c": "quiet purple rain"}
    documents = {"1": "Elephants that dance are purple.", "2": "no word of it", "3": "rain on a roof"}
    relevant = {"a": {"1": 1, "2": 1}, "b": {"2": 1}, "c": {"3": 1}}
    data = RetrievalSet(queries, documents, relevant, "")
    assert overlaps(data).tolist() == [1.0, 0.0, 1 / 3]
    worst = score(data, [[], [], []])
    bm25 = score(data, [["1"], [], ["1", "3"]])
    adapter = score(data, [["1", "2"], ["2"], ["3"]])
    made = comparison(
        Towers({"base": worst, "bm25": bm25, "adapter": adapter, "fused": fuse(data, bm25, adapter)}, {}), data, metric="mrr@10"
    )
    assert {name: part["queries"] for name, part in made["strata"].items()} == {"low": 1, "middle": 1, "high": 1}
    assert made["strata"]["low"] == {"queries": 1, "base": 0.0, "bm25": 0.0, "adapter": 1.0, "fused": 1.0, "gain_ci95": [0.0, 1.0]}
    assert made["strata"]["middle"]["bm25"] == 0.5
    assert made["intervals"]["adapter - base"] == made["gain_ci95"]
    assert made["intervals"]["adapter - bm25"][1] == 1.0


def test_a_fusion_puts_first_what_both_rankings_put_high() -> None:
    data = RetrievalSet({"a": "x"}, dict.fromkeys("1234", ""), {"a": {"2": 1}}, "")
    fused = fuse(data, score(data, [["1", "2", "3"]]), score(data, [["4", "2"]]))
    assert fused.ranked[0][0] == "2"
    assert fused.metrics["mrr@10"] == 1.0


def test_mtebs_own_evaluator_agrees_for_either_side(store: AdapterStore, beir: str, base: str) -> None:
    pytest.importorskip("mteb")
    figures: dict[str, Any] = {}
    for name in ("both", "query"):
        made = evaluate_adapter(name, beir, store, base=base, mteb=True)
        figures[name] = made["adapter"]["ndcg@10"]
        assert 0.1 < figures[name] < 0.999, "a score that could not differ shows nothing"
        for metric, value in made["mteb"].items():
            assert value == pytest.approx(made["adapter"][metric], abs=1e-6), (name, metric)
    assert figures["both"] != figures["query"]


def test_where_mteb_orders_equal_documents_otherwise_the_reason_stands_beside_its_figures(
    store: AdapterStore, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mteb")
    folder = Path(write_beir(tmp_path / "beir", train=16, test=16))
    given = ["eval", "both", "--data", str(folder), "--base", base, "--adapters", str(store.root), "--mteb"]
    assert main(given) == 0
    assert "MTEB's own evaluator: " in (said := capsys.readouterr().out)
    assert "equal vectors" not in said
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    write_rows(folder / "corpus.jsonl", [*rows, *(row | {"_id": f"{row['_id']}-again"} for row in rows)])
    assert main(given) == 0
    assert "it ranks documents with equal vectors in another order" in capsys.readouterr().out


def test_judgements_that_call_nothing_relevant_are_no_data_to_evaluate_on(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=8, test=4))
    judged = folder / "qrels" / "test.tsv"
    judged.write_text(judged.read_text().replace("\t1\n", "\t0\n"))
    adapter = make_adapter(tmp_path / "adapter", model=base)
    said = "beir: no query with a relevant document to evaluate on; expected at least 1"
    assert main(["eval", str(adapter), "--data", str(folder), "--base", base]) == 1
    assert said in capsys.readouterr().err
    with pytest.raises(DataError, match=said):
        train(recipe_of(base, str(folder), "nothing"), store=AdapterStore(tmp_path / "store"), progress=False)


def test_what_an_evaluation_lacks_is_told_before_it_begins(
    store: AdapterStore, beir: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: int) -> None:
        pytest.fail("it had begun")

    with pytest.raises(AdapterNotFound, match="'bth': there are both"):
        evaluate_adapter("query", beir, store, base=base, against="bth", progress=begun)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UsageError, match=r"pip install 'embedft\[mteb\]'"):
        evaluate_adapter("query", beir, store, base=base, mteb=True, progress=begun)


def test_a_query_only_adapter_is_held_against_one_that_moves_documents_too(
    store: AdapterStore, beir: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluate_adapter("query", beir, store, base=base, against="both")
    alone = evaluate_adapter("both", beir, store, base=base)
    against = made["against"]
    assert (made["side"], against["side"]) == ("query", "both")
    assert against["ndcg@10"] == pytest.approx(alone["adapter"]["ndcg@10"])
    low, high = against["difference_ci95"]
    assert low <= made["adapter"]["ndcg@10"] - alone["adapter"]["ndcg@10"] <= high
    assert made["index"]["again"] is False
    assert alone["index"]["again"] is True
    assert made["index"]["documents"] == TOPICS
    assert made["index"]["bytes"] == TOPICS * 64 * 4
    command = ["eval", "query", "--data", beir, "--base", base, "--against", "both", "--adapters", str(store.root)]
    assert main(command) == 0
    said, progress = capsys.readouterr()
    assert progress.count(" 0:00 left") == 2  # both comparisons came to their end
    assert "query-only: an index of the base's vectors serves it as it is" in said
    assert "against both (side both)" in said
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["name"] == "both"


@pytest.fixture(scope="module")
def general(root: Path) -> str:
    """Each query is its document's own text: what no base fails, and an adapter that moves queries elsewhere does."""
    same = [text("document", topic, -1) for topic in range(TOPICS)]
    return write_rows(root / "general.jsonl", [{"query": words, "document": words} for words in same])


def test_an_adapter_that_forgets_is_saved_and_does_not_become_current_without_force(
    base: str, beir: str, general: str, root: Path, tmp_path: Path
) -> None:
    swapped = [{"query": text("document", i % TOPICS, i), "document": text("document", (i + 5) % TOPICS, -1)} for i in range(16 * TOPICS)]
    wrong = write_rows(tmp_path / "wrong.jsonl", swapped)
    store = AdapterStore(tmp_path / "store")
    sections: dict[str, Any] = {"data": {"train": wrong, "eval": beir}, "eval": {"guard": {"data": general, "drop": 0.1}}}
    recipe = recipe_of(base, beir, "spoilt", adapter={"side": "query"}, train={"lr": 1e-2}, **sections)
    with pytest.raises(Forgotten, match=r"loses 0\.\d+ on the general set general\.jsonl") as caught:
        train(recipe, store=store, progress=False)
    assert caught.value.exit_code == 1
    saved = Path(caught.value.path)
    assert (saved / "adapter_model.safetensors").is_file()
    with pytest.raises(AdapterNotFound):
        store.current("spoilt")
    assert store.collect() == [], "what is held back is kept"
    assert store.passport(saved.name).metrics["guard"]["held"] is True
    assert not (store.root / ".training" / "spoilt").exists()
    train(recipe, store=store, progress=False, force=True)
    assert store.current("spoilt") == saved.name


def test_a_harmless_adapter_passes_the_guard_and_its_report_says_so(base: str, beir: str, store: AdapterStore) -> None:
    result: Any = train(recipe_of(base, beir, "harmless", eval={"guard": {"queries": 20}}), store=store, progress=False)
    guard = result.metrics["guard"]
    assert (guard["data"], guard["queries"], guard["held"], guard["bound"]) == ("pydocs", 20, False, 0.05)


def test_the_general_set_is_made_of_this_pythons_own_library() -> None:
    data = general_set(GuardSection())
    assert len(data.queries) == len(data.documents) == 200
    assert all(len(found) == 1 for found in data.relevant.values())
    assert general_set(GuardSection()).hash == data.hash


def test_what_is_trained_on_does_not_guard(general: str, capsys: pytest.CaptureFixture[str]) -> None:
    every = set(general_set(GuardSection(queries=10**6)).queries.values())
    known = set(general_set(GuardSection(queries=50)).queries.values())
    assert set(general_set(GuardSection(queries=10**6), trained=known).queries.values()) == every - known
    with pytest.raises(BaseError, match="no other functions than those that are trained on"):
        general_set(GuardSection(), trained=every)
    given = general_set(GuardSection(data=general))
    trained = set(list(given.queries.values())[:4])
    rest = general_set(GuardSection(data=general), trained=trained)
    assert set(rest.queries.values()) == set(given.queries.values()) - trained
    assert rest.documents == given.documents
    assert f"4 of its {TOPICS} queries are trained on" in capsys.readouterr().err


def test_training_tells_the_guard_what_it_trains_on(base: str, beir: str, tmp_path: Path, store: AdapterStore) -> None:
    asked = [{"query": text("query", topic, topic), "document": text("document", topic, -1)} for topic in range(TOPICS)]  # beir's training
    spec = {"data": write_rows(tmp_path / "asked.jsonl", asked)}
    with pytest.raises(DataError, match=f"all of its {TOPICS} queries are trained on"):
        train(recipe_of(base, beir, "guarded", eval={"guard": spec}), store=store, progress=False)
