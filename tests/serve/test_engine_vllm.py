"""Real vLLM servers: each answer equals the same base and adapter alone in transformers + PEFT. One start a base."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedft.base import BaseSpec, base_folder
from embedft.encode import Encoder, EncodeSettings
from embedft.model_folder import describe
from embedft.quantize import quantize
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import (
    EngineProcess,
    assert_tokens,
    assert_vectors,
    engine,
    greedy,
    prompt_logprobs,
    random_adapter,
    reported_logprobs,
    solo,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
TEXTS = ["sort a list in place", "x", "The quick brown fox jumps over the lazy dog. " * 4, "read a file line by line"]
PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]
SLOTS = 2  # as many as adapters: with all slots taken, stock vLLM on a CPU gives base rows the last adapter


def vectors(base: Path, adapter: Path | None, texts: list[str]) -> np.ndarray:
    info = describe(base)
    model = solo(base, "embedding", adapter)
    return Encoder(model, base, EncodeSettings(info.pooling, info.normalize, info.max_length)).encode(texts)


def check_embeddings(base: Path, folder: Path, texts: list[str]) -> None:
    """Two adapters and the base over one server, asked twice and mixed; each equals its own solo vectors."""
    adapters = {name: random_adapter(folder / name, base, "embedding", seed=seed) for seed, name in enumerate("ab")}
    alone = {name: vectors(base, adapters.get(name), texts) for name in ("base", "a", "b")}
    info = describe(base)
    ids = Encoder(None, base, EncodeSettings(info.pooling, info.normalize, info.max_length)).preparer.prepare(texts).ids
    with engine("vllm", base, "embedding", max_loras=SLOTS) as server:
        for name, path in adapters.items():
            server.load(name, path)
        with ThreadPoolExecutor(6) as pool:
            for _ in range(2):
                asked = {name: pool.submit(server.embed, name, ids) for name in alone}
                assert_vectors({name: future.result() for name, future in asked.items()}, alone)
        check_names(server)
        assert server.stop() == 0


def check_names(server: EngineProcess) -> None:
    """An unknown name is a 404, and so is one that was unloaded; no key, no answer."""
    listed = {row["id"]: row["parent"] for row in server.client.get("/v1/models").json()["data"]}
    assert listed == {"base": None, "a": "base", "b": "base"}
    assert server.post("/v1/embeddings", model="c", input="x").status_code == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="a").status_code == 200
    assert server.post("/v1/embeddings", model="a", input="x").status_code == 404
    assert server.client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401


def test_minilm_in_nf4_answers_as_base_a_and_b(tmp_path: Path) -> None:
    check_embeddings(base_folder(BaseSpec("minilm", "nf4")), tmp_path, TEXTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return quantize(tiny_llama(folder / "source"), folder / "nf4", scheme="nf4")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(folder / name, llama, "causal_lm", seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def server(llama: Path, adapters: dict[str, Path]) -> Iterator[EngineProcess]:
    with engine("vllm", llama, "causal_lm", max_loras=SLOTS, max_length=256) as process:
        for name, path in adapters.items():
            process.load(name, path)
        yield process


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


def test_an_adapter_that_matches_nothing_is_refused(server: EngineProcess, adapters: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key.replace("layers", "blocks"): value for key, value in load_file(adapters["a"] / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapters["a"] / "adapter_config.json").read_text())
    answer = server.post("/v1/load_lora_adapter", lora_name="c", lora_path=str(tmp_path))
    assert answer.status_code >= 400
    assert "not linear layers of the model" in answer.text
    assert server.post("/v1/completions", model="c", prompt=PROMPTS[0]).status_code == 404
    assert server.complete("base", PROMPTS[0])["token_ids"]
