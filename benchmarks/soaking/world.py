"""What a soak runs over: two bases, many adapters far apart from one another, and what each of them answers alone."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedft.adapters.store import AdapterStore
from embedft.base import Base, BaseSpec, load_base
from serve.engines.peft.sharing import sharing_copy
from serve.proving import run as prove

TEXTS = ["sort a list in place", "x", "read a file line by line", "the committee met on Tuesday and put off its decision"]
PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]
TOKENS = 8
TASKS: dict[str, Any] = {"texts": "embedding", "words": "causal_lm"}


@dataclass
class World:
    """`solo[base][generation or 'base']`: vectors (texts, width), or per prompt (tokens, how many of them are beyond doubt).

    The first adapter of each base has two generations, to be swapped.
    """

    folder: Path
    store: AdapterStore
    bases: dict[str, Path]
    names: dict[str, list[str]]
    solo: dict[str, dict[str, Any]] = field(default_factory=dict)
    generations: dict[str, list[str]] = field(default_factory=dict)

    def says(self, words: list[str], tokens: list[int]) -> bool:
        """Whether an engine's `words` are these tokens. Of one that is part of a character vLLM says nothing, the `peft` engine U+FFFD."""
        expected = [self.word(token) for token in tokens]
        return len(words) == len(tokens) and all(
            word == own or (word == "" and "\ufffd" in own) for word, own in zip(words, expected, strict=True)
        )

    def word(self, token: int) -> str:
        if not hasattr(self, "_tokenizer"):
            from transformers import AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.bases["words"])
        return str(self._tokenizer.decode([token]))


def make_world(folder: Path, *, embedding: Path, language: Path, count: int, scale: float = 0.1) -> World:
    """`count` adapters over two bases, half each."""
    bases = {"texts": embedding, "words": language}
    loaded = {name: load_base(BaseSpec(str(base)), task=TASKS[name]) for name, base in bases.items()}
    world = World(folder, AdapterStore(folder / "adapters"), bases, {name: [] for name in bases})
    for number in range(count):
        base = ("texts", "words")[number % 2]
        name = f"{base}-{number // 2}"
        world.names[base].append(name)
        for turn in range(2 if number < 2 else 1):
            with world.store.stage() as stage:
                random_lora(stage, loaded[base], TASKS[base], seed=1000 * turn + number, scale=scale)
                prove({"kind": "import", "folder": str(stage), "base": str(bases[base]), "task": TASKS[base], "name": name, "model": base})
                world.generations.setdefault(name, []).append(world.store.put(stage, name))
    for base in bases:
        _answer_alone(world, base, loaded[base].model)
    return world


def random_lora(folder: Path, base: Base, task: Any, *, seed: int, scale: float) -> None:
    """A LoRA that changes much, as a trainer saves it."""
    import torch

    from embedft.methods import attach, save_weights
    from embedft.recipe import AdapterSection

    torch.manual_seed(seed)
    model = attach(replace(base, model=sharing_copy(base.model)), AdapterSection(r=8, alpha=16), task=task)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale)
    save_weights(model, folder, base_name="soak")


def _answer_alone(world: World, base: str, bare: Any) -> None:
    from embedft.methods import load_adapter

    folder = world.bases[base]
    own = [identity for name in world.names[base] for identity in world.generations[name]]
    world.solo[base] = {}
    for identity in ["base", *own]:
        model = bare if identity == "base" else load_adapter(sharing_copy(bare), world.store.folder(identity))
        alone = _vectors(model, folder) if base == "texts" else [_greedy(model, prompt) for prompt in PROMPTS]
        world.solo[base][identity] = alone


def _vectors(model: Any, folder: Path) -> np.ndarray:
    from embedft.encode import Encoder, EncodeSettings
    from embedft.model_folder import describe

    info = describe(folder)
    return Encoder(model, folder, EncodeSettings(info.pooling, info.normalize, info.max_length)).encode(TEXTS)


def _greedy(model: Any, prompt: list[int]) -> tuple[list[int], int]:
    """(tokens, how many of them come before the first that was chosen by no more than 2 bf16 steps)."""
    import torch

    ids, sure = list(prompt), TOKENS
    for place in range(TOKENS):
        with torch.inference_mode():
            top = torch.topk(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), 2)
        if float(top.values[0] - top.values[1]) <= 2 * 2.0**-7 * abs(float(top.values[0])):
            sure = min(sure, place)
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], sure
