"""The peft engine serves every method of the table: many of them at once, each equal to itself alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.base import BaseSpec, load_base
from embedft.encode import Encoder, EncodeSettings
from embedft.errors import MethodUnsupported
from embedft.methods import METHODS, attach, save_weights
from embedft.model_folder import describe
from embedft.quantize import quantize
from embedft.recipe import AdapterSection
from tests.embedft.methods.cells import WHOLE, small
from tests.fixtures_embedding import text, tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import assert_tokens, assert_vectors, engine, greedy, prompt_logprobs, reported_logprobs, solo

PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]


def adapter_of(folder: Path, base: Path, task: Any, method: str, seed: int) -> Path | None:
    """An adapter of that method whose every trainable tensor was moved away from its start; None where the table refuses."""
    import torch

    torch.manual_seed(seed)
    ids = torch.randint(5, 100, (4, 12))
    try:
        model = attach(load_base(BaseSpec(str(base)), task=task), AdapterSection(**small(method)), task=task,
                       batches=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])  # fmt: skip
    except MethodUnsupported:
        return None
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight) * (2.0 if "vera" in name or "gate" in name else 0.02 if method == "full" else 0.3))
    save_weights(model, folder, base_name="test")
    return folder


def on(quantization: str) -> list[str]:
    """All methods on a plain base, every other on a quantized one (all with WHOLE)."""
    return [*METHODS][:: 1 if WHOLE or quantization == "none" else 2]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"] if WHOLE else ["none", "nf4"])
def test_every_method_generates_beside_the_others_what_it_generates_alone(tmp_path: Path, quantization: str) -> None:
    base = tiny_llama(tmp_path / "source")
    if quantization != "none":
        base = quantize(base, tmp_path / "quantized", scheme=quantization)
    made = {name: adapter_of(tmp_path / name, base, "causal_lm", name, seed) for seed, name in enumerate(on(quantization))}
    adapters = {name: folder for name, folder in made.items() if folder}
    assert len(adapters) >= 0.6 * len(made)
    models = {name: solo(base, "causal_lm", adapters.get(name)) for name in ["base", *adapters]}
    alone = {name: [greedy(model, prompt, 6) for prompt in PROMPTS] for name, model in models.items()}
    assert len({str([tokens for tokens, _ in rows]) for rows in alone.values()}) == len(alone)
    with engine("peft", base, "causal_lm") as server:
        for name, path in adapters.items():
            server.load(name, path)
        jobs = [(name, k) for k in range(len(PROMPTS)) for name in alone]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda job: server.complete(job[0], PROMPTS[job[1]], max_tokens=6)["token_ids"], jobs))
        for (name, k), tokens in zip(jobs, answers, strict=True):
            assert_tokens(tokens, alone[name][k])
        for name, model in models.items():
            choice = server.complete(name, PROMPTS[2], max_tokens=1, prompt_logprobs=0)
            assert np.allclose(reported_logprobs(choice, PROMPTS[2]), prompt_logprobs(model, PROMPTS[2]), atol=2e-3), name
        for name in adapters:
            assert server.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        assert_tokens(server.complete("base", PROMPTS[0], max_tokens=6)["token_ids"], alone["base"][0])


def test_every_method_embeds_beside_the_others_what_it_embeds_alone(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="cls")
    info = describe(base)
    settings = EncodeSettings(info.pooling, info.normalize, info.max_length)
    made = {name: adapter_of(tmp_path / name, base, "embedding", name, seed) for seed, name in enumerate(METHODS)}
    adapters = {name: folder for name, folder in made.items() if folder}
    texts = [text("query", topic, topic) + " find" * topic for topic in range(6)]
    models = {name: solo(base, "embedding", adapters.get(name)) for name in ["base", *adapters]}
    alone = {name: Encoder(model, base, settings).encode(texts) for name, model in models.items()}
    ids = Encoder(None, base, settings).preparer.prepare(texts).ids
    with engine("peft", base, "embedding") as server:
        for name, path in adapters.items():
            server.load(name, path)
        with ThreadPoolExecutor(16) as pool:
            asked = [(name, pool.submit(server.embed, name, ids)) for name in alone]
            for name, future in asked:
                assert_vectors({name: future.result()}, alone)


def test_a_mixed_batch_of_the_table_is_one_forward_pass(tmp_path: Path) -> None:
    """mixed_batch, as the engine does it: rows of those methods share a group, rows of the others do not."""
    from serve.engines.peft.bank import AdapterBank

    base = tiny_llama(tmp_path / "source")
    loaded = load_base(BaseSpec(str(base)), task="causal_lm")
    shared = {tensor.data_ptr() for tensor in loaded.model.parameters()}
    bank = AdapterBank(loaded)
    for seed, (name, row) in enumerate(METHODS.items()):
        if folder := adapter_of(tmp_path / name, base, "causal_lm", name, seed):
            bank.load(name, folder)
            assert (bank.group(name) is None) == row.mixed_batch, name
    for name in bank.names:
        held = bank.model_of(bank.group(name))
        assert shared <= {tensor.data_ptr() for tensor in held.parameters()}, f"{name} holds weights of its own"
