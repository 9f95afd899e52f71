"""seed-lm's byte-level BPE tokenizer and chat template. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from embedft.model_folder import CHATML

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, PAD, TURN, TURN_END)  # ids 0 to 3
VOCAB = 4096
CONTEXT = 2048


def train_tokenizer(texts: Iterable[str], *, vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` entries or fewer (little text); digits stand alone, nothing is lost in a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def render_chat(messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = False) -> str:
    """The chat template in plain Python: what training data is made with; a test holds it equal to CHATML."""
    text = "".join(f"{TURN}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)
    return text + (f"{TURN}assistant\n" if generation_prompt else "")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template included) as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "unk_token": None,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
