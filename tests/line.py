"""Adapters trained here for the tests of the whole line, and what each answers alone in transformers + PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder, load_model
from embedft.encode import Encoder, EncodeSettings
from embedft.methods import load_adapter
from embedft.model_folder import describe
from embedft.recipe import parse_recipe
from embedft.verify import settings_of
from tests.fixtures_embedding import planted_rows as pairs
from tests.fixtures_embedding import text, write_rows
from tests.fixtures_lm import planted_rows as questions
from tests.fixtures_lm import write_jsonl

QUERIES = [text("query", topic, 0) for topic in range(8)] + ["a longer query " * 9, "x", "find " * 40]
PROMPTS = [row["prompt"] for row in questions(6, start=500)]
TOKENS = 8
OWN_WORDS = ("lion", "bread", "river")


def train_embedding(store: AdapterStore, name: str, folder: Path, *, seed: int, **base: str) -> str:
    """A retrieval adapter learnt in seconds; its generation. Another seed also learns from other pairs."""
    from embedft.embedding.train import train

    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / f"pairs-{seed}.jsonl", pairs(96, start=16 * 60 * seed, shuffled=seed > 1))
    content: dict[str, Any] = {"task": "embedding", "name": name, "base": base, "data": {"train": rows}}
    made_up = {"guard": None}  # a made-up language takes the place of English in it
    recipe: Any = parse_recipe(content | {"train": {"batch": 16, "lr": 5e-3, "max_length": 48, "seed": seed}, "eval": made_up})
    result: Any = train(recipe, store=store, progress=False)
    return result.generation


def train_causal_lm(store: AdapterStore, name: str, folder: Path, *, seed: int, **base: str) -> str:
    """A language-model adapter that answers by colour after a word of its own: by that no two say the same, however little they learnt."""
    from embedft.causal_lm.train import train

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row | {"completion": f"{OWN_WORDS[seed - 1]} {row['completion']}"} for row in questions(64)]
    data = write_jsonl(folder / f"questions-{seed}.jsonl", rows)
    content: dict[str, Any] = {"task": "causal_lm", "name": name, "base": base, "data": {"train": str(data)}}
    recipe: Any = parse_recipe(content | {"train": {"batch": 8, "lr": 6e-3, "epochs": 3, "max_length": 64, "seed": 1}})
    result: Any = train(recipe, store=store, progress=False)
    return result.generation


def solo_vectors(store: AdapterStore, generation: str | None, *, spec: BaseSpec) -> np.ndarray:
    """(queries, width): the base (None) or one adapter, alone in this process, each reading as much of a text as it was made to."""
    folder = base_folder(spec)
    model: Any = load_model(folder, task="embedding")
    if generation is None:
        info = describe(folder)
        return Encoder(model, folder, EncodeSettings(info.pooling, info.normalize, info.max_length)).encode(QUERIES)
    adapted = load_adapter(model, store.folder(generation))
    return Encoder(adapted, folder, settings_of(store.passport(generation))).encode(QUERIES, input_type="query")


@dataclass(frozen=True)
class Solo:
    """A greedy answer: its text, and the texts before each token that was chosen by no more than 2 bf16 steps."""

    text: str
    forks: tuple[str, ...]

    def equals(self, answer: str) -> bool:
        return answer == self.text or any(answer.startswith(fork) for fork in self.forks)


def solo_answers(store: AdapterStore, generation: str | None, *, spec: BaseSpec) -> list[Solo]:
    """One greedy answer a prompt, by the base (None) or one adapter, alone in this process."""
    from transformers import AutoTokenizer

    folder = base_folder(spec)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = load_model(folder, task="causal_lm")
    if generation:
        model = load_adapter(model, store.folder(generation))
    return [_greedy(model, tokenizer, prompt) for prompt in PROMPTS]


def _greedy(model: Any, tokenizer: Any, prompt: str) -> Solo:
    import torch

    rendered = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    made: list[int] = []
    forks: list[str] = []
    for _ in range(TOKENS):
        with torch.inference_mode():
            top = torch.topk(model(input_ids=torch.tensor([ids + made])).logits[0, -1].float(), 2)
        if float(top.values[0] - top.values[1]) <= 2 * 2.0**-7 * abs(float(top.values[0])):
            forks.append(tokenizer.decode(made, skip_special_tokens=True))
        if int(top.indices[0]) == tokenizer.eos_token_id:
            break
        made.append(int(top.indices[0]))
    return Solo(tokenizer.decode(made, skip_special_tokens=True), tuple(forks))
