"""An Axolotl YAML → one of our recipes, and a list of what has no place in it, each with the reason. Trains nothing.

KEYS and REASONS name every key that is understood; any other is listed too, so nothing is dropped without a word.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml

from embedft.errors import RecipeError
from embedft.recipe import parse_recipe


@dataclass
class Translation:
    """`recipe`: sections as a recipe has them; `left_out`: Axolotl's key → why it has no place, or what to do instead."""

    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def put(self, place: str, value: Any) -> None:
        section, _, key = place.partition(".")
        self.recipe.setdefault(section, {})[key] = value

    def has(self, place: str) -> bool:
        section, _, key = place.partition(".")
        return key in self.recipe.get(section, {})


def translate(content: Mapping[str, Any], *, name: str) -> Translation:
    """A parsed Axolotl YAML → a valid recipe called `name`. RecipeError where what is left is none (no base, no data)."""
    made = Translation({"task": "causal_lm", "name": _name(name)})
    given = {key: value for key, value in content.items() if value is not None and value != ""}
    for key, value in given.items():
        if key in KEYS:
            made.put(KEYS[key], value)
        elif key in CHOICES:
            place, words = CHOICES[key]
            _choice(made, key, place, words, value)
        elif key not in TOGETHER and (value is not False or key not in REASONS):
            made.left_out[key] = REASONS.get(key) or _unknown(key)
    for rule in (_base, _method, _data, _steps, _trackers):
        rule(given, made)
    made.recipe = {key: value for key, value in made.recipe.items() if value != {}}
    parse_recipe(dict(made.recipe), where=f"{name}: what Axolotl's file comes to")
    return made


