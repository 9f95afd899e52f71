"""A real vLLM server: each answer equals the same base and adapter alone in transformers + PEFT. Embeddings: tests/test_line.py."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedft.quantize import quantize
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import (
    FEATURES,
    EngineProcess,
    assert_ends_with_its_turn,
    assert_tokens,
    engine,
    featured_adapter,
    greedy,
    plain_peft,
    prompt_logprobs,
    random_adapter,
    reported_logprobs,
    solo,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]
SLOTS = 2  # as many as adapters: with all slots taken, stock vLLM on a CPU gives base rows the last adapter
KV_GIB = 2**-9  # room for a few requests: what one of them leaves in the cache, the next ones get


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return quantize(tiny_llama(folder / "source", eos="<|endoftext|>"), folder / "nf4", scheme="nf4")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(folder / name, llama, "causal_lm", seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch would keep what it compiles, and vLLM what it finds out about a model."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def server(llama: Path, adapters: dict[str, Path], compiled: Path) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        patch.setenv("VLLM_CACHE_ROOT", str(compiled))
        patch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        with engine("vllm", llama, "causal_lm", max_loras=SLOTS, max_length=256, kv_gib=KV_GIB, tool_parser="hermes") as process:
            for name, path in adapters.items():
                process.load(name, path)
            yield process


def test_an_answer_ends_with_its_turn_whatever_the_bases_eos_is(server: EngineProcess, llama: Path) -> None:
    assert_ends_with_its_turn(server, llama)


def test_a_mixed_batch_generates_what_each_adapter_generates_alone(server: EngineProcess, llama: Path, adapters: dict[str, Path]) -> None:
    alone = {name: [greedy(solo(llama, "causal_lm", adapters.get(name)), prompt, 12) for prompt in PROMPTS] for name in ("base", "a", "b")}
    assert len({str([tokens for tokens, _ in rows]) for rows in alone.values()}) == 3
    jobs = [(name, k) for _ in range(2) for k in range(len(PROMPTS)) for name in alone]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda job: server.complete(job[0], PROMPTS[job[1]])["token_ids"], jobs)
    for (name, k), tokens in zip(jobs, answers, strict=True):
        assert_tokens(tokens, alone[name][k])


def test_prompt_log_probabilities_are_the_adapters_own(server: EngineProcess, llama: Path, adapters: dict[str, Path]) -> None:
    for name in ("base", "a", "b"):
        model = solo(llama, "causal_lm", adapters.get(name))
        choice = server.complete(name, PROMPTS[2], max_tokens=1, prompt_logprobs=0)
        assert np.allclose(reported_logprobs(choice, PROMPTS[2]), prompt_logprobs(model, PROMPTS[2]), atol=2e-3), name


def test_no_request_waits_for_a_compiler(server: EngineProcess, compiled: Path) -> None:
    """On a CPU vLLM has torch compile how a token is drawn and how log-probabilities are ranked: seconds, for the first who asks."""
    sampled = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1, "logprobs": 2}
    assert len(server.complete("a", PROMPTS[0], **sampled)["token_ids"]) == 12
    assert torch.cuda.is_available() or not [*compiled.rglob("*.so")]


def test_several_answers_keep_to_a_schema_with_log_probabilities_and_a_tool_is_called_by_an_adapter(server: EngineProcess) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"], "additionalProperties": False}
    asked: dict[str, Any] = {"model": "a", "messages": [{"role": "user", "content": "what does red mean?"}], "max_tokens": 60, "seed": 5}
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    sampled = {"n": 3, "temperature": 1.5, "logprobs": True, "top_logprobs": 2}
    made = server.post("/v1/chat/completions", **asked, **sampled, response_format=wanted).json()
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2]
    for choice in made["choices"]:
        assert isinstance(json.loads(choice["message"]["content"])["sure"], bool)
        assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    tool = {"type": "function", "function": {"name": "look", "parameters": schema, "strict": True}}
    called: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "max_tokens": 150}
    answer = server.post("/v1/chat/completions", **asked | called, n=3, temperature=1.5)
    assert answer.status_code == 200, answer.text
    ended = [choice["message"] for choice in answer.json()["choices"] if choice["finish_reason"] != "length"]
    assert ended
    for message in ended:
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"] * len(message["tool_calls"])
        assert isinstance(json.loads(message["tool_calls"][0]["function"]["arguments"])["sure"], bool)


def test_a_kind_of_model_that_is_new_to_it_is_looked_at_without_another_vllm(server: EngineProcess, compiled: Path) -> None:
    """vLLM would start a Python that imports it a second time; what processes that have ended took is in the server's own account."""
    assert [*compiled.glob("modelinfos/*")]
    assert psutil.Process(server.process.pid).cpu_times().children_user < 3


