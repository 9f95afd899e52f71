"""Which adapter answers: `model`, `adapter`, `?adapter=`, lists, and what is refused. On the fake engine, whose answers tell."""

import asyncio
import base64
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from embedft.encode import EncodeSettings, TextPreparer
from embedft.errors import InputInvalid
from serve.embedding import Preparers, Way
from serve.engines.fake import load, vector
from serve.routing import choose
from tests.serve.world import DIMENSION, LENGTH, Server, World, launch, put_adapter, write_base


def expected(world: World, adapter: str | None, text: str, *, length: int = LENGTH) -> np.ndarray:
    ids = TextPreparer(world.texts, EncodeSettings("mean", True, length)).prepare([text]).ids[0]
    return vector(load(world.store.folder(adapter)) if adapter else None, ids, DIMENSION)


def rows(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray([row["embedding"] for row in response.json()["data"]], dtype=np.float32)


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "query", "adapter"),
    [
        ({"model": "texts"}, "", None),
        ({}, "", None),
        ({"model": "texts", "adapter": None}, "", None),
        ({"model": "texts", "adapter": "a"}, "", "a"),
        ({"adapter": "a"}, "", "a"),
        ({"model": "a"}, "", "a"),
        ({"model": "texts:a"}, "", "a"),
        ({"model": "texts"}, "?adapter=a", "a"),
        ({"model": "a", "adapter": "a"}, "?adapter=a", "a"),
    ],
)
def test_each_way_of_naming_an_adapter_reaches_it(
    shared: Server, shared_world: World, body: dict[str, Any], query: str, adapter: str | None
) -> None:
    response = shared.post(f"/v1/embeddings{query}", {**body, "input": "hello"})
    np.testing.assert_allclose(rows(response)[0], expected(shared_world, adapter, "hello"), atol=1e-6)
    named = f"a@{shared_world.store.current('a')[:12]}" if adapter else "base"
    assert response.headers["x-embedft-adapter"] == named
    assert response.headers["x-embedft-base"] == "texts"
    assert len(response.headers["x-embedft-lineage"]) == 64
    assert response.json()["model"] == (adapter or "texts")


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"model": "a", "adapter": "b"}, ""),
        ({"model": "a", "adapter": None}, ""),
        ({"model": "texts", "adapter": "a"}, "?adapter=b"),
        ({"model": "texts:a"}, "?adapter=b"),
        ({"model": "words", "adapter": "a"}, ""),
        ({"model": "texts"}, "?adapter=a&adapter=b"),
        ({"adapter": ["a"]}, "?adapter=a"),
        ({"model": "a", "adapter": ["a", "b"]}, ""),
    ],
)
def test_conflicting_names_are_a_400(shared: Server, body: dict[str, Any], query: str) -> None:
    inputs = ["x"] * (len(body["adapter"]) if isinstance(body.get("adapter"), list) else 1)
    refused(shared.post(f"/v1/embeddings{query}", {**body, "input": inputs}), 400, "adapter_conflict")


@pytest.mark.parametrize("query", ["?adaptor=a", "?Adapter=a", "?adapters=a"])
def test_a_misspelt_adapter_in_the_query_string_is_a_400_and_never_the_bases_answer(shared: Server, query: str) -> None:
    refused(shared.post(f"/v1/embeddings{query}", {"input": "x", "model": "texts"}), 400, "unknown_parameter")
    assert shared.post("/v1/embeddings?api-version=1", {"input": "x", "model": "texts"}).status_code == 200


@pytest.mark.parametrize("name", ["nix", "A", "a@000000000000", "a@", "ａ", "../a", "a\u0000", "base"])
def test_an_unknown_adapter_is_a_404_and_never_the_bases_answer(shared: Server, name: str) -> None:
    refused(shared.post("/v1/embeddings", {"input": "x", "adapter": name}), 404, "adapter_not_found")
    refused(shared.post("/v1/embeddings", {"input": ["x", "y"], "adapter": ["a", name]}), 404, "adapter_not_found")
    refused(shared.post("/v1/embeddings", {"input": "x", "model": f"texts:{name}"}), 404, "adapter_not_found")
    refused(shared.post("/v1/completions", {"prompt": "x", "model": "words", "adapter": name}), 404, "adapter_not_found")
    assert shared.post("/v1/embeddings", {"input": "x", "model": name}).status_code == 404
    refused(
        shared.post("/v1/embeddings", {"input": "x", "model": f"{name}:a"}), 404, "adapter_not_found" if "@" in name else "model_not_found"
    )


