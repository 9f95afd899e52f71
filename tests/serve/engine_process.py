"""A real engine process for a test, and what its answers must equal: the same base and adapter alone in transformers + PEFT."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from serve.engines import vectors
from serve.engines.command import engine_command
from serve.engines.settings import KEY, EngineKind, EngineSettings

START_SECONDS = 400


@dataclass
class EngineProcess:
    client: httpx.Client
    process: "subprocess.Popen[bytes]"
    socket: Path
    key: str

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def load(self, name: str, folder: Path) -> None:
        answer = self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
        assert answer.status_code == 200, answer.text

    def embed(self, model: str, ids: Sequence[Sequence[int]]) -> np.ndarray:
        answer = self.post("/v1/embeddings", model=model, input=ids)
        assert answer.status_code == 200, answer.text
        return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)

    def complete(self, model: str, prompt: Sequence[int], **more: Any) -> dict[str, Any]:
        """The one choice of a greedy completion that runs to its last token."""
        body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 12, **more}
        answer = self.post("/v1/completions", model=model, prompt=list(prompt), **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def engine(kind: EngineKind, folder: Path, task: Any, **settings: Any) -> Iterator[EngineProcess]:
    """Started and healthy; ended at the end."""
    with tempfile.TemporaryDirectory(prefix="engine-") as home:
        socket, log = Path(home) / "e.sock", Path(home) / "log"
        argv, env = engine_command(kind, folder=folder, task=task, socket=socket, settings=EngineSettings(**settings))
        with log.open("wb") as file:
            process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=file, stderr=file)
        headers = {"authorization": f"Bearer {env[KEY]}"}
        transport = httpx.HTTPTransport(uds=str(socket))
        with httpx.Client(transport=transport, base_url="http://engine", headers=headers, timeout=200) as client:
            try:
                _wait(client, process, log)
                yield EngineProcess(client, process, socket, env[KEY])
            finally:
                process.terminate()
                try:
                    process.wait(60)
                finally:
                    process.kill()


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if client.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the engine did not start:\n" + log.read_text()[-3000:])


def assert_short_way_to_vectors(client: httpx.Client, models: Sequence[str], ids: list[list[int]], *, longest: int) -> None:
    """The gateway's route gives what OpenAI's gives, and refuses what that refuses. `longest`: tokens that a text may have."""
    for model in models:
        asked = client.post("/v1/embeddings", json={"model": model, "input": ids})
        assert asked.status_code == 200, asked.text
        expected = np.array([row["embedding"] for row in asked.json()["data"]], dtype=np.float32)
        found = client.post(vectors.PATH, json={"model": model, "input": ids})
        assert found.status_code == 200, found.text
        assert np.allclose(vectors.unpacked(found.content, len(ids)), expected, atol=1e-5), model
    for status, body in (
        (404, {"model": "nobody", "input": ids}),
        (400, {"model": "base", "input": [[5] * (longest + 1)]}),
        (400, {"model": "base", "input": []}),
        (400, {"model": "base", "input": [[5, -1]]}),
        (400, {"model": "base", "input": [[5, 10**9]]}),
        (400, {"model": "base", "input": [[5, 10**30]]}),
        (400, {"model": "base", "input": "a text"}),
        (400, {"model": "base"}),
    ):
        refused = client.post(vectors.PATH, json=body)
        assert refused.status_code == status, (body, refused.text)
    body = {"model": "base", "input": ids}
    assert client.post(vectors.PATH, json=body, headers={"authorization": "Bearer other"}).status_code == 401
    assert client.post(vectors.PATH, json=body).status_code == 200


def random_adapter(folder: Path, base: Path, task: Any, *, seed: int, scale: float = 0.3) -> Path:
    """A LoRA over `base` that changes its answers, saved as a trainer saves it."""
    import torch

    from embedft.base import BaseSpec, load_base
    from embedft.methods import attach, save_weights
    from embedft.recipe import AdapterSection

    torch.manual_seed(seed)
    model = attach(load_base(BaseSpec(str(base)), task=task), AdapterSection(r=8, alpha=16), task=task)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale)
    save_weights(model, folder, base_name="test")
    return folder


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 4}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 64, "layers.0.self_attn.v_proj": 2}},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "one of a fused three": {"target_modules": ["q_proj"]},
    "one of a fused two": {"target_modules": ["up_proj", "o_proj"]},
    "some left out": {"exclude_modules": r".*layers\.0.*"},
    "added tokens": {"trainable_token_indices": [5, 6]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "biases": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
}


def featured_adapter(folder: Path, base: Path, *, seed: int, **config: Any) -> Path:
    """A causal LM's adapter as PEFT itself writes it, with every trained tensor moved far from where it began."""
    import peft
    import torch

    from embedft.base import load_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    model: Any = peft.get_peft_model(load_model(base, task="causal_lm"), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight += torch.randn_like(weight) * 0.2
    model.peft_config["default"].base_model_name_or_path = "test"
    model.save_pretrained(str(folder))
    return folder


def plain_peft(base: Path, adapter: Path) -> Any:
    """The base with the adapter as PEFT's own loader puts it there."""
    import peft

    from embedft.base import load_model

    return peft.PeftModel.from_pretrained(load_model(base, task="causal_lm"), str(adapter)).eval()


def solo(base: Path, task: Any, adapter: Path | None) -> Any:
    """The base, alone or with the one adapter, in this process."""
    from embedft.base import load_model
    from embedft.methods import load_adapter

    model = load_model(base, task=task)
    return model if adapter is None else load_adapter(model, adapter)


def assert_vectors(answers: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> None:
    """DESIGN's "equals its own solo answer" for embeddings, and the solo answers are far enough apart to tell."""
    for name, made in answers.items():
        own = (made * alone[name]).sum(1)
        assert own.min() >= 0.9999, (name, own)
        for other in alone:
            if other != name:
                assert (alone[name] * alone[other]).sum(1).max() < 0.995, (name, other)


def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """The greedy continuation and, at each token, its lead over the second in units of the bf16 step at its logit."""
    import torch

    ids, leads = list(prompt), list[float]()
    for _ in range(count):
        with torch.inference_mode():
            top = torch.topk(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), 2)
        leads.append(float(top.values[0] - top.values[1]) / max(2.0**-7 * abs(float(top.values[0])), 1e-9))
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], leads


