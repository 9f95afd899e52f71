"""vLLM over bases that stock vLLM ends at, or answers wrongly, on a CPU with transformers 5, and over bases that
come packed: as in transformers + PEFT, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.encode import Encoder
from embedft.errors import EngineFailed
from embedft.model_folder import describe
from embedft.vectors import published_settings
from serve.engines.command import engine_command
from serve.engines.settings import EngineSettings
from serve.engines.vllm import has_avx512
from tests.families import tiny_decoder, tiny_embedder
from tests.fixtures_lm import tiny_llama
from tests.fixtures_packed import packed_copy
from tests.serve.engine_process import (
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
PROMPTS = [[5, 9, 100, 33], [7, 30] * 10]


def test_a_mixture_of_experts_writes_with_an_adapter_of_its_linear_layers(tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", "qwen3_moe")
    adapter = random_adapter(tmp_path / "a", base, "causal_lm", seed=0)
    models = {"base": solo(base, "causal_lm", None), "a": solo(base, "causal_lm", adapter)}
    alone = {name: [greedy(model, prompt, 12) for prompt in PROMPTS] for name, model in models.items()}
    assert str(alone["a"]) != str(alone["base"])
    with engine("vllm", base, "causal_lm") as server:
        server.load("a", adapter)
        for name, answers in alone.items():
            for prompt, expected in zip(PROMPTS, answers, strict=True):
                assert_tokens(server.complete(name, prompt)["token_ids"], expected)


def test_a_multilingual_encoder_that_transformers_5_saved_gives_its_own_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDFT_DTYPE", "float32")
    base = tiny_embedder(tmp_path / "base", "xlm-roberta")
    adapter = random_adapter(tmp_path / "a", base, "embedding", seed=0)
    settings = published_settings(describe(base), 48)
    models = {"base": solo(base, "embedding", None), "a": solo(base, "embedding", adapter)}
    alone = {name: Encoder(model, base, settings).encode_ids(PROMPTS) for name, model in models.items()}
    with engine("vllm", base, "embedding") as server:
        server.load("a", adapter)
        assert_vectors({name: server.embed(name, PROMPTS) for name in alone}, alone)


def test_a_family_whose_positions_vllm_would_place_otherwise_is_refused(tmp_path: Path) -> None:
    base = tiny_embedder(tmp_path / "base", "camembert")
    with pytest.raises(EngineFailed, match=r"tokens of camembert otherwise.*peft engine"):
        engine_command("vllm", folder=base, task="embedding", socket=tmp_path / "s", settings=EngineSettings())


@pytest.mark.parametrize(("method", "sym"), [("gptq", True), ("awq", False)])
def test_a_base_that_comes_packed_answers_as_the_weights_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, sym: bool
) -> None:
    if not has_avx512():
        pytest.skip("vLLM multiplies packed weights on CPUs with AVX512 only")
    monkeypatch.setenv("EMBEDFT_DTYPE", "bfloat16")
    base = tmp_path / "packed"
    packed_copy(tiny_llama(tmp_path / "base", layers=1), base, method, sym=sym)
    adapter = random_adapter(tmp_path / "a", base, "causal_lm", seed=0)
    alone = {
        name: [prompt_logprobs(solo(base, "causal_lm", each), prompt) for prompt in PROMPTS]
        for name, each in (("base", None), ("a", adapter))
    }
    assert np.abs(np.concatenate(alone["a"]) - np.concatenate(alone["base"])).max() > 0.5
    with engine("vllm", base, "causal_lm") as server:
        server.load("a", adapter)
        for name, expected in alone.items():
            for prompt, scores in zip(PROMPTS, expected, strict=True):
                found = reported_logprobs(server.complete(name, prompt, max_tokens=1, prompt_logprobs=0), prompt)
                np.testing.assert_allclose(found, scores, atol=0.1)


@pytest.mark.parametrize(
    ("dtype", "kind", "match"),
    [
        ("float32", {}, "gptq in float32"),
        ("bfloat16", {"bits": 8}, "gptq of 8 bits"),
        ("bfloat16", {"sym": False}, "gptq without symmetric codes"),
        ("bfloat16", {"by_activation": True}, r"gptq in the order of activations \(desc_act\): use the peft engine"),
    ],
)
def test_packed_weights_that_vllm_has_no_kernel_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: dict[str, Any], match: str
) -> None:
    monkeypatch.setenv("EMBEDFT_DTYPE", dtype)
    packed_copy(tiny_llama(tmp_path / "base", layers=1), tmp_path / "packed", "gptq", **kind)
    with pytest.raises(EngineFailed, match=match):
        engine_command("vllm", folder=tmp_path / "packed", task="causal_lm", socket=tmp_path / "s", settings=EngineSettings())
