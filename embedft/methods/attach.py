"""A new adapter on a frozen base, for any row of the table."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from embedft.base import Base
from embedft.errors import MethodUnsupported
from embedft.methods.companion import add_companion
from embedft.methods.precision import settle
from embedft.methods.prompts import place_prompts
from embedft.methods.starts import start
from embedft.methods.table import Form, Method, option, supported
from embedft.methods.targets import last_layers, linear_modules, rescaled_modules, targeted_modules, weighted_modules
from embedft.model_folder import Task
from embedft.recipe import AdapterSection

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Attached:
    """Which row trains this model, and with which settings: kept on the model as `embedft`, for the training loop."""

    method: Method
    adapter: AdapterSection


def attach(
    base: Base, adapter: AdapterSection, *, task: Task, batches: Iterable[Mapping[str, Any]] | None = None, begin: bool = True
) -> "PeftModel":
    """A new adapter on the frozen base. Only the adapter's parameters train; the base's tensors never change.

    `batches`: a few batches of the training data, for methods that begin from it (EVA). `begin` False: only the shapes matter, so
    nothing is computed from weights or data. Draws from torch's global RNG.
    Raises MethodUnsupported where the table says no.
    """
    import peft

    method = supported(adapter, task=task, info=base.info)
    if task == "embedding" and method.form not in ("prompt", "attention", "weights") and _only_the_pooler(base, adapter):
        raise MethodUnsupported(method.name, where="on the pooler alone", why="no vector depends on it: target the encoder's layers")
    values = FORMS[method.form](base, adapter)
    task_type = "CAUSAL_LM" if task == "causal_lm" else "FEATURE_EXTRACTION"
    config = getattr(peft, method.config)(**values, **method.fixed, task_type=task_type)
    try:
        model: Any = peft.get_peft_model(base.model, config)
    except ValueError as error:  # PEFT knows the architectures that it can wrap
        raise MethodUnsupported(method.name, where=f"on {base.info.architecture}", why=str(error).splitlines()[0]) from error
    settle(model, base.model.dtype)
    if method.form == "prompt":
        place_prompts(model)
    if not begin and (method.start in {"pissa", "olora"} or method.update in FROZEN_RANKS):
        add_companion(model, adapter.r * FROZEN_RANKS.get(method.update or "", 1))
    elif method.start and begin:
        start(model, base, method, adapter, batches=batches)
    if method.optimizer == "lora_fa":
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    model.embedft = Attached(method, adapter)
    return model


def _only_the_pooler(base: Base, adapter: AdapterSection) -> bool:
    names = adapted_modules(base, adapter)
    return bool(names) and all(name.startswith("pooler.") for name in names)


FROZEN_RANKS = {"delta_lora": 2, "relora": 2}  # rank of the frozen pair late in a run, in units of r


def adapted_modules(base: Base, adapter: AdapterSection) -> list[str]:
    """Full names of the layers that `targets` and, for an encoder, `layers` ask for."""
    return last_layers(base.model, targeted_modules(base.model, adapter.targets), getattr(adapter, "layers", None))


def _layers(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    """target_modules by their last names, as adapters are usually written, and the few full names that must not match."""
    modules = adapted_modules(base, adapter)
    suffixes = sorted({name.rpartition(".")[2] for name in modules}) if adapter.targets == "all-linear" else list(adapter.targets)
    excluded = sorted(name for name in linear_modules(base.model) if name not in modules and any(name.endswith(s) for s in suffixes))
    return {"target_modules": suffixes, "exclude_modules": excluded or None}


def _lora(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    layers = _layers(base, adapter)
    full = max((min(_shape(base.model.get_submodule(name))) for name in adapted_modules(base, adapter)), default=adapter.r)
    if adapter.r > full:
        raise MethodUnsupported(adapter.method, where=f"at rank {adapter.r}", why=f"no layer there has more than {full}: lower it")
    values = {"r": adapter.r, "lora_alpha": adapter.scale_alpha, "lora_dropout": adapter.dropout, **layers}
    if adapter.method == "eva":
        from peft import EvaConfig

        values |= {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=float(option(adapter, "rho")))}
    return values


def _shape(layer: Any) -> tuple[int, int]:
    return int(layer.in_features), int(layer.out_features)


def _vera(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    layers = {"target_modules": adapted_modules(base, adapter)}
    seed, scale = int(option(adapter, "seed")), float(option(adapter, "d_initial"))
    return {"r": adapter.r, "vera_dropout": adapter.dropout, "d_initial": scale, "projection_prng_key": seed, **layers}


def _adalora(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    """`total_step` is set when training begins and the number of steps is known."""
    first = int(option(adapter, "init_r")) or -(-3 * adapter.r // 2)
    if first < adapter.r:
        raise MethodUnsupported(adapter.method, where=f"with init_r={first} under r={adapter.r}", why="ranks only fall: raise it")
    return {
        "init_r": first,
        "target_r": adapter.r,
        "lora_alpha": adapter.scale_alpha,
        "lora_dropout": adapter.dropout,
        "deltaT": int(option(adapter, "every")),
        "orth_reg_weight": float(option(adapter, "orthogonal")),
        "total_step": 1_000_000,
        **_layers(base, adapter),
    }


def _ia3(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    modules = adapted_modules(base, adapter)
    layers, inputs = rescaled_modules(modules) if adapter.targets == "all-linear" else (modules, rescaled_modules(modules)[1])
    return {"target_modules": layers, "feedforward_modules": [name for name in layers if name in inputs]}


def _lycoris(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    values = {"r": adapter.r, "alpha": adapter.scale_alpha, "module_dropout": adapter.dropout, **_layers(base, adapter)}
    return values | ({"decompose_both": bool(option(adapter, "decompose_both"))} if adapter.method == "lokr" else {})


def _prompt(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    values: dict[str, Any] = {"num_virtual_tokens": adapter.r}
    if adapter.method == "prefix_tuning":
        projection = bool(option(adapter, "projection"))
        hidden = int(option(adapter, "hidden_size")) or base.info.hidden_size
        return values | {"prefix_projection": projection, "encoder_hidden_size": hidden if projection else None}
    if adapter.method == "p_tuning":
        return values | {"encoder_hidden_size": int(option(adapter, "hidden_size")) or base.info.hidden_size}
    if adapter.method == "prompt_tuning" and option(adapter, "text"):
        words = {"prompt_tuning_init_text": str(option(adapter, "text")), "tokenizer_name_or_path": str(base.folder)}
        return values | {"prompt_tuning_init": "TEXT", **words}
    if adapter.method == "multitask_prompt_tuning":
        return values | {"num_tasks": 1, "num_ranks": int(option(adapter, "ranks"))}
    return values


def _attention(base: Base, adapter: AdapterSection) -> dict[str, Any]:
    """LLaMA-Adapter puts its prompts into the topmost layers: by default all but the lowest sixteenth (30 of 32)."""
    count = int(base.model.config.num_hidden_layers)
    return {"adapter_len": adapter.r, "adapter_layers": int(option(adapter, "layers")) or count - count // 16}


def _weights(base: Base, adapter: AdapterSection) -> dict[str, Any]:  # noqa: ARG001
    return {"target_modules": weighted_modules(base.model)}


FORMS: Mapping[Form, Callable[[Base, AdapterSection], dict[str, Any]]] = MappingProxyType(
    {
        "lora": _lora,
        "vera": _vera,
        "adalora": _adalora,
        "ia3": _ia3,
        "loha": _lycoris,
        "lokr": _lycoris,
        "prompt": _prompt,
        "attention": _attention,
        "weights": _weights,
    }
)