def assert_ends_with_its_turn(server: EngineProcess, folder: Path) -> None:
    """A base with a chat template whose eos is <|endoftext|>: adapters are taught, and evaluated, to end with <|im_end|>."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end, said = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.encode("rain")[0]
    assert end != tokenizer.eos_token_id
    asked: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    for bias, more, finish in (({end: 100}, {}, "stop"), ({said: 100}, {}, "length"), ({end: 100}, {"ignore_eos": True}, "length")):
        answer = server.post("/v1/chat/completions", **asked, **more, logit_bias={str(token): value for token, value in bias.items()})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == finish
    stopped = server.complete("base", [5, 9], logit_bias={str(said): 100}, stop_token_ids=[said])
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def assert_tokens(tokens: list[int], expected: tuple[list[int], list[float]]) -> None:
    """Equal up to a first token whose lead is within 2 bf16 steps."""
    for token, own, lead in zip(tokens, *expected, strict=True):
        if token != own:
            assert lead <= 2, (tokens, expected)
            return


def prompt_logprobs(model: Any, prompt: Sequence[int]) -> list[float]:
    import torch

    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=torch.tensor([list(prompt)])).logits[0].float(), -1)
    return [float(scores[k, token]) for k, token in enumerate(prompt[1:])]


def reported_logprobs(choice: dict[str, Any], prompt: Sequence[int]) -> list[float]:
    return [entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)]
