"""What is served and asked for: random bases and adapters, popularities, arrivals. Knows no engine."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POPULARITIES = ("distinct", "uniform", "zipf", "identical")
RANK = 16


@dataclass(frozen=True)
class Request:
    """One text or prompt as token ids, for an adapter or for the base (None), due `arrival` seconds after the start."""

    adapter: int | None
    ids: list[int]
    arrival: float = 0.0


def choose(popularity: str, requests: int, adapters: int, *, seed: int) -> list[int]:
    """The adapter of each request (Punica's popularities; skewed is Zipf with exponent 1.5).

    distinct: each request the next adapter; uniform: ⌈√requests⌉ equal groups; identical: all the same.
    """
    rng = np.random.default_rng(seed)
    if popularity == "distinct":
        return [k % adapters for k in range(requests)]
    if popularity == "identical":
        return [0] * requests
    if popularity == "uniform":
        groups = min(adapters, math.ceil(math.sqrt(requests)))
        return [int(k) for k in rng.permutation(np.arange(requests) % groups)]
    weights = 1.0 / np.arange(1, adapters + 1) ** 1.5
    return [int(k) for k in rng.choice(adapters, size=requests, p=weights / weights.sum())]


def arrivals(requests: int, rate: float, *, cv: float = 1.0, seed: int) -> list[float]:
    """Open-loop arrival times: gaps from Gamma(1/cv², cv²/rate), as S-LoRA draws them."""
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, size=requests)
    return [float(t) for t in np.cumsum(gaps)]


def texts(folder: Path, count: int, *, seed: int) -> list[list[int]]:
    """Token ids of random texts of 10 to 60 words, cut by the base's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer, rng = Tokenizer.from_file(str(folder / "tokenizer.json")), np.random.default_rng(seed)
    tokenizer.no_padding()
    words = ["sort", "list", "file", "line", "read", "write", "text", "number", "value", "key", "cache", "model", "index", "query", "page"]
    return [tokenizer.encode(" ".join(rng.choice(words, size=int(rng.integers(10, 61))))).ids for _ in range(count)]


def llama(folder: Path, *, hidden: int = 576, layers: int = 30, heads: int = 9, kv_heads: int = 3, inner: int = 1536) -> Path:
    """A random Llama (the defaults: 135 M parameters) with a tokenizer that no request uses: prompts are token ids."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {f"t{k}": k for k in range(1, 49152)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>").save_pretrained(folder)
    return folder


def prompts(count: int, length: int, *, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(k) for k in rng.integers(1, 49152, size=length)] for _ in range(count)]


def adapters(folder: Path, base: Path, task: Any, count: int) -> list[Path]:
    """`count` random LoRA folders on all linear layers, in PEFT's format."""
    import torch
    from safetensors.torch import load_file, save_file

    from embedft.base import BaseSpec, load_base
    from embedft.methods import attach, save_weights
    from embedft.recipe import AdapterSection

    first = folder / "0"
    save_weights(
        attach(load_base(BaseSpec(str(base)), task=task), AdapterSection(r=RANK, alpha=RANK), task=task), first, base_name="random"
    )
    tensors = load_file(str(first / "adapter_model.safetensors"))
    for k in range(count):
        torch.manual_seed(k)
        target = folder / str(k)
        target.mkdir(exist_ok=True)
        scale = {name: 0.05 if "lora_B" in name else tensor.shape[1] ** -0.5 for name, tensor in tensors.items()}
        drawn = {name: torch.randn_like(tensor) * scale[name] for name, tensor in tensors.items()}
        save_file(drawn, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
        if k:
            shutil.copy(first / "adapter_config.json", target)
    return [folder / str(k) for k in range(count)]


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