def read_axolotl(path: Path) -> dict[str, Any]:
    """The file's mapping; RecipeError where it is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise RecipeError(str(path), ["there is no such file"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not readable as YAML: {error}"]) from None
    if not isinstance(content, dict) or "base_model" not in content:
        raise RecipeError(str(path), ["no `base_model` in it: it is not an Axolotl configuration"])
    return cast("dict[str, Any]", content)


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64] or "imported"


def _choice(made: Translation, key: str, place: str, words: Mapping[str, Any], value: Any) -> None:
    word = str(value).lower()
    if word not in words:
        known = sorted({str(name) for name in words.values() if name is not None})
        made.left_out[key] = f"no {word!r} here: {place} is one of {', '.join(known)}"
    elif words[word] is not None:
        made.put(place, words[word])


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*KEYS, *CHOICES, *TOGETHER, *REASONS], n=1, cutoff=0.8)
    return "a key that is not known here" + (f"; did you mean {near[0]!r}?" if near else "")


def _base(given: Mapping[str, Any], made: Translation) -> None:
    quantization = "nf4" if given.get("load_in_4bit") or given.get("adapter") == "qlora" else "int8" if given.get("load_in_8bit") else None
    if quantization:
        made.put("base.quantization", quantization)


def _method(given: Mapping[str, Any], made: Translation) -> None:
    adapter = given.get("adapter")
    if adapter not in (None, "lora", "qlora", "llama-adapter"):
        made.left_out["adapter"] = f"no adapter {adapter!r} here: see adapter.method"
    method = {None: "full", "llama-adapter": "llama_adapter"}.get(adapter, "lora")
    start = given.get("peft_init_lora_weights")
    started = re.match(r"(pissa|olora|eva|loftq)", str(start).lower()) if start is not None else None
    peft = given.get("peft")
    if started:
        method = started[1]
    elif isinstance(peft, dict) and "loftq_config" in peft:
        method = "loftq"
    elif start not in (None, True, "gaussian"):
        made.left_out["peft_init_lora_weights"] = f"no start {start!r} here: pissa, olora, eva and loftq are methods"
    for key, other in (("peft_use_dora", "dora"), ("peft_use_rslora", "rslora"), ("relora", "relora"), ("relora_steps", "relora")):
        if given.get(key):
            method = other
    if given.get("loraplus_lr_ratio"):
        method = "lora_plus"
        made.put("adapter.options", {"ratio": float(given["loraplus_lr_ratio"])})
    if method == "relora":
        _relora(given, made)
    made.put("adapter.method", method)
    if method in {"full", "llama_adapter"}:
        for key in ("dropout", "targets", "alpha"):
            made.recipe["adapter"].pop(key, None)
    elif given.get("lora_target_linear") or isinstance(given.get("lora_target_modules"), str):
        made.recipe["adapter"].pop("targets", None)  # all linear layers: the default
        if given.get("lora_target_modules") not in (None, "all-linear") and not given.get("lora_target_linear"):
            made.left_out["lora_target_modules"] = "a list of layer names is wanted: set adapter.targets"


def _relora(given: Mapping[str, Any], made: Translation) -> None:
    every, total = given.get("jagged_restart_steps") or given.get("relora_steps"), given.get("max_steps")
    options: dict[str, Any] = {}
    if every and total:
        options["restarts"] = max(1, int(total) // int(every) - 1)
    elif every:
        made.left_out["relora_steps"] = "restarts are counted here, not spaced: set adapter.options.restarts (default 2)"
    warm = given.get("jagged_restart_warmup_steps") or given.get("relora_warmup_steps")
    if warm:
        options["warm"] = int(warm)
    if given.get("relora_prune_ratio"):
        options["prune"] = float(given["relora_prune_ratio"])
    if options:
        made.put("adapter.options", options)


def _data(given: Mapping[str, Any], made: Translation) -> None:
    for key, place in (("datasets", "data.train"), ("test_datasets", "data.validation")):
        listed = given.get(key)
        if not isinstance(listed, list) or not listed:
            continue
        first: Any = listed[0]
        if len(cast("list[Any]", listed)) > 1:
            made.left_out[f"{key}[1:]"] = "one file or data set a recipe: concatenate them"
        if not isinstance(first, dict):
            made.left_out[key] = "expected a list of mappings with `path`"
            continue
        one = cast("dict[str, Any]", first)
        made.put(place, _source(one))
        _row_format(one, key, made)
        for part in sorted(set(one) - _DATASET_KEYS):
            made.left_out[f"{key}[0].{part}"] = "rows are prompt/completion, messages or Alpaca: rename the columns in the file"
    if made.has("data.validation") and not made.has("train.evaluate_every"):
        made.recipe["data"].pop("validation")
        made.left_out["test_datasets"] = "without eval_steps nothing says when: set data.validation and train.evaluate_every"


_DATASET_KEYS = {"path", "type", "ds_type", "data_files", "split", "name", "revision", "field_messages", "message_property_mappings"}


def _source(one: Mapping[str, Any]) -> str:
    """A local file as it stands; a hub data set as hf://path:name@revision#split."""
    path, files = str(one.get("path", "")), one.get("data_files")
    if files:
        return str(cast("list[Any]", files)[0] if isinstance(files, list) else files)
    if Path(path).suffix in {".json", ".jsonl", ".csv", ".parquet", ".gz"}:
        return path
    config, revision, split = one.get("name"), one.get("revision"), one.get("split")
    return f"hf://{path}" + (f":{config}" if config else "") + (f"@{revision}" if revision else "") + (f"#{split}" if split else "")


def _row_format(one: Mapping[str, Any], key: str, made: Translation) -> None:
    kind = one.get("type", "")
    known = FORMATS.get(str(kind).partition(":")[0].partition(".")[0]) if isinstance(kind, str) else None
    if known and key == "datasets":
        made.put("data.format", known)
    elif not known:
        made.left_out[f"{key}[0].type"] = f"no rows of type {kind!r} here: they are {', '.join(sorted(set(FORMATS.values())))}"
    if one.get("field_messages") not in (None, "messages"):
        made.left_out[f"{key}[0].field_messages"] = "the column is called `messages` here: rename it in the file"


