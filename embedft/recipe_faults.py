"""Pydantic's faults in a recipe → one line each, in a recipe's own words."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_SHAPES = {
    "base": "a section such as {model: minilm}",
    "adapter": "a section such as {method: lora, r: 8}",
    "adapter.targets": "all-linear, or a list such as [query, value]",
    "adapter.options": "a section of the method's own settings",
    "adapter.options.*": "true, false, a finite number or a text",
    "data": "a section such as {train: rows.jsonl}",
    "data.prompts": "a section such as {query: 'query: '}",
    "data.also": "a list such as [{train: more.jsonl}]",
    "data.also.*": "a section such as {train: more.jsonl}",
    "loss": "a section such as {name: mnrl}",
    "loss.dimensions": "a list such as [256, 128]",
    "train": "a section such as {epochs: 2}",
    "train.trackers": "a list such as [tensorboard]",
    "eval": "a section such as {batch: 32}",
    "eval.guard": "null, or a section such as {data: pydocs}",
}


# What PEFT, transformers and sentence-transformers call it.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.batch",
    "per_device_train_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "warmup_ratio": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "max_seq_length": "train.max_length",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "model_name_or_path": "base.model",
}


def faults(error: ValidationError, content: Mapping[str, Any], models: Mapping[str, type[BaseModel]]) -> list[str]:
    """A line for each fault of the recipe `content`; `models` by task."""
    return list(dict.fromkeys(_fault(item, content, models) for item in error.errors()))


def _fault(item: Any, content: Mapping[str, Any], models: Mapping[str, type[BaseModel]]) -> str:
    kind, (location, given) = item["type"], _given(item, content, models)
    dotted = ".".join(location) or "task"
    if kind == "extra_forbidden":
        known = list(_known_keys(models.get(str(content.get("task")))))
        elsewhere = difflib.get_close_matches(dotted.rpartition(".")[2], _ELSEWHERE, n=1, cutoff=0.85)
        meant = _ELSEWHERE[elsewhere[0]] if elsewhere else None
        near = [meant] if meant in known else difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        return f"{dotted}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind.startswith("union_tag"):
        return "task: expected 'embedding' or 'causal_lm'"
    if kind == "missing":
        return f"{dotted}: field required"
    if wanted := _SHAPES.get(dotted) or _SHAPES.get(".".join([*location[:-1], "*"])):
        return f"{dotted}: expected {wanted} (got {given!r})"
    return f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]} (got {given!r})"


def _given(item: Any, content: Mapping[str, Any], tasks: Iterable[str]) -> tuple[list[str], Any]:
    """Where the fault is in what was given, and what stands there. Of a union pydantic names a branch beyond that, once for each."""
    location: list[str] = []
    value: Any = content
    for part in item["loc"]:
        if part in tasks:
            continue
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if item["type"] != "missing":
                break
        location.append(str(part))
    return location, value


def _known_keys(model: type[BaseModel] | None) -> list[str]:
    return sorted(_keys(model, "")) if model else ["task"]


def _keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or none
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")
