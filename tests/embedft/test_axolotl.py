"""A configuration as Axolotl's users write it becomes a recipe; what has no place is named with the reason."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from embedft.axolotl import translate
from embedft.axolotl_keys import CHOICES, KEYS, REASONS, TOGETHER
from embedft.cli import main
from embedft.errors import RecipeError
from embedft.methods import settled
from embedft.recipe import CausalLMRecipe, parse_recipe
from embedft.recipe_file import load_recipe

QLORA = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.2
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, q_proj]
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
"""


def lora(**more: Any) -> dict[str, Any]:
    return {"base_model": "m", "adapter": "lora", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}]} | more


def recipe_of(**more: Any) -> CausalLMRecipe:
    recipe = parse_recipe(translate(lora(**more), name="x").recipe)
    assert isinstance(recipe, CausalLMRecipe)
    return recipe


def test_a_common_qlora_file_becomes_the_recipe_that_it_means() -> None:
    made = translate(yaml.safe_load(QLORA), name="My QLoRA")
    assert made.recipe == {
        "task": "causal_lm",
        "name": "my-qlora",
        "base": {"model": "NousResearch/Llama-3.2-1B", "quantization": "nf4"},
        "data": {"train": "hf://teknium/GPT4-LLM-Cleaned", "format": "alpaca"},
        "adapter": {"r": 32, "alpha": 16, "dropout": 0.05, "targets": ["gate_proj", "down_proj", "q_proj"], "method": "lora"},
        "train": {
            "max_length": 2048,
            "packing": True,
            "accumulate": 4,
            "batch": 2,
            "epochs": 1,
            "optimizer": "adamw_8bit",
            "schedule": "cosine",
            "lr": 0.0002,
            "gradient_checkpointing": True,
            "warmup": 0.1,
            "weight_decay": 0.0,
        },
    }
    wanted = {"val_set_size", "output_dir", "eval_sample_packing", "bf16", "flash_attention", "evals_per_epoch", "special_tokens"}
    assert set(made.left_out) == wanted


def test_where_a_file_says_nothing_axolotls_own_defaults_stand() -> None:
    train = recipe_of().train
    assert (train.batch, train.accumulate, train.epochs, train.max_length) == (1, 1, 1, 512)
    assert (train.schedule, train.warmup, train.optimizer, train.weight_decay) == ("cosine", 0.03, "adamw", 0.0)
    assert recipe_of(warmup_steps=10, max_steps=100, lr_scheduler="linear", micro_batch_size=4).train.warmup == 0.1


