"""seed-lm's tokenizer, data, resumable pretraining and export, on text made up here."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedft.installed import Function
from embedft.model_folder import CHATML
from embedft.seed.check import token_losses
from embedft.seed.data import Budget, copy_sources, read_books, repeated
from embedft.seed.model import SeedLM, Shape
from embedft.seed.optimizer import orthogonal
from embedft.seed.pretrain import Pretraining, Run, load_checkpoint
from embedft.seed.tasks import EXTRACTIVE, examples, gather
from embedft.seed.tokenizer import render_chat, train_tokenizer

WORDS = (
    "river", "stone", "lantern", "quiet", "garden", "morning", "window", "captain", "letter", "harbour", "winter", "candle", "bridge"
)  # fmt: skip
SHAPE = Shape(vocab=512, hidden=128, intermediate=128, layers=1, heads=2, kv_heads=1, context=1024)


pytestmark = pytest.mark.usefixtures("one_thread")  # threads only get in each other's way here, and their number changes sums


def prose(count: int, *, seed: int) -> str:
    rng = random.Random(seed)
    sentences = [
        f"The {' '.join(rng.choice(WORDS) for _ in range(9))} of {rng.choice(('Anna', 'Peter', 'Maria'))} slept." for _ in range(count)
    ]
    return "\n".join(sentences)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "books.txt"
    path.write_text("\x1e".join(prose(40, seed=n) for n in range(30)), encoding="utf-8")
    return path


def tiny(out: Path, books: Path, *, steps: int = 6) -> Run:
    budget = Budget(prose_chars=200_000, code_chars=100_000, package_chars=100_000, examples=60, checks=8)
    return Run(
        out=out,
        books=books,
        steps=steps,
        tokens=128,
        length=64,
        long=128,
        compile=False,
        packages=("fsspec",),
        budget=budget,
        shape=SHAPE,
    )


@pytest.fixture(scope="module")
def undisturbed(books: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretraining, list[float]]:
    training = Pretraining(tiny(tmp_path_factory.mktemp("whole"), books))
    losses = training.go()
    training.publish(questions=8, rows=2)
    return training, losses


def test_a_stopped_and_resumed_run_repeats_an_undisturbed_one(
    undisturbed: tuple[Pretraining, list[float]], books: Path, tmp_path: Path
) -> None:
    whole, losses = undisturbed
    shutil.copytree(whole.run.out / "data", tmp_path / "data")
    first = Pretraining(tiny(tmp_path, books))
    one_step = first.one_step

    def stop_after_three() -> float:
        first.stop = first.state.step == 2
        return one_step()

    first.one_step = stop_after_three  # type: ignore[method-assign]
    head = first.go()
    assert len(head) == 3
    second = Pretraining(tiny(tmp_path, books))
    assert second.state.step == 3
    assert head + second.go() == losses
    for mine, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert losses[-1] < losses[0]


def test_the_export_loads_in_transformers_with_the_same_outputs_and_generates(undisturbed: tuple[Pretraining, list[float]]) -> None:
    training, _ = undisturbed
    folder = training.run.out / "export"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Repeat: river stone"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")
    own = SeedLM(training.run.shape)
    own.load_state_dict({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})
    with torch.no_grad():
        theirs = torch.nn.functional.cross_entropy(model(**ids).logits[0, :-1], ids.input_ids[0, 1:], reduction="none")
    torch.testing.assert_close(token_losses(own, ids.input_ids)[0][0], theirs, atol=1e-4, rtol=1e-4)
    assert model.generate(**ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids.input_ids.shape[1] + 4


def test_the_export_is_bf16_with_a_card_and_no_path_of_the_machine(undisturbed: tuple[Pretraining, list[float]]) -> None:
    training, _ = undisturbed
    folder = training.run.out / "export"
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name in names:
        assert str(training.run.out.parent).encode() not in (folder / name).read_bytes()
    assert "Apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_is_whole_or_absent(undisturbed: tuple[Pretraining, list[float]], tmp_path: Path) -> None:
    training, _ = undisturbed
    assert not training.checkpoint.with_suffix(".staged").exists()
    fresh = load_checkpoint(tmp_path / "none.safetensors", training.model, training.optimizer)
    assert fresh.step == 0


def test_the_tokenizer_loses_nothing(undisturbed: tuple[Pretraining, list[float]]) -> None:
    tokenizer = undisturbed[0].tokenizer
    for text in ("def f(x):\n    return x\n\n\tend  of it ", "naïve 日本 🙂 3.14159", "  two leading", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_what_training_saw(undisturbed: tuple[Pretraining, list[float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(undisturbed[0].run.out / "export")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert tokenizer.chat_template == CHATML
    for prompt in (True, False):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert rendered == render_chat(messages, generation_prompt=prompt)
    turn = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert turn == undisturbed[0].tokenizer.encode(render_chat(messages, generation_prompt=True)).ids


def test_an_extractive_answer_is_always_in_the_prompt() -> None:
    functions = [Function("pkg", f"fn_{w}", f"def fn_{w}(a)", f"Give the {w} of a thing.", "pass", (f"arg_{w}", "b")) for w in WORDS]
    text = gather([prose(200, seed=1)], functions)
    for example in examples(text, 200, seed=3, mixture=EXTRACTIVE):
        assert example.answer
        assert example.answer in example.prompt


def test_a_source_is_the_latest_place_after_the_same_pair() -> None:
    ids = np.array([[5, 6, 7, 5, 6, 9, 5, 6]])
    assert copy_sources(ids).tolist() == [[-1, -1, -1, 1, -1, -1, 4]]


def test_repeated_runs_can_mostly_be_copied() -> None:
    ids = repeated(np.random.default_rng(0), np.arange(4, 500, dtype=np.uint16), 400)[None]
    assert ids.shape == (1, 400)
    assert (copy_sources(ids) >= 0).mean() > 0.4


def test_books_are_split_at_the_separator(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\x1e two \x1e\x1e", encoding="utf-8")
    assert read_books(tmp_path / "b.txt") == ["one", "two"]
    assert read_books(None) == []


def test_muons_update_is_nearly_orthogonal() -> None:
    x = orthogonal(torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(x)
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_a_tokenizer_starts_with_the_special_tokens() -> None:
    tokenizer: Tokenizer = train_tokenizer([prose(50, seed=2)], vocab=300)
    assert [tokenizer.id_to_token(n) for n in range(4)] == ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
