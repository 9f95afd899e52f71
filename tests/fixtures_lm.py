"""A tiny random Llama with its tokenizer, and a task it can learn: for tests of language models without a download."""

import json
from pathlib import Path
from typing import Any

from embedft.model_folder import CHATML

ANSWERS = {"red": "stop", "green": "go", "blue": "rain", "black": "night", "white": "snow", "grey": "stone"}


def planted_rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Prompts that name a colour and a number; the colour alone decides the answer."""
    colours = list(ANSWERS)
    return [
        {
            "prompt": f"number {start + i}: what does {colours[i % len(colours)]} mean?",
            "completion": ANSWERS[colours[i % len(colours)]],
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_llama(folder: Path, *, template: bool = True, seed: int = 0, layers: int = 2, eos: str = "<|im_end|>") -> Path:
    """Write a random Llama of `layers` layers (hidden 128, heads of 64) and a byte-level BPE tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template=template, eos=eos)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(*, template: bool = True, eos: str = "<|im_end|>") -> Any:
    """A byte-level BPE of some 400 tokens trained on the planted task's own words; without a template, its eos is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [row["prompt"] + "\n" + row["completion"] + "\nuser\nassistant\nsystem\n" for row in planted_rows(60)]
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos if template else "<|endoftext|>", pad_token="<|endoftext|>"
    )
    if template:
        wrapped.chat_template = CHATML
    return wrapped


def planted_recipe(
    folder: Path, base: Path, *, quantization: str = "none", train: dict[str, Any] | None = None, test_rows: int = 36
) -> Any:
    """A recipe for the planted task with its data written to `folder`."""
    from embedft.recipe import parse_recipe

    content: dict[str, Any] = {
        "task": "causal_lm",
        "name": f"colours-{quantization}",
        "base": {"model": str(base), "quantization": quantization},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", planted_rows(240)))},
        "train": {"epochs": 2, "batch": 12, "lr": 1e-2, "max_length": 64} | (train or {}),
        "eval": {"max_new_tokens": 4},
    }
    if test_rows:
        content["data"]["eval"] = str(write_jsonl(folder / "test.jsonl", planted_rows(test_rows, start=1000)))
    return parse_recipe(content)