FORMATS = {"alpaca": "alpaca", "chat_template": "messages", "sharegpt": "messages", "input_output": "prompt_completion"}


def _steps(given: Mapping[str, Any], made: Translation) -> None:
    """Steps given as shares of the run, or warm-up given in steps: ours are the other way round."""
    warm, total = given.get("warmup_steps"), given.get("max_steps")
    if warm and total:
        made.put("train.warmup", min(1.0, float(warm) / int(total)))
    elif warm:
        made.left_out["warmup_steps"] = "warm-up is a share of all steps here: set train.warmup (default 0.1)"
    for key, place in (("eval_steps", "train.evaluate_every"), ("save_steps", "train.checkpoint_every")):
        value = given.get(key)
        if value and float(value) < 1:
            made.recipe.get("train", {}).pop(place.partition(".")[2], None)
            made.left_out[key] = f"a share of the run; {place} is a number of steps"
    if made.has("train.patience") and not made.has("data.validation"):
        made.recipe["train"].pop("patience")
        made.left_out["early_stopping_patience"] = "it needs data.validation and train.evaluate_every"
    if made.has("train.evaluate_every") and not made.has("data.validation"):
        made.recipe["train"].pop("evaluate_every")
        made.left_out["eval_steps"] = "it needs held-out rows: set data.validation to a file of them"
    for key in ("epochs", "accumulate", "batch", "max_steps"):
        if made.has(f"train.{key}"):
            made.recipe["train"][key] = int(made.recipe["train"][key])


def _trackers(given: Mapping[str, Any], made: Translation) -> None:
    named = {"use_tensorboard": "tensorboard", "wandb_project": "wandb", "mlflow_tracking_uri": "mlflow"}
    if found := [tracker for key, tracker in named.items() if given.get(key)]:
        made.put("train.trackers", found)