def test_the_engine_holds_no_library_that_it_does_not_use(server: EngineProcess) -> None:
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/torch/" in mapped
    assert not [name for name in ("/scipy/", "/pandas/", "/pyarrow/", "/sklearn/", "/cv2/") if name in mapped]


def test_what_its_processes_speak_through_lies_beside_its_own_socket(server: EngineProcess) -> None:
    """There it goes with the gateway's folder; vLLM would leave it in the machine's temporary folder."""
    assert sum(path.is_socket() for path in server.socket.parent.iterdir()) > 1


@pytest.mark.parametrize("feature", FEATURES)
def test_what_a_lora_can_ask_for_is_done_as_peft_does_it_or_refused(
    server: EngineProcess, llama: Path, tmp_path: Path, feature: str
) -> None:
    """No third outcome: never loaded and wrong, never loaded and without effect."""
    before = reported_logprobs(server.complete("base", PROMPTS[2], max_tokens=1, prompt_logprobs=0), PROMPTS[2])
    try:
        folder = featured_adapter(tmp_path / "f", llama, seed=1, **FEATURES[feature])
    except TypeError:
        assert feature == "PiSSA", "PEFT itself makes that one on no quantized base"
        return
    answer = server.post("/v1/load_lora_adapter", lora_name="f", lora_path=str(folder))
    if answer.status_code != 200:
        assert feature in {"dora", "added tokens", "whole embeddings", "biases"}, answer.text
        assert server.post("/v1/completions", model="f", prompt=PROMPTS[0]).status_code == 404
    else:
        choice = server.complete("f", PROMPTS[2], max_tokens=1, prompt_logprobs=0)
        wanted = prompt_logprobs(plain_peft(llama, folder), PROMPTS[2])
        assert np.allclose(reported_logprobs(choice, PROMPTS[2]), wanted, atol=2e-3)
        assert not np.allclose(wanted, before, atol=1e-2)
        assert server.post("/v1/unload_lora_adapter", lora_name="f").status_code == 200
    after = reported_logprobs(server.complete("base", PROMPTS[2], max_tokens=1, prompt_logprobs=0), PROMPTS[2])
    assert np.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("factor", [float("nan"), 1e25])
def test_an_adapter_that_is_not_finite_fails_alone(
    server: EngineProcess, llama: Path, adapters: dict[str, Path], tmp_path: Path, factor: float
) -> None:
    """Not even in the cache's blocks, which others get after it, is anything left of it."""
    tensors = load_file(adapters["a"] / "adapter_model.safetensors")
    save_file({name: tensor * factor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapters["a"] / "adapter_config.json").read_text())
    server.load("bad", tmp_path)
    alone = {name: greedy(solo(llama, "causal_lm", adapters.get(name)), PROMPTS[1], 12) for name in ("base", "b")}
    bad = {"model": "bad", "max_tokens": 12, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(server.complete, "b", PROMPTS[1], max_tokens=12) for _ in range(3)]
        list(pool.map(lambda turn: server.post("/v1/completions", prompt=[turn + 5] * 60, **bad), range(24)))
    for answer in beside:
        assert_tokens(answer.result()["token_ids"], alone["b"])
    assert server.post("/v1/unload_lora_adapter", lora_name="bad").status_code == 200
    for _ in range(3):
        for name, expected in alone.items():
            assert_tokens(server.complete(name, PROMPTS[1], max_tokens=12)["token_ids"], expected)


def test_an_adapter_that_matches_nothing_is_refused(server: EngineProcess, adapters: dict[str, Path], tmp_path: Path) -> None:
    tensors = {key.replace("layers", "blocks"): value for key, value in load_file(adapters["a"] / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapters["a"] / "adapter_config.json").read_text())
    answer = server.post("/v1/load_lora_adapter", lora_name="c", lora_path=str(tmp_path))
    assert answer.status_code >= 400
    assert "not linear layers of the model" in answer.text
    assert server.post("/v1/completions", model="c", prompt=PROMPTS[0]).status_code == 404
    assert server.complete("base", PROMPTS[0])["token_ids"]


def test_names_that_are_not_there_get_no_answer(server: EngineProcess) -> None:
    """An unknown name is a 404, and so is one that was unloaded (the last test: it unloads a); no key, no answer."""
    listed = {row["id"]: row["parent"] for row in server.client.get("/v1/models").json()["data"]}
    assert listed == {"base": None, "a": "base", "b": "base"}
    assert server.post("/v1/completions", model="d", prompt=PROMPTS[0]).status_code == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="a").status_code == 200
    assert server.post("/v1/completions", model="a", prompt=PROMPTS[0]).status_code == 404
    assert server.client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
    assert server.stop() == 0
