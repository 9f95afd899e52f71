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
_ENCODER = {**_SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 66}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "camembert": _ENCODER,
    "mpnet": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 32},
    "albert": {**_ENCODER, "embedding_size": 32},
    "deberta-v2": {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 66},
    "modernbert": {**_ENCODER, "local_attention": 8},
    "nomic_bert": _ENCODER,
    "eurobert": _ENCODER,
    "mobilebert": {**_ENCODER, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "roformer": _ENCODER,
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "use_bidirectional_attention": True},
}


def tiny_embedder(folder: Path, family: str) -> Path:
    """A random base for vectors, mean-pooled, as sentence-transformers would save it."""
    import torch
    from transformers import AutoConfig, AutoModel

    from embedft.encode import EncodeSettings
    from embedft.training.sentence_files import write_sentence_files

    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 2, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config: Any = AutoConfig.for_model(family, **ENCODERS[family], **ids, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(config)
    model.save_pretrained(folder)
    width = config.dim if family == "distilbert" else config.hidden_size
    write_sentence_files(folder, tokenizer, EncodeSettings("mean", True, 48), dimension=width)
    return folder


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