KEYS: Mapping[str, str] = MappingProxyType(
    {
        "base_model": "base.model",
        "revision_of_model": "base.revision",
        "lora_r": "adapter.r",
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "lora_target_modules": "adapter.targets",
        "train_on_inputs": "data.train_on_inputs",
        "sequence_len": "train.max_length",
        "sample_packing": "train.packing",
        "gradient_accumulation_steps": "train.accumulate",
        "micro_batch_size": "train.batch",
        "num_epochs": "train.epochs",
        "max_steps": "train.max_steps",
        "learning_rate": "train.lr",
        "warmup_ratio": "train.warmup",
        "weight_decay": "train.weight_decay",
        "max_grad_norm": "train.max_grad_norm",
        "seed": "train.seed",
        "eval_steps": "train.evaluate_every",
        "early_stopping_patience": "train.patience",
        "save_steps": "train.checkpoint_every",
    }
)
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
CHOICES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "optimizer": ("train.optimizer", _OPTIMIZERS),
        "lr_scheduler": ("train.schedule", _SCHEDULES),
        "chat_template": ("data.template", {"chatml": "chatml", "tokenizer_default": None}),
        "gradient_checkpointing": ("train.gradient_checkpointing", {"true": True, "false": None}),
    }
)
_TOGETHER = (
    "adapter load_in_4bit load_in_8bit lora_target_linear peft_use_dora "
    "peft_use_rslora peft_init_lora_weights peft loraplus_lr_ratio relora "
    "relora_steps relora_warmup_steps relora_prune_ratio jagged_restart_steps jagged_restart_warmup_steps "
    "datasets test_datasets warmup_steps use_tensorboard wandb_project "
    "mlflow_tracking_uri"
)
TOGETHER = frozenset(_TOGETHER.split())
_MACHINE = "the machine decides: bf16 where it multiplies in it, PyTorch's own attention"
_ONE = "one process and one device train an adapter here"
_FROZEN = "the base and its tokenizer are frozen: what serves many adapters cannot change for one"
_SFT = "supervised fine-tuning only"
_ALWAYS = "always so here"
_OWN = "the base's own files say so"
_REASONS: tuple[tuple[str, str], ...] = (
    ("bf16 fp16 tf32 bfloat16 float16 float32 flash_attention xformers_attention sdp_attention eager_attention", _MACHINE),
    ("flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp s2_attention torch_compile torch_compile_backend", _MACHINE),
    ("lora_mlp_kernel lora_qkv_kernel lora_o_kernel plugins liger_kernel cut_cross_entropy unsloth_lora_mlp", _MACHINE),
    ("deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout ddp_bucket_cap_mb ddp_find_unused_parameters", _ONE),
    ("tensor_parallel_size context_parallel_size sequence_parallel_degree dp_shard_size device_map max_memory local_rank", _ONE),
    ("lora_modules_to_save special_tokens tokens added_tokens_overrides resize_token_embeddings_to_32x tokenizer_config", _FROZEN),
    ("embeddings_skip_upcast unfrozen_parameters lora_fan_in_fan_out overrides_of_model_config noisy_embedding_alpha", _FROZEN),
    ("rl dpo_beta dpo_label_smoothing kto_desirable_weight orpo_alpha reward_model process_reward_model trl simpo_gamma", _SFT),
    ("group_by_length save_safetensors pad_to_sequence_len eval_sample_packing excess_length_strategy", _ALWAYS),
    ("model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_llama_derived_model is_mistral_derived_model", _OWN),
    ("is_falcon_derived_model is_qwen_derived_model base_model_config bnb_config_kwargs gptq", _OWN),
    ("wandb_entity wandb_name wandb_run_id wandb_watch wandb_log_model wandb_mode mlflow_experiment_name", "set it in the environment"),
    ("trust_remote_code", "code from a hub is never run"),
    ("val_set_size", "rows are not split by chance here: put the held-out ones in a file of their own, as data.validation"),
    ("evals_per_epoch saves_per_epoch eval_strategy save_strategy", "counted in steps: train.evaluate_every, train.checkpoint_every"),
    ("eval_batch_size eval_table_size eval_max_new_tokens do_bench_eval do_causal_lm_eval", "see the recipe's eval section"),
    ("output_dir", "the adapter goes to the store under the recipe's name (--adapters DIR)"),
    ("dataset_prepared_path dataset_processes dataset_num_proc shuffle_merged_datasets push_dataset_to_hub", "rows are read as they are"),
    ("resume_from_checkpoint auto_resume_from_checkpoints", "embedft train-lm RECIPE --resume"),
    ("save_total_limit save_only_model load_best_model_at_end", "one checkpoint is kept; with data.validation the best step is published"),
    ("logging_steps early_stopping", "no such setting is needed"),
    ("hub_model_id hub_strategy hf_use_auth_token", "embedft adapters push NAME PLACE"),
    ("lora_model_dir merge_lora", "an adapter starts anew; embedft adapters merge writes it into its base"),
    ("adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs cosine_min_lr_ratio lr_groups optim_args lr_quadratic_warmup", "fixed here"),
    ("loraplus_lr_embedding", "embeddings are not trained"),
    ("default_system_message chat_template_jinja roles_to_train train_on_eos", "the base's template as it is; every answer is learnt"),
    ("pretraining_dataset", "pre-training is not fine-tuning of an adapter"),
    ("strict debug seq_len_warning", "a recipe is always strict"),
)
REASONS: Mapping[str, str] = MappingProxyType({key: why for keys, why in _REASONS for key in keys.split()})


def as_yaml(made: Translation) -> str:
    """The recipe's text; what was left out stands above it as comments."""
    notes = [f"# left out: {key}: {why}" for key, why in made.left_out.items()]
    body = yaml.safe_dump(made.recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return "\n".join([*notes, body])
