import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from embedft.adapters.passport import BaseIdentity
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder, load_model
from embedft.causal_lm.evaluate import evaluate_adapter
from embedft.causal_lm.template import template_of
from embedft.causal_lm.train import read_split, tokenized, train
from embedft.errors import BaseMismatch, DataError
from embedft.model_folder import describe, own_template, template_hash
from embedft.recipe import BaseSection, parse_recipe
from embedft.recipe_file import load_recipe
from embedft.training.measure import AdapterResult, DryRunReport
from embedft.verify import verify
from tests.families import tiny_decoder
from tests.fixtures_lm import planted_recipe, planted_rows, tiny_llama, tiny_tokenizer, write_jsonl


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_planted_task_is_learnt_on_held_out_rows(trained: Any, quantization: str) -> None:
    result, _, _ = trained(quantization)
    assert result.metrics["base"]["exact_match"] <= 0.2
    assert result.metrics["adapter"]["exact_match"] >= 0.8
    assert result.metrics["gain_ci95"][0] > 0
    assert result.metrics["adapter"]["bits_per_character"] < result.metrics["base"]["bits_per_character"]
    assert result.trainable == 65_536  # r=16 on 7 linears in 2 layers, and nothing else


def test_the_adapter_folder_is_whole_and_names_no_machine_path(trained: Any, tiny_base: Path) -> None:
    result, recipe, store = trained("nf4")
    folder = Path(result.path)
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "passport.json",
        "probes.safetensors",
        "recipe.yaml",
        "README.md",
    }
    assert names <= {path.name for path in folder.iterdir()}
    for path in folder.rglob("*"):
        assert path.is_dir() or str(tiny_base.parent).encode() not in path.read_bytes(), path.name
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    rows = [json.loads(line) for line in (folder / "eval" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    assert np.mean([row["adapter"]["exact_match"] for row in rows]) == pytest.approx(result.metrics["adapter"]["exact_match"])
    assert [path.name for path in (folder / "eval").iterdir()] == ["rows.jsonl"], "texts only when asked"
    assert store.names() == {recipe.name: result.generation}
    assert not list((store.root / ".training").glob("*"))


def test_the_passport_says_what_it_was_trained_on_and_how(trained: Any, tiny_base: Path) -> None:
    result, recipe, store = trained("nf4")
    passport = store.passport(recipe.name)
    base, source = describe(base_folder(BaseSpec(recipe.base.model, "nf4"))), describe(tiny_base)
    assert passport.base == BaseIdentity(model="tiny", quantization="nf4", fingerprint=base.fingerprint, parent=source.fingerprint)
    assert (passport.task, passport.method, passport.r, passport.alpha, passport.max_length) == ("causal_lm", "lora", 16, 32, 64)
    assert passport.template_hash == template_hash(own_template(tiny_base))
    assert (passport.data_hash, passport.recipe_hash) == (read_split(recipe).hash, recipe.digest())
    assert passport.metrics == result.metrics
    assert passport.versions == {name: version(name) for name in ("torch", "transformers", "peft")}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(passport.created)).total_seconds()) < 3600
    assert load_recipe(Path(result.path) / "recipe.yaml").train == recipe.train


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before_and_another_seed_another(tiny_base: Path, tmp_path: Path) -> None:
    import torch

    made: list[str] = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)
        recipe = planted_recipe(tmp_path, tiny_base, test_rows=0, train={"max_steps": 2, "seed": seed})
        result = train(recipe, store=AdapterStore(tmp_path / str(number)), progress=False)
        assert isinstance(result, AdapterResult)
        made.append(result.generation)
    assert made[0] == made[1] != made[2]


def test_its_probes_pass_on_a_base_loaded_afresh_and_notice_every_module_type(trained: Any) -> None:
    result, recipe, store = trained("nf4")
    report = verify(Path(result.path), base=base_folder(BaseSpec(recipe.base.model, "nf4")))
    assert report.passed
    assert report.error < 1e-3
    probes = store.passport(recipe.name).probes
    assert probes is not None
    assert len(probes.sensitivity) == 7
    assert min(probes.sensitivity.values()) > probes.tolerance


def test_a_base_that_is_quantized_otherwise_is_not_the_one_it_was_trained_on(trained: Any, tiny_base: Path) -> None:
    """Not a base to be quantized once more, which is what was asked for."""
    result, _, _ = trained("nf4")
    other = base_folder(BaseSpec(str(tiny_base), "int8"))
    with pytest.raises(BaseMismatch, match=r"was trained on base tiny in nf4 .* but here is .*int8"):
        verify(Path(result.path), base=other)


