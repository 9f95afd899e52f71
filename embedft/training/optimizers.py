"""The optimizer that a method asks for. Knows no task and no loop."""

from typing import Any

from embedft.methods.table import option
from embedft.training.method_steps import adapted_model


def method_optimizer(model: Any, arguments: Any) -> Any:
    """A torch optimizer where the method has its own (LoRA+, LoRA-FA), else None: the trainer's choice stands.

    A method that wants paged memory sets `arguments.optim` where the recipe left the default.
    """
    adapted = adapted_model(model)
    wanted = adapted.embedft.method.optimizer if adapted is not None else None
    if wanted == "paged" and str(getattr(arguments.optim, "value", arguments.optim)) == "adamw_torch_fused":
        from transformers.training_args import OptimizerNames

        arguments.optim = OptimizerNames.PAGED_ADAMW
    if wanted == "lora_plus":
        return _lora_plus(adapted, arguments)
    return _lora_fa(adapted, arguments) if wanted == "lora_fa" else None


def _lora_plus(model: Any, arguments: Any) -> Any:
    """B learns `ratio` times as fast as A (arXiv 2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
    values.pop("lr", None)
    ratio = float(option(model.embedft.adapter, "ratio"))
    decay = {"loraplus_weight_decay": arguments.weight_decay}
    return create_loraplus_optimizer(model, kind, lr=arguments.learning_rate, loraplus_lr_ratio=ratio, **decay, **values)


def _lora_fa(model: Any, arguments: Any) -> Any:
    """A stays as it was drawn; B's gradient is projected so that the step comes closest to full fine-tuning's (arXiv 2308.03303)."""
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
