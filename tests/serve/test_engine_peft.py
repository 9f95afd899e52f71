"""The peft engine as a process: mixed batches equal solo answers, sequences come and go, and it says no to what it cannot do."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from embedft.encode import Encoder, EncodeSettings
from embedft.model_folder import describe
from embedft.quantize import quantize
from serve.engines.settings import EngineKind
from serve.proxy import EngineClient
from tests.fixtures_embedding import disagree, text, tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import (
    EngineProcess,
    assert_ends_with_its_turn,
    assert_short_way_to_vectors,
    assert_tokens,
    assert_vectors,
    engine,
    greedy,
    prompt_logprobs,
    random_adapter,
    reported_logprobs,
    solo,
)

PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]
LONG = 1500  # tokens of a generation that is still running when the test looks


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return quantize(tiny_llama(folder / "source", eos="<|endoftext|>"), folder / "nf4", scheme="nf4")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(folder / name, llama, "causal_lm", seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def server(llama: Path, adapters: dict[str, Path]) -> Iterator[EngineProcess]:
    with engine("peft", llama, "causal_lm") as process:
        for name, path in adapters.items():
            process.load(name, path)
        yield process
        assert process.stop() == 0


def code(answer: Any) -> str:
    return answer.json()["error"]["code"]


def events(server: EngineProcess, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    with server.client.stream("POST", path, json={"stream": True, **body}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


def test_an_answer_ends_with_its_turn_whatever_the_bases_eos_is(server: EngineProcess, llama: Path) -> None:
    assert_ends_with_its_turn(server, llama)


def test_a_mixed_batch_generates_what_each_adapter_generates_alone(server: EngineProcess, llama: Path, adapters: dict[str, Path]) -> None:
    models = {name: solo(llama, "causal_lm", adapters.get(name)) for name in ("base", "a", "b")}
    alone = {name: [greedy(model, prompt, 12) for prompt in PROMPTS] for name, model in models.items()}
    assert len({str([tokens for tokens, _ in rows]) for rows in alone.values()}) == 3
    jobs = [(name, k, count) for count in (12, 5) for k in range(len(PROMPTS)) for name in alone]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: server.complete(job[0], PROMPTS[job[1]], max_tokens=job[2])["token_ids"], jobs))
    for (name, k, count), tokens in zip(jobs, answers, strict=True):
        tokens_alone, leads = alone[name][k]
        assert_tokens(tokens, (tokens_alone[:count], leads[:count]))
    for name, model in models.items():
        choice = server.complete(name, PROMPTS[2], max_tokens=1, prompt_logprobs=0)
        assert np.allclose(reported_logprobs(choice, PROMPTS[2]), prompt_logprobs(model, PROMPTS[2]), atol=1e-3)


def test_a_short_request_finishes_while_a_long_one_of_another_adapter_runs(server: EngineProcess) -> None:
    long = events(server, "/v1/completions", model="a", prompt=PROMPTS[0], max_tokens=LONG, temperature=0, ignore_eos=True)
    first = next(long)
    assert first["choices"][0]["finish_reason"] is None
    assert server.complete("b", PROMPTS[1], max_tokens=3)["finish_reason"] == "length"
    busy = server.post("/v1/unload_lora_adapter", lora_name="a")
    assert busy.status_code == 503, "the long one had ended: make it longer"
    long.close()


def test_a_client_that_hangs_up_frees_its_place(server: EngineProcess, adapters: dict[str, Path]) -> None:
    long = events(server, "/v1/completions", model="a", prompt=PROMPTS[0], max_tokens=LONG, temperature=0, ignore_eos=True)
    next(long)
    long.close()
    for _ in range(50):
        answer = server.post("/v1/unload_lora_adapter", lora_name="a")
        if answer.status_code == 200:
            break
        time.sleep(0.1)
    assert answer.status_code == 200
    gone = server.post("/v1/completions", model="a", prompt=PROMPTS[0])
    assert (gone.status_code, code(gone)) == (404, "adapter_not_found")
    server.load("a", adapters["a"])


def test_an_unload_waits_for_what_nobody_reads_any_more(server: EngineProcess, adapters: dict[str, Path]) -> None:
    long = events(server, "/v1/completions", model="a", prompt=PROMPTS[0], max_tokens=LONG, temperature=0, ignore_eos=True)
    next(long)

    async def unload() -> None:
        client = EngineClient("base", server.socket, server.key)
        going = asyncio.create_task(client.unload("a"))
        await asyncio.sleep(0.3)
        assert not going.done()
        await asyncio.to_thread(long.close)
        await going
        client.close()

    asyncio.run(unload())
    server.load("a", adapters["a"])


def test_an_adapter_that_is_not_finite_fails_alone(server: EngineProcess, adapters: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(adapters["a"] / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapters["a"] / "adapter_config.json").read_text())
    server.load("nan", tmp_path)
    before = server.complete("b", PROMPTS[1], max_tokens=40)["token_ids"]
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(server.complete, "b", PROMPTS[1], max_tokens=40)
        for temperature in (0, 1):
            answer = server.post("/v1/completions", model="nan", prompt=PROMPTS[0], max_tokens=3, temperature=temperature)
            assert (answer.status_code, code(answer)) == (500, "engine_failed")
        assert beside.result()["token_ids"] == before
    assert server.post("/v1/unload_lora_adapter", lora_name="nan").status_code == 200


def test_a_stream_says_what_the_whole_answer_says(server: EngineProcess) -> None:
    messages = [{"role": "user", "content": "number 3: what does red mean?"}]
    body = {"model": "b", "messages": messages, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", **body).json()
    chunks = list(events(server, "/v1/chat/completions", stream_options={"include_usage": True}, **body))
    told = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert told == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 20
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_text_before_it(server: EngineProcess) -> None:
    whole = server.complete("a", PROMPTS[0], max_tokens=30)["text"]
    stop = whole[len(whole) // 2 :][:3]
    cut = server.complete("a", PROMPTS[0], max_tokens=30, stop=stop)
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_sampling_follows_its_seed(server: EngineProcess) -> None:
    def sampled(seed: int) -> list[str]:
        body = {"model": "base", "prompt": [PROMPTS[0]], "n": 3, "seed": seed, "temperature": 1.5, "max_tokens": 12}
        return [choice["text"] for choice in server.post("/v1/completions", **body).json()["choices"]]

    assert sampled(1) == sampled(1) != sampled(2)
    assert len(set(sampled(1))) == 3


def test_log_probabilities_are_reported_beside_the_tokens(server: EngineProcess) -> None:
    reported = server.complete("a", PROMPTS[0], max_tokens=4, logprobs=2)["logprobs"]
    assert len(reported["tokens"]) == len(reported["token_logprobs"]) == 4
    for chosen, top in zip(reported["token_logprobs"], reported["top_logprobs"], strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"echo": True}, "unsupported_parameter"),
        ({"guided_json": {}}, "unsupported_parameter"),
        ({"min_tokens": 17, "max_tokens": 16}, "invalid_request"),
        ({"min_tokens": 5, "response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"min_p": 1.5}, "invalid_request"),
        ({"logit_bias": {"1000000": 1}}, "token_unknown"),
        ({"logit_bias": {"word": 1}}, "invalid_request"),
        ({"response_format": {"type": "structural_tag"}}, "unsupported_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}}, "schema_invalid"),
        ({"frequency_penalty": 3}, "invalid_request"),
        ({"repetition_penalty": 0}, "invalid_request"),
        ({"repetition_penalty": 1e-45}, "invalid_request"),
        ({"prompt": ["", "x"]}, "input_empty"),
        ({"prompt": ["x"] * 1500}, "too_many_inputs"),
        ({"temperature": -1}, "invalid_request"),
        ({"prompt": [10**6]}, "token_unknown"),
        ({"max_tokens": 5000}, "context_length_exceeded"),
    ],
)
def test_what_it_cannot_do_is_a_400_with_a_stable_code(server: EngineProcess, body: dict[str, Any], expected: str) -> None:
    answer = server.post("/v1/completions", **{"model": "base", "prompt": PROMPTS[0], **body})
    assert (answer.status_code, code(answer)) == (400, expected)


def test_a_chat_template_that_does_not_know_tools_is_a_400(server: EngineProcess) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    answer = server.post("/v1/chat/completions", model="base", messages=[{"role": "user", "content": "x"}], tools=tools)
    assert (answer.status_code, code(answer)) == (400, "tools_unsupported")


def test_a_messages_text_parts_are_its_lines_and_no_other_part_is_read(server: EngineProcess) -> None:
    def ask(content: Any) -> Any:
        return server.post(
            "/v1/chat/completions", model="base", messages=[{"role": "user", "content": content}], max_tokens=6, temperature=0
        )

    parts = [{"type": "text", "text": "what does"}, {"type": "text", "text": "red mean?"}]
    assert ask(parts).json()["choices"] == ask("what does\nred mean?").json()["choices"]
    image = ask([{"type": "image_url", "image_url": {"url": "data:,"}}])
    assert (image.status_code, code(image)) == (400, "unsupported_parameter")


def test_without_the_key_only_health_answers(server: EngineProcess) -> None:
    assert server.client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
    assert server.client.get("/health", headers={"authorization": ""}).status_code == 200


def test_a_damaged_adapter_is_refused_and_leaves_the_rest_as_it_was(
    server: EngineProcess, adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = server.complete("b", PROMPTS[1])["token_ids"]
    tensors = load_file(adapters["a"] / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapters["a"] / "adapter_config.json").read_text())
    answer = server.post("/v1/load_lora_adapter", lora_name="c", lora_path=str(tmp_path))
    assert (answer.status_code, code(answer)) == (400, "adapter_invalid")
    assert server.complete("b", PROMPTS[1])["token_ids"] == before
    twice = server.post("/v1/load_lora_adapter", lora_name="b", lora_path=str(adapters["b"]))
    assert (twice.status_code, code(twice)) == (400, "adapter_exists")


def test_embeddings_of_many_adapters_in_one_batch_equal_their_solo_vectors(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="cls")
    adapters = {name: random_adapter(tmp_path / name, base, "embedding", seed=seed) for seed, name in enumerate("ab")}
    info = describe(base)
    settings = EncodeSettings(info.pooling, info.normalize, info.positions)  # an adapter may be trained to read more than its base does
    texts = [text("query", topic, topic) + " find" * 9 * topic for topic in range(6)]
    assert len(Encoder(None, base, settings).preparer.prepare(texts).ids[-1]) > info.max_length
    alone = {name: Encoder(solo(base, "embedding", adapters.get(name)), base, settings).encode(texts) for name in ("base", "a", "b")}
    ids = Encoder(None, base, settings).preparer.prepare(texts).ids
    with engine("peft", base, "embedding") as server:
        assert np.allclose(server.embed("base", ids), alone["base"], atol=1e-5)
        for name, path in adapters.items():
            server.load(name, path)
        with ThreadPoolExecutor(9) as pool:
            asked = [(name, pool.submit(server.embed, name, ids)) for _ in range(3) for name in alone]
            for name, future in asked:
                assert_vectors({name: future.result()}, alone)
        assert np.allclose(server.embed("a", texts), alone["a"], atol=1e-5)  # type: ignore[arg-type]
        for name in adapters:
            assert server.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        assert np.allclose(server.embed("base", ids), alone["base"], atol=1e-6)
        server.load("b", adapters["b"])
        assert_short_way_to_vectors(server.client, ["base", "b"], ids, longest=info.positions)
        wrong = server.post("/v1/embeddings", model="a", input=ids)
        assert (wrong.status_code, code(wrong)) == (404, "adapter_not_found")
        too_long = server.post("/v1/embeddings", model="base", input="find " * 99)
        assert (too_long.status_code, code(too_long)) == (400, "input_too_long")


@pytest.mark.parametrize("kind", ["peft", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_base_whose_tokenizer_files_disagree_is_not_served_and_the_log_says_it_in_words(kind: EngineKind, tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="mean")
    disagree(base)
    with pytest.raises(AssertionError, match=r"tokenizer_config\.json disagree") as refused, engine(kind, base, "embedding"):
        pass
    assert "Traceback" not in str(refused.value)
