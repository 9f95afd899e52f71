"""Every key of an Axolotl YAML that is understood: what it is here, or why it has no place. Any other is listed as unknown, so that
nothing is dropped without a word. Tables only.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FORMATS = {"alpaca": "alpaca", "chat_template": "messages"}
OTHER_ROWS = {
    "sharegpt": "conversations of `from` and `value`: write them as messages of `role` and `content`",
    "input_output": "segments with labels: write them as prompt and completion",
}
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
# What Axolotl does where a file says nothing, and a recipe would do otherwise: keys of which one would say it, the place, the value.
DEFAULTS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("micro_batch_size",), "train.batch", 1),
    (("lr_scheduler",), "train.schedule", "cosine"),
    (("warmup_ratio", "warmup_steps"), "train.warmup", 0.03),
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
_NOT = "not done here"
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
    ("neftune_noise_alpha dataset_exact_deduplication min_sample_len auto_find_batch_size loss_watchdog_threshold", _NOT),
    ("peft_layers_to_transform lora_layers_to_transform peft_layers_pattern", "set adapter.targets to the layers' names"),
    ("torch_dtype fp8 gpu_memory_limit lora_on_cpu gradient_checkpointing_kwargs sample_packing_group_size", _MACHINE),
    ("sample_packing_bin_size dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor", _MACHINE),
    ("use_wandb use_mlflow mlflow_run_name use_comet comet_api_key comet_project_name", "trackers are named in train.trackers"),
    ("metric_for_best_model greater_is_better", "the loss on data.validation chooses the best step"),
)
REASONS: Mapping[str, str] = MappingProxyType({key: why for keys, why in _REASONS for key in keys.split()})