def test_plain_peft_loads_the_folder_with_the_same_outputs(trained: Any, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from embedft.methods import load_adapter

    result, recipe, _ = trained("none")
    ids = torch.tensor([[5, 9, 30, 44, 120]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.base.model), result.path)
    ours = load_adapter(load_model(Path(recipe.base.model), task="causal_lm"), Path(result.path))
    with torch.inference_mode():
        assert torch.allclose(plain(ids).logits, ours(ids).logits.float(), atol=1e-4)


def test_a_stored_adapter_scores_the_same_as_it_did_in_training(trained: Any) -> None:
    result, recipe, store = trained("none")
    again = evaluate_adapter(recipe.name, recipe.data.eval, store, base=Path(recipe.base.model))
    assert again["adapter"] == pytest.approx(result.metrics["adapter"], abs=1e-5)
    assert again["base"] == pytest.approx(result.metrics["base"], abs=1e-5)


def test_an_evaluation_writes_as_long_as_the_recipe_said(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from embedft.causal_lm import evaluate

    asked, greedy = list[int](), evaluate.greedy
    monkeypatch.setattr(evaluate, "greedy", lambda *given, **how: asked.append(how["max_new_tokens"]) or greedy(*given, **how))
    result, recipe, store = trained("none")
    rows = str(write_jsonl(tmp_path / "few.jsonl", planted_rows(2, start=1000)))
    folder = Path(shutil.copytree(result.path, tmp_path / "copy"))
    written = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(written.replace("max_new_tokens: 4", "max_new_tokens: 1"))
    for path in (result.path, folder):
        evaluate_adapter(path, rows, store, base=Path(recipe.base.model))
    assert asked == [4, 4, 1, 1], "the adapter's and the base's"


def test_rows_that_leave_no_room_for_an_answer_are_told_of(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = planted_recipe(tmp_path, tiny_base)
    write_jsonl(tmp_path / "train.jsonl", [*planted_rows(20), {"prompt": "red " * 100, "completion": "stop"}])
    assert len(tokenized(read_split(recipe).train, template_of(tiny_tokenizer()), recipe)) == 20
    assert "1 of 21 prompts fill all 64 tokens" in capsys.readouterr().err
    rows = [*planted_rows(18), *[{"prompt": "red " * 100, "completion": "stop"}] * 2]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert len(tokenized(read_split(recipe).train, template_of(tiny_tokenizer()), recipe)) == 18, "a tenth"
    write_jsonl(tmp_path / "train.jsonl", rows[1:])
    with pytest.raises(DataError, match="2 of 19 prompts fill all 64 tokens"):
        tokenized(read_split(recipe).train, template_of(tiny_tokenizer()), recipe)


def test_rows_whose_answer_does_not_end_within_the_length_are_told_of(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0)
    write_jsonl(tmp_path / "train.jsonl", [*planted_rows(20), {"prompt": "red?", "completion": "stop " * 100}])
    template = template_of(tiny_tokenizer())
    examples = tokenized(read_split(recipe).train, template, recipe)
    assert [example.cut > 0 for example in examples] == [False] * 20 + [True]
    told = "1 of 21 rows are cut at 64 tokens: how their answers end is not learnt, unless you raise train.max_length"
    assert told in capsys.readouterr().err
    longest = max(len(example.ids) for example in examples[:20])
    exactly = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": longest})})
    assert not any(example.cut for example in tokenized(read_split(recipe).train[:20], template, exactly))
    assert not capsys.readouterr().err


def test_conversations_of_which_the_last_answer_alone_is_learnt_are_told_of(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0)
    asked, answered = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "stop"}
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [asked, answered] * turns} for turns in (1, 2, 3)])
    tokenizer, rows = tiny_tokenizer(), read_split(recipe).train
    tokenized(rows, template_of(tokenizer), recipe)
    assert not capsys.readouterr().err
    tokenizer.chat_template = (  # as Qwen3's: thoughts are opened in the last answer alone
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenized(rows, template_of(tokenizer), recipe)
    told = capsys.readouterr().err
    assert (
        "the template writes earlier answers of 2 of 3 rows otherwise than it asked for them: of those rows the last answer alone" in told
    )
    on_all = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on_inputs": True})})
    tokenized(rows, template_of(tokenizer), on_all)
    assert not capsys.readouterr().err, "all of it is"


def test_rows_that_judge_what_learnt_them_are_told_of(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = planted_recipe(tmp_path, tiny_base, train={"max_steps": 1, "evaluate_every": 1}).model_dump(mode="json")
    rows = planted_rows(12, start=500)
    for key, given in (("train", rows[:6]), ("eval", rows[4:10]), ("validation", rows[5:8])):
        content["data"][key] = str(write_jsonl(tmp_path / f"{key}.jsonl", given))
    train(parse_recipe(content), store=AdapterStore(tmp_path / "store"), progress=False)  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert "2 of 6 rows of data.eval are in data.train too" in told
    assert "3 of 6 rows of data.eval are in data.validation too" in told
    assert "1 of 3 rows of data.validation are in data.train too" in told


def test_rows_that_cannot_be_answered_as_expected_are_told_of(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = planted_recipe(tmp_path, tiny_base, train={"max_steps": 1})
    long = {"prompt": "red?", "completion": "stop " * 9}
    rows = [*planted_rows(3, start=1000), long, long | {"references": ["stop"]}, {"prompt": "red " * 100, "completion": "stop"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    store = AdapterStore(tmp_path / "store")
    train(recipe, store=store, progress=False)
    told = capsys.readouterr().err
    for fault in (
        "1 of 6 expected answers are longer than the 4 tokens that are written, and are never matched: raise eval.max_new_tokens",
        "1 of 6 prompts have more than 64 tokens, and are answered from their last 64 alone",
    ):
        assert told.count(fault) == 1
    evaluate_adapter(recipe.name, str(tmp_path / "test.jsonl"), store, base=tiny_base)
    assert "1 of 6 expected answers" in capsys.readouterr().err


def test_what_the_adapter_leaves_of_a_mixture_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = planted_recipe(tmp_path, tiny_decoder(tmp_path / "base", "qwen3_moe"), test_rows=0)
    train(recipe, store=AdapterStore(tmp_path / "store"), dry_run=True)
    told = capsys.readouterr().err
    experts, weights = 4 * 4 * 3 * 64 * 64, sum(value.size for value in load_file(tmp_path / "base" / "model.safetensors").values())
    assert f"{experts / weights:.0%} of the base's weights are its experts', in no linear layers" in told
    assert "full precision" not in told
    packed = recipe.model_copy(update={"base": BaseSection(model=recipe.base.model, quantization="nf4")})
    train(packed, store=AdapterStore(tmp_path / "store"), dry_run=True)
    assert "the adapter leaves them as they are, and nf4 in full precision" in capsys.readouterr().err
    train(planted_recipe(tmp_path, tiny_llama(tmp_path / "llama"), test_rows=0), store=AdapterStore(tmp_path / "store"), dry_run=True)
    assert "experts" not in capsys.readouterr().err


def test_a_dry_run_reports_its_cost_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    recipe, store = planted_recipe(tmp_path, tiny_base), AdapterStore(tmp_path / "store")
    report = train(recipe, store=store, dry_run=True)
    assert isinstance(report, DryRunReport)
    assert (report.examples, report.steps, report.trainable) == (240, 40, 65_536)
    assert report.seconds == pytest.approx(40 * report.seconds_per_step)
    assert 0 < report.trainable_percent < 100
    assert report.seconds_per_step > 0
    assert not store.root.exists() or not list(store.root.rglob("*.safetensors"))


def test_bad_rows_of_both_files_are_named_before_any_model_loads(tmp_path: Path) -> None:
    recipe = planted_recipe(tmp_path, tmp_path / "no-such-base")
    write_jsonl(tmp_path / "train.jsonl", [*planted_rows(1), {"prompt": "x"}])
    write_jsonl(tmp_path / "test.jsonl", [*planted_rows(2), {"prompt": 3, "completion": "y"}])
    with pytest.raises(DataError) as caught:
        train(recipe, store=AdapterStore(tmp_path / "store"))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["train.jsonl:2", "test.jsonl:3"]


def test_prompts_that_leave_no_room_for_an_answer_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    recipe = planted_recipe(tmp_path, tiny_base, train={"max_length": 4})
    with pytest.raises(DataError, match=r"raise train\.max_length"):
        train(recipe, store=AdapterStore(tmp_path / "store"))
