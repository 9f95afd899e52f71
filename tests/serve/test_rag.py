"""/v1/rag over a running server: adapters chosen per question, sources first, indexes replaced while they serve."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedft.cli import main
from embedft.model_folder import template_hash
from embedft.rag.index import VectorIndex
from embedft.rag.mapping import fit_map
from embedft.rag.remote import RemoteEngine
from tests.serve.test_abuse import keys
from tests.serve.world import ADMIN, Server, World, make_rag_world, put_adapter

TEXTS = [f"note {i} about thing{i}" for i in range(80)]


@pytest.fixture(scope="module")
def rag_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_rag_world(tmp_path_factory.mktemp("ragserve"))


@pytest.fixture(scope="module")
def rag(rag_world: World) -> Iterator[Server]:
    (rag_world.folder / "indexes").mkdir()
    running = rag_world.start(indexes="indexes")
    build(rag_world, running, "notes", "a")
    build(rag_world, running, "shared", "q")
    for name in ("notes", "shared"):
        assert running.client.put(f"/v1/rag/{name}", json={}, headers=ADMIN).status_code == 200
    yield running
    running.stop()


def build(world: World, server: Server, name: str, adapter: str, *, count: int = 30) -> None:
    docs = world.folder / "docs"
    docs.mkdir(exist_ok=True)
    for path in docs.iterdir():
        path.unlink()
    for i, text in enumerate(TEXTS[:count]):
        (docs / f"d{i}.txt").write_text(text)
    command = [
        "rag",
        "index",
        str(docs),
        "--out",
        str(world.folder / "indexes" / name),
        "--adapter",
        adapter,
        "--server",
        server.url,
        "--json",
    ]
    assert main(command) == 0


def ask(server: Server, index: str, question: str, **body: Any) -> httpx.Response:
    return server.post(f"/v1/rag/{index}/query", {"question": question, **body})


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    return response.json()["error"]["message"]


def test_a_question_is_answered_with_sources_by_the_adapters_asked_for(rag: Server) -> None:
    response = ask(rag, "notes", TEXTS[7], lm_adapter="s", k=3)
    body = response.json()
    assert response.status_code == 200
    assert body["answer"].startswith("[s@")
    assert (body["sources"][0]["document"], len(body["sources"])) == ("d7.txt", 3)
    assert body["sources"][0]["score"] == pytest.approx(1.0, abs=1e-4)
    assert response.headers["x-embedft-adapter"].startswith("a@")  # the index's own
    assert response.headers["x-embedft-lm-adapter"].startswith("s@")
    assert response.headers["x-embedft-index"].startswith("notes@000001-")
    assert ask(rag, "notes", "x", lm_adapter="t").json()["answer"].startswith("[t@")
    assert ask(rag, "notes", "x").json()["answer"].startswith("[base|")
    only = ask(rag, "notes", TEXTS[2], answer=False).json()
    assert only["object"] == "rag.sources"
    assert "answer" not in only


def test_the_stream_brings_the_sources_first_and_is_the_same_answer(rag: Server) -> None:
    with rag.client.stream(
        "POST", "/v1/rag/notes/query", json={"question": TEXTS[3], "lm_adapter": "s", "stream": True, "max_tokens": 5}
    ) as got:
        events = [line[6:] for line in got.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    first, *rest = [json.loads(event) for event in events[:-1]]
    assert (first["object"], first["sources"][0]["document"]) == ("rag.sources", "d3.txt")
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in rest)
    assert said == ask(rag, "notes", TEXTS[3], lm_adapter="s", max_tokens=5).json()["answer"]
    assert rest[0]["model"] == "s"


def test_query_only_adapters_share_an_index_and_others_are_refused(rag: Server) -> None:
    for adapter in ("q", "q2", None):
        response = ask(rag, "shared", TEXTS[4], adapter=adapter, model="texts", answer=False)
        assert response.status_code == 200, response.text
        assert response.headers["x-embedft-adapter"].partition("@")[0] == (adapter or "base")
    assert ask(rag, "shared", TEXTS[4], adapter=None, model="texts", answer=False).json()["sources"][0]["document"] == "d4.txt"
    message = refused(ask(rag, "shared", "x", adapter="a"), 409, "lineage_mismatch")
    assert "by base" in message
    assert "by a@" in message
    refused(ask(rag, "notes", "x", adapter="q"), 409, "lineage_mismatch")


def test_hybrid_and_reranking(rag: Server) -> None:
    assert ask(rag, "notes", "thing9", fusion="sparse", k=1, answer=False).json()["sources"][0]["document"] == "d9.txt"
    both = ask(rag, "notes", "thing9", fusion="rrf", k=3, answer=False).json()["sources"]
    assert "d9.txt" in [source["document"] for source in both]
    plain = ask(rag, "notes", "anything", k=5, answer=False).json()["sources"]
    again = ask(rag, "notes", "anything", k=5, rerank_adapter="b", answer=False).json()["sources"]
    assert [source["score"] for source in again] == sorted((source["score"] for source in again), reverse=True)
    assert [source["chunk"] for source in again] != [source["chunk"] for source in plain]
    first = ask(rag, "notes", "anything", k=1, rerank_adapter="b", answer=False).json()["sources"]
    assert [source["chunk"] for source in first] == [again[0]["chunk"]] != [plain[0]["chunk"]]  # out of more than were asked for


def test_words_alone_are_looked_up_without_asking_any_engine(rag: Server) -> None:
    def asked() -> list[str]:
        return [line for line in rag.client.get("/metrics", headers=ADMIN).text.splitlines() if 'route="rag"' in line and '"texts"' in line]

    assert ask(rag, "notes", "thing9", answer=False).status_code == 200
    before = asked()
    response = ask(rag, "notes", "thing9", fusion="sparse", k=1, answer=False)
    assert response.json()["sources"][0]["document"] == "d9.txt"
    assert before
    assert asked() == before
    assert "x-embedft-adapter" not in response.headers
    assert response.headers["x-embedft-index"].startswith("notes@")
    refused(ask(rag, "notes", "thing9", fusion="sparse", adapter="nobody", answer=False), 404, "adapter_not_found")
    assert ask(rag, "notes", "thing9", fusion="sparse", rerank_adapter="b", k=3, answer=False).json()["sources"][0]["document"] == "d9.txt"


def test_a_reader_that_was_trained_on_another_chat_template_is_refused_as_in_a_chat(rag: Server, rag_world: World) -> None:
    put_adapter(rag_world.store, "otherwise", rag_world.words, seed=90, task="causal_lm", template_hash=template_hash("{{ messages }}"))
    assert rag.put("otherwise").status_code == 200
    refused(ask(rag, "notes", "what is tea?", lm_adapter="otherwise"), 409, "template_mismatch")
    assert ask(rag, "notes", "what is tea?", lm_adapter="s").status_code == 200


def test_bad_requests_are_named(rag: Server) -> None:
    refused(ask(rag, "nowhere", "x"), 404, "index_not_found")
    refused(ask(rag, "notes", ""), 400, "invalid_parameter")
    refused(ask(rag, "notes", "x", adapter="nobody"), 404, "adapter_not_found")
    refused(ask(rag, "notes", "x", lm_adapter="nobody"), 404, "adapter_not_found")
    refused(ask(rag, "notes", "x", lm_adapter="a"), 400, "wrong_task")
    refused(ask(rag, "notes", "x", topk=3), 400, "unknown_parameter")
    refused(ask(rag, "notes", "x", max_tokens=10**6), 400, "max_tokens_too_large")
    refused(ask(rag, "notes", "x", answer=False, stream=True), 400, "stream_without_answer")
    assert ask(rag, "notes", "x", adapter="b", mapped=True).status_code == 409  # no map was fitted


def test_a_fitted_map_answers_another_adapters_questions_and_says_its_loss(rag: Server, rag_world: World) -> None:
    build(rag_world, rag, "wide", "a", count=80)
    assert rag.client.put("/v1/rag/wide", json={}, headers=ADMIN).status_code == 200
    refused(ask(rag, "wide", "x", adapter="b", answer=False), 409, "lineage_mismatch")
    engine = RemoteEngine(rag.url)
    made = fit_map(VectorIndex.open(rag_world.folder / "indexes" / "wide"), engine, "b")
    answer = ask(rag, "wide", "x", adapter="b", mapped=True, answer=False)
    assert answer.status_code == 200
    assert answer.json()["map_recall"] == pytest.approx(made.recall, abs=1e-4)
    assert "map_recall" not in ask(rag, "wide", "x", mapped=True, answer=False).json()  # its own adapter needs none
    refused(ask(rag, "wide", "x", adapter="b", answer=False), 409, "lineage_mismatch")


def test_indexes_are_listed_loaded_and_replaced_with_the_admin_key(rag: Server, rag_world: World) -> None:
    refused(rag.client.put("/v1/rag/notes", json={}), 401, "not_authorized")
    refused(rag.client.delete("/v1/rag/notes"), 401, "not_authorized")
    refused(rag.client.put("/v1/rag/none", json={}, headers=ADMIN), 404, "index_not_found")
    build(rag_world, rag, "extra", "a", count=5)
    refused(ask(rag, "extra", "x"), 404, "index_not_found")
    assert rag.client.put("/v1/rag/extra", json={}, headers=ADMIN).json()["chunks"] == 5
    build(rag_world, rag, "extra", "a", count=9)
    assert rag.client.get("/v1/rag/extra").json()["chunks"] == 5  # beside serving; not before it is told
    stale = rag.client.put("/v1/rag/extra", json={"expected_version": "000001-ffffffff"}, headers=ADMIN)
    refused(stale, 422, "index_invalid")
    assert rag.client.put("/v1/rag/extra", json={}, headers=ADMIN).json()["chunks"] == 9
    listed = {row["name"]: row for row in rag.client.get("/v1/rag").json()["data"]}
    assert listed["extra"]["made_by"].startswith("a@")
    assert listed["notes"]["chunks"] == 30
    assert rag.client.delete("/v1/rag/extra", headers=ADMIN).json()["state"] == "unserved"
    refused(ask(rag, "extra", "x"), 404, "index_not_found")


def test_a_tenant_searches_its_own_indexes_and_knows_of_no_other(rag: Server, rag_world: World, tmp_path: Path) -> None:
    file, sent = keys(tmp_path, bob={"adapters": ["a", "s"], "indexes": ["notes"]}, eve={"adapters": ["a", "s"], "indexes": ["notes"]})
    server = replace(rag_world, folder=tmp_path).start(indexes=str(rag_world.folder / "indexes"), keys=file)
    try:
        bob = sent["bob"]
        assert [row["name"] for row in server.client.get("/v1/rag", headers=bob).json()["data"]] == ["notes"]
        for name in ("shared", "nothere"):
            asked = server.post(f"/v1/rag/{name}/query", {"question": "x", "adapter": "a"}, headers=bob)
            for answer in (asked, server.client.get(f"/v1/rag/{name}", headers=bob)):
                assert "there are notes" in refused(answer, 404, "index_not_found")
        for tenant in ("bob", "eve", "root"):
            body = {"question": "x", "lm_adapter": "s"}
            assert server.post("/v1/rag/notes/query", body, headers=sent[tenant]).status_code == 200
        assert server.client.post("/v1/completions", json={"model": "s", "prompt": "x"}, headers=bob).status_code == 200
        own, other, _, chat = [row["salt"] for row in server.events("generate")[-4:]]
        assert own == chat != other, "the engine's cache of prefixes is each tenant's own"
        line = next(json.loads(line) for line in server.log.read_text().splitlines() if '"/v1/rag/notes/query"' in line)
        assert (line["tenant"], line["adapter"]) == ("bob", "s")
    finally:
        server.stop()


def test_an_index_is_no_link_to_elsewhere(rag: Server, rag_world: World) -> None:
    (rag_world.folder / "indexes" / "linked").symlink_to(rag_world.folder / "indexes" / "notes")
    assert "it is a link" in refused(rag.client.put("/v1/rag/linked", json={}, headers=ADMIN), 422, "index_invalid")
    refused(ask(rag, "linked", "x"), 404, "index_not_found")


def test_an_answers_tokens_are_counted(rag: Server) -> None:
    def counted() -> float:
        text = rag.client.get("/metrics").text
        return sum(map(float, re.findall(r'embedft_tokens_total\{adapter="s",base="words",kind="completion"\} (\S+)', text)))

    before = counted()
    for stream in (False, True):
        assert ask(rag, "notes", "x", lm_adapter="s", max_tokens=7, stream=stream).status_code == 200
    assert counted() == before + 14


def test_a_damaged_version_leaves_the_last_good_one_serving(rag: Server, rag_world: World) -> None:
    build(rag_world, rag, "hurt", "a", count=5)
    assert rag.client.put("/v1/rag/hurt", json={}, headers=ADMIN).status_code == 200
    build(rag_world, rag, "hurt", "a", count=8)
    folder = rag_world.folder / "indexes" / "hurt"
    path = folder / "versions" / (VectorIndex.open(folder).version or "") / "vectors.faiss"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)
    assert "vectors.faiss is not what was written" in refused(rag.client.put("/v1/rag/hurt", json={}, headers=ADMIN), 422, "index_invalid")
    assert ask(rag, "hurt", TEXTS[2], k=1, answer=False).json()["sources"][0]["document"] == "d2.txt"
    shown = rag.client.get("/v1/rag/hurt").json()
    assert shown["chunks"] == 5
    assert "not what was written" in shown["refused"]


def test_an_adapter_that_was_replaced_since_indexing_is_refused_until_indexed_again(rag: Server, rag_world: World) -> None:
    put_adapter(rag_world.store, "moving", rag_world.texts, seed=40)
    assert rag.put("moving").status_code == 200
    build(rag_world, rag, "moved", "moving", count=5)
    assert rag.client.put("/v1/rag/moved", json={}, headers=ADMIN).status_code == 200
    assert ask(rag, "moved", "x", answer=False).status_code == 200
    put_adapter(rag_world.store, "moving", rag_world.texts, seed=41)
    assert rag.put("moving").status_code == 200
    refused(ask(rag, "moved", "x", answer=False), 409, "lineage_mismatch")
    assert rag.client.delete("/v1/adapters/moving", headers=ADMIN).status_code == 200
    refused(ask(rag, "moved", "x", answer=False), 404, "adapter_not_found")


def test_the_server_loads_neither_llama_index_nor_torch_for_it() -> None:
    code = "import sys, serve.rag_routes; print(sorted({'torch', 'llama_index', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.strip() == "[]"
