"""Tiny random bases of the families that people fine-tune, with windows and caches small enough to be filled by a short text."""

from pathlib import Path
from typing import Any

from tests.fixtures_lm import tiny_tokenizer

_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "initializer_range": 0.2}
_GROUPED = {**_SHAPE, "num_key_value_heads": 1, "head_dim": 32}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "ministral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {**_GROUPED, "sliding_window": 8},
    "phi": _SHAPE,
    "smollm3": _GROUPED,
    "granite": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 8},
    "cohere": _GROUPED,
    "exaone4": {**_GROUPED, "sliding_window": 8},
    "starcoder2": {**_GROUPED, "sliding_window": 8},
    "stablelm": _GROUPED,
    "glm4": _GROUPED,
    "gpt_neox": _SHAPE,
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "initializer_range": 0.2},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    "opt": {**_SHAPE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "num_experts": 4},
    "gpt_oss": {**_GROUPED, "num_local_experts": 4, "sliding_window": 8},
    "lfm2": _GROUPED,
}


def tiny_decoder(folder: Path, family: str) -> Path:
    """A random causal LM of the family and the byte-level tokenizer of the planted tasks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config: Any = AutoConfig.for_model(family, **DECODERS[family], **ends, vocab_size=len(tokenizer), tie_word_embeddings=True)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