def test_a_generation_in_the_name_must_be_the_one_that_serves(shared: Server, shared_world: World) -> None:
    full = f"a@{shared_world.store.current('a')[:12]}"
    assert shared.post("/v1/embeddings", {"input": "x", "adapter": full}).headers["x-embedft-adapter"] == full


def test_a_list_of_adapters_is_merged_in_input_order(shared: Server, shared_world: World) -> None:
    names = ["a", None, "b", "a", None]
    texts = [f"text {i}" for i in range(5)]
    response = shared.post("/v1/embeddings", {"input": texts, "adapter": names})
    for row, name, text in zip(rows(response), names, texts, strict=True):
        np.testing.assert_allclose(row, expected(shared_world, name, text), atol=1e-6)
    assert [row["index"] for row in response.json()["data"]] == list(range(5))
    assert [row["adapter"].partition("@")[0] for row in response.json()["data"]] == ["a", "base", "b", "a", "base"]
    tokens = sum(map(len, texts))
    assert response.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    refused(shared.post("/v1/embeddings", {"input": texts, "adapter": ["a", "b"]}), 400, "adapter_count")


def test_base64_holds_the_same_floats(shared: Server) -> None:
    plain = rows(shared.post("/v1/embeddings", {"input": "hello", "adapter": "a"}))[0]
    packed = shared.post("/v1/embeddings", {"input": "hello", "adapter": "a", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), dtype="<f4"), plain)


def test_token_ids_are_taken_as_they_are(shared: Server, shared_world: World) -> None:
    ids = [5, 6, 7]
    made = rows(shared.post("/v1/embeddings", {"input": ids, "adapter": "a"}))[0]
    np.testing.assert_allclose(made, vector(load(shared_world.store.folder("a")), ids, DIMENSION), atol=1e-6)
    assert len(rows(shared.post("/v1/embeddings", {"input": [ids, ids], "adapter": "a"}))) == 2
    refused(shared.post("/v1/embeddings", {"input": ids, "adapter": "b", "input_type": "query"}), 400, "input_type_needs_text")
    refused(shared.post("/v1/embeddings", {"input": [1] * (LENGTH + 1)}), 400, "input_too_long")


def test_the_passports_prompt_goes_before_a_query(shared: Server, shared_world: World) -> None:
    made = rows(shared.post("/v1/embeddings", {"input": "hi", "adapter": "b", "input_type": "query"}))[0]
    np.testing.assert_allclose(made, expected(shared_world, "b", "ask: hi"), atol=1e-6)
    plain = rows(shared.post("/v1/embeddings", {"input": "hi", "adapter": "b", "input_type": "document"}))[0]
    np.testing.assert_allclose(plain, expected(shared_world, "b", "hi"), atol=1e-6)


def test_long_inputs_are_cut_to_the_passports_length_and_counted(shared: Server, shared_world: World) -> None:
    response = shared.post("/v1/embeddings", {"input": ["x" * 50, "y"], "adapter": "b"})
    np.testing.assert_allclose(rows(response)[0], expected(shared_world, "b", "x" * 20), atol=1e-6)
    assert response.json()["truncated"] == 1
    assert response.json()["usage"]["prompt_tokens"] == 21
    refused(shared.post("/v1/embeddings", {"input": "x" * 50, "adapter": "b", "truncate": False}), 400, "input_too_long")


def test_a_query_only_adapter_leaves_documents_to_the_base(shared: Server, shared_world: World) -> None:
    query = shared.post("/v1/embeddings", {"input": "x", "adapter": "q", "input_type": "query"})
    document = shared.post("/v1/embeddings", {"input": "x", "adapter": "q", "input_type": "document"})
    np.testing.assert_allclose(rows(query)[0], expected(shared_world, "q", "x"), atol=1e-6)
    np.testing.assert_allclose(rows(document)[0], expected(shared_world, None, "x"), atol=1e-6)
    assert query.headers["x-embedft-adapter"].startswith("q@")
    assert document.headers["x-embedft-adapter"] == "base"
    assert query.headers["x-embedft-lineage"] != document.headers["x-embedft-lineage"]
    refused(shared.post("/v1/embeddings", {"input": "x", "adapter": "q"}), 400, "input_type_required")