@pytest.mark.parametrize(
    ("given", "method", "options"),
    [
        ({}, "lora", {}),
        ({"peft_use_dora": True}, "dora", {}),
        ({"peft_use_rslora": True}, "rslora", {}),
        ({"peft_init_lora_weights": "pissa"}, "pissa", {}),
        ({"peft_init_lora_weights": "pissa_niter_4"}, "pissa", {"iterations": 4}),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}, "load_in_4bit": True}, "loftq", {}),
        ({"loraplus_lr_ratio": 8}, "lora_plus", {"ratio": 8.0}),
        (
            {"relora": True, "jagged_restart_steps": 100, "max_steps": 400, "relora_prune_ratio": 0.9},
            "relora",
            {"restarts": 3, "prune": 0.9},
        ),
        ({"adapter": None, "lora_r": 8, "lora_alpha": 4}, "full", {}),
        ({"adapter": "llama-adapter"}, "llama_adapter", {}),
    ],
)
def test_each_way_to_name_a_method_is_understood(given: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    adapter = recipe_of(**given).adapter
    assert settled(adapter)
    assert (adapter.method, adapter.options) == (method, options)


def test_of_two_methods_the_one_that_is_not_taken_is_named() -> None:
    made = translate(lora(peft_use_rslora=True, loraplus_lr_ratio=16), name="x")
    assert made.recipe["adapter"] == {"method": "lora_plus", "options": {"ratio": 16.0}}
    assert made.left_out["peft_use_rslora"] == "an adapter has one method here, and loraplus_lr_ratio names it"
    assert set(translate(lora(relora=True, relora_steps=10, max_steps=40), name="x").left_out) == set()


def test_no_steps_of_warm_up_are_none() -> None:
    assert recipe_of(warmup_steps=0).train.warmup == 0


@pytest.mark.parametrize(("bits", "quantization"), [({}, "nf4"), ({"loftq_bits": 4}, "nf4"), ({"loftq_bits": 8}, "int8")])
def test_loftqs_base_is_quantized_though_axolotl_loads_it_whole(bits: dict[str, int], quantization: str) -> None:
    recipe = recipe_of(peft={"loftq_config": bits})
    assert (recipe.adapter.method, recipe.base.quantization) == ("loftq", quantization)


def test_steps_and_shares_are_turned_round() -> None:
    train = recipe_of(
        warmup_steps=50, max_steps=200, eval_steps=20, early_stopping_patience=3, test_datasets=[{"path": "v.jsonl", "type": "alpaca"}]
    )
    assert (train.train.warmup, train.train.evaluate_every, train.train.patience) == (0.25, 20, 3)
    assert train.data.validation == "v.jsonl"


@pytest.mark.parametrize(
    ("given", "key", "reason"),
    [
        ({"rl": "dpo"}, "rl", "supervised"),
        ({"lr_scheduler": "rex"}, "lr_scheduler", "one of constant, cosine, linear"),
        ({"optimizer": "muon"}, "optimizer", "paged_adamw"),
        ({"lora_rr": 8}, "lora_rr", "did you mean 'lora_r'"),
        ({"warmup_steps": 10}, "warmup_steps", "share of all steps"),
        ({"eval_steps": 5}, "eval_steps", "data.validation"),
        ({"eval_steps": 0.2}, "eval_steps", "number of steps"),
        ({"deepspeed": "zero3.json"}, "deepspeed", "one process"),
        ({"lora_target_modules": ".*proj"}, "lora_target_modules", "list of layer names"),
        ({"lora_target_modules": ["q_proj", "lm_head"], "lora_target_linear": True}, "lora_target_modules", "but lm_head: name them all"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl"}]}, "datasets[1:]", "concatenate"),
        ({"wandb_project": "foo"}, "wandb_project", "in the environment, as WANDB_PROJECT"),
        ({"mlflow_tracking_uri": "http://m"}, "mlflow_tracking_uri", "in the environment, as MLFLOW_TRACKING_URI"),
        ({"datasets": [{"path": "a.jsonl", "type": "completion"}]}, "datasets[0].type", "they are alpaca, messages, prompt_completion"),
        ({"datasets": [{"path": "a.jsonl", "type": "sharegpt"}]}, "datasets[0].type", "messages of `role` and `content`"),
        ({"datasets": [{"path": "a.jsonl", "type": "input_output"}]}, "datasets[0].type", "prompt and completion"),
        ({"datasets": [{"path": "a", "data_files": ["a.jsonl", "b.jsonl"]}]}, "datasets[0].data_files[1:]", "concatenate"),
        ({"datasets": [{"path": "a.jsonl", "roles_to_train": ["assistant"]}]}, "datasets[0].roles_to_train", "every answer is learnt"),
        ({"datasets": [{"path": "a.jsonl", "chat_template": "chatml"}]}, "datasets[0].chat_template", "set data.template"),
        (
            {"datasets": [{"path": "a.jsonl", "message_property_mappings": {"role": "from"}}]},
            "datasets[0].message_property_mappings",
            "rename the columns",
        ),
        ({"peft_use_dora": True, "peft_use_rslora": True}, "peft_use_dora", "one method here, and peft_use_rslora names it"),
        ({"peft_use_dora": True, "loraplus_lr_ratio": 16}, "peft_use_dora", "and loraplus_lr_ratio names it"),
        ({"peft": {"loftq_config": {}, "something": 1}}, "peft.something", "not known here"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha", "not done here"),
    ],
)
def test_what_has_no_place_is_named_with_the_reason(given: dict[str, Any], key: str, reason: str) -> None:
    assert reason in translate(lora(**given), name="x").left_out[key]


def test_a_named_tracker_is_kept_and_one_without_a_value_is_nothing_left_out() -> None:
    made = translate(lora(use_tensorboard=True, wandb_project="foo", mlflow_tracking_uri=""), name="x")
    assert made.recipe["train"]["trackers"] == ["tensorboard", "wandb"]
    assert set(made.left_out) == {"wandb_project"}


def test_no_key_has_two_places() -> None:
    groups = [set(KEYS), set(CHOICES), set(TOGETHER) - {"warmup_steps"}, set(REASONS)]
    assert sum(len(group) for group in groups) == len(set().union(*groups))


def test_the_command_writes_a_recipe_that_loads(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("axolotl.yml").write_text(QLORA, encoding="utf-8")
    assert main(["recipes", "import", "axolotl.yml", "mine.yaml"]) == 0
    assert "val_set_size" in capsys.readouterr().out
    recipe: Any = load_recipe("mine.yaml")
    assert (recipe.name, recipe.base.quantization, recipe.train.packing) == ("mine", "nf4", True)
    assert main(["recipes", "import", "axolotl.yml"]) == 0
    assert "# left out: val_set_size" in capsys.readouterr().out
    assert main(["recipes", "import", "axolotl.yml", "mine.yaml"]) == 2


def test_a_file_that_is_none_of_axolotls_is_refused(in_folder: Path) -> None:
    Path("other.yml").write_text("a: 1\n", encoding="utf-8")
    assert main(["recipes", "import", "other.yml"]) == 2
    with pytest.raises(RecipeError, match="data: field required"):
        translate({"base_model": "m"}, name="x")


def test_counts_that_are_no_whole_numbers_are_told_of() -> None:
    made = translate(lora(num_epochs=2.5, micro_batch_size="auto", gradient_accumulation_steps=4), name="x")
    assert made.recipe["train"] == {"epochs": 2, "accumulate": 4, "schedule": "cosine", "warmup": 0.03}
    assert made.left_out["num_epochs"] == "2.5 is no whole number: train.epochs is 2"
    assert made.left_out["micro_batch_size"] == "'auto' is no number: set train.batch"
    with pytest.raises(RecipeError, match="a text where a number is due"):
        translate(lora(max_steps="many"), name="x")