def test_only_trained_dimensions_are_given(shared: Server) -> None:
    whole = rows(shared.post("/v1/embeddings", {"input": "x", "adapter": "a"}))[0]
    cut = shared.post("/v1/embeddings", {"input": "x", "adapter": "a", "dimensions": 8})
    np.testing.assert_allclose(rows(cut)[0], whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    full = shared.post("/v1/embeddings", {"input": "x", "adapter": "a", "dimensions": DIMENSION})
    np.testing.assert_array_equal(rows(full)[0], whole)
    assert cut.headers["x-embedft-lineage"] != full.headers["x-embedft-lineage"]
    refused(shared.post("/v1/embeddings", {"input": "x", "adapter": "a", "dimensions": 16}), 400, "dimensions_unsupported")
    refused(shared.post("/v1/embeddings", {"input": "x", "dimensions": 8}), 400, "dimensions_unsupported")


def test_rerank_orders_by_closeness_and_sets_both_input_types(shared: Server, shared_world: World) -> None:
    body = {"model": "q", "query": "tea", "documents": ["one", "tea", "two"], "top_n": 2, "return_documents": True}
    response = shared.post("/v1/rerank", body)
    as_objects = {**body, "documents": [{"text": text} for text in body["documents"]]}
    for alias in ("/v2/rerank", "/rerank"):
        assert shared.post(alias, as_objects).json()["results"] == response.json()["results"]
    found = r'embedft_tokens_total\{adapter="q",base="texts",kind="prompt"\} (\S+)'
    before, after = [float(re.findall(found, shared.client.get("/metrics").text)[0]) for _ in range(2) if shared.post("/rerank", body)]
    assert after == before + response.json()["usage"]["total_tokens"]
    assert response.headers["x-embedft-lineage"] == shared.client.get("/v1/adapters/q").json()["lineage"]
    query = expected(shared_world, "q", "tea")
    scores = [float(query @ expected(shared_world, None, text)) for text in body["documents"]]
    results = response.json()["results"]
    assert [result["index"] for result in results] == sorted(range(3), key=lambda i: -scores[i])[:2]
    assert results[0]["relevance_score"] == pytest.approx(max(scores), abs=1e-5)
    assert results[0]["document"]["text"] == body["documents"][results[0]["index"]]


def test_teis_embed_gives_the_same_vectors_in_its_own_shape(shared: Server, shared_world: World) -> None:
    response = shared.post("/embed?adapter=b", {"inputs": ["hi", "x" * 50], "prompt_name": "query", "truncate": True})
    np.testing.assert_allclose(response.json()[0], expected(shared_world, "b", "ask: hi"), atol=1e-6)
    assert response.headers["x-embedft-adapter"].startswith("b@")
    assert len(shared.post("/embed", {"inputs": "hi", "normalize": True}).json()) == 1
    refused(shared.post("/embed", {"inputs": "hi", "normalize": False}), 400, "normalize_unsupported")
    refused(shared.post("/embed", {"inputs": "x" * 99, "truncate": False}), 400, "input_too_long")


@pytest.mark.parametrize(
    ("path", "field", "more"),
    [("/v1/embeddings", "input", {}), ("/embed", "inputs", {}), ("/v1/rerank", "documents", {"query": "x"})],
)
def test_what_one_request_for_vectors_may_hold_is_capped(shared: Server, path: str, field: str, more: dict[str, Any]) -> None:
    refused(shared.post(path, {field: ["x"] * 2049, **more}), 400, "too_many_inputs")
    refused(shared.post(path, {field: ["x" * 1_000_001], **more}), 400, "input_too_large")


def test_an_adapter_named_by_nothing_is_a_400(shared: Server) -> None:
    refused(shared.post("/v1/embeddings?adapter=", {"input": "x"}), 400, "invalid_parameter")


def test_one_request_asks_one_base(world: World) -> None:
    other = write_base(world.folder / "other", seed=9)
    put_adapter(world.store, "o", other, seed=1)
    bases = [{"name": path.name, "model": str(path), "task": "embedding", "engine": "fake"} for path in (world.texts, other)]
    server = launch({"bases": bases, "stop_seconds": 3.0}, folder=world.folder, store=world.store.root)
    try:
        server.wait_ready()
        refused(server.post("/v1/embeddings", {"input": ["x", "y"], "adapter": ["a", "o"]}), 400, "adapter_conflict")
        refused(server.post("/v1/embeddings", {"input": "x"}), 400, "model_required")
        assert server.post("/v1/embeddings", {"input": "x", "adapter": "o"}).headers["x-embedft-base"] == "other"
        for adapters in (["o", None], [None, "o"]):  # null is the base of the adapter beside it
            answer = server.post("/v1/embeddings", {"input": ["x", "y"], "adapter": adapters})
            assert answer.headers["x-embedft-base"] == "other"
            assert [row["adapter"].partition("@")[0] for row in answer.json()["data"]] == [name or "base" for name in adapters]
        refused(server.post("/v1/embeddings", {"input": ["x", "y"], "adapter": [None, None]}), 400, "model_required")
    finally:
        server.stop()


def test_a_base_is_not_asked_for_what_it_cannot_do(shared: Server) -> None:
    refused(shared.post("/v1/embeddings", {"input": "x", "model": "words"}), 400, "wrong_task")
    refused(shared.post("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "x"}]}), 400, "wrong_task")


def test_which_base_is_meant_is_asked_of_those_that_can_do_it() -> None:
    def unnamed(tasks: dict[str, str], **more: Any) -> InputInvalid:
        seen: Any = SimpleNamespace(engines={name: SimpleNamespace(name=name, config=SimpleNamespace(task=tasks[name])) for name in tasks})
        with pytest.raises(InputInvalid) as caught:
            choose(seen, task="embedding", model=None, adapter=None, is_set=False, **more)
        return caught.value

    several = unnamed({"one": "embedding", "two": "embedding", "words": "causal_lm"})
    assert (several.code, str(several)) == ("model_required", "name a `model`: there are one, two")
    hidden: Any = SimpleNamespace(name="three", config=SimpleNamespace(task="embedding"))
    beside = unnamed({"one": "embedding", "two": "embedding"}, beside=hidden)  # the base of its adapter, which it may not ask
    assert (beside.code, str(beside)) == ("model_required", "name a `model`: there are one, two")
    none = unnamed({"words": "causal_lm"})
    assert (none.code, str(none)) == ("wrong_task", "no base here embeds: there are words")


def test_models_lists_bases_and_adapters_with_their_parent(shared: Server) -> None:
    found = {row["id"]: row["parent"] for row in shared.client.get("/v1/models").json()["data"]}
    assert found == {"texts": None, "words": None, "a": "texts", "b": "texts", "q": "texts", "s": "words", "t": "words"}
    assert shared.client.get("/v1/models/a").json()["parent"] == "texts"
    assert [shared.client.get(f"/v1/models/{name}").json()["max_model_len"] for name in ("texts", "a", "b")] == [LENGTH, LENGTH, 20]
    refused(shared.client.get("/v1/models/nix"), 404, "model_not_found")


def test_adapters_that_read_alike_share_one_tokenizer_and_others_have_their_own(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = SimpleNamespace(name="texts", preparer=lambda settings: TextPreparer(shared_world.texts, settings))

    other: Any = SimpleNamespace(name="other", preparer=engine.preparer)
    kept = Preparers()

    async def texts(*settings: EncodeSettings, of: Any = engine) -> list[TextPreparer]:
        return [await kept.of(Way(of, None, "base", one, "", None)) for one in settings]

    plain, prompts = EncodeSettings("mean", True, 16), {"query": "find: "}
    one, same, shorter, prompted, matryoshka = asyncio.run(
        texts(plain, plain, replace(plain, max_length=8), replace(plain, prompts=prompts), replace(plain, dimensions=4))
    )
    assert one is same is matryoshka
    assert asyncio.run(texts(plain, of=other)) != [one]  # another base, another tokenizer
    monkeypatch.setattr("serve.embedding.KEPT_PREPARERS", 2)
    asyncio.run(texts(plain, replace(plain, max_length=9)))
    assert asyncio.run(texts(plain)) == [one]  # of those that were asked for last
    assert asyncio.run(texts(replace(plain, max_length=8))) != [shorter]
    assert len({id(preparer) for preparer in (one, shorter, prompted)}) == 3
    assert len(shorter.prepare(["hello there " * 20]).ids[0]) == 8
    assert prompted.prepare(["x"], "query").ids == one.prepare(["find: x"]).ids
