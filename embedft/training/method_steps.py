"""What a method does between two optimizer steps: AdaLoRA's ranks, ReLoRA's restarts, Delta-LoRA's update. Knows no task.

Each is a TrainerCallback; what it must remember over a resume is in the model (frozen pairs) or in `state()`.
"""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from embedft.methods.companion import FROZEN, has_companion, lora_layers, pair, set_companion
from embedft.methods.table import option


class MethodSteps(TrainerCallback):
    """`model` is the PeftModel. `state` and `restore`: tensors that a checkpoint must hold beside the parameters."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adapter = model.embedft.adapter

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class AdaLoraRanks(MethodSteps):
    """Calls PEFT's update_and_allocate after each optimizer step, while the gradients are still there. No stock trainer does:
    there the ranks never change. Its penalty counts once a step, whatever the task and however many batches a step has."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        config = self.model.peft_config["default"]
        config.total_step = max(2, state.max_steps)
        config.tinit = int(config.total_step * float(option(self.adapter, "warm")))
        latest = max(0, config.total_step - config.tinit - 2)  # before the last ranks are chosen, importance is measured once
        config.tfinal = min(int(config.total_step * float(option(self.adapter, "settle"))), latest)

        tuned = self.model.base_model
        tuned.forward = tuned.model.forward  # PEFT's own adds the penalty to each loss that a model takes itself, evaluations' too

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if weight := float(option(self.adapter, "orthogonal")):
            (weight * self._unorthogonal()).backward()

    def _unorthogonal(self) -> Any:
        """Mean over P and Q of all layers of ‖PᵀP − I‖ or ‖QQᵀ − I‖ (Frobenius; arXiv 2303.10512, equation 4, as PEFT takes it)."""
        import torch

        found: list[Any] = []
        for _, layer in lora_layers(self.model):
            p, q = layer.lora_B["default"], layer.lora_A["default"]
            found += [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in (p.T @ p, q @ q.T)]
        return torch.stack(found).mean()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)

    def state(self) -> dict[str, Any]:
        import torch

        allocator, config = self.model.base_model.rankallocator, self.model.peft_config["default"]
        kept = {f"{kind}/{name}": value for kind in _IMPORTANCE for name, value in getattr(allocator, kind).items()}
        patterns = {f"pattern/{name}": torch.tensor(value) for name, value in (config.rank_pattern or {}).items()}
        return kept | patterns

    def restore(self, state: Mapping[str, Any]) -> None:
        allocator, config = self.model.base_model.rankallocator, self.model.peft_config["default"]
        patterns: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "pattern":
                patterns[name] = value.tolist()
            else:
                getattr(allocator, kind)[name] = value
        config.rank_pattern = patterns or None


_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class ReLoraRestarts(MethodSteps):
    """At `restarts` evenly spaced steps the trained pair joins the frozen one, A is drawn anew, B is 0, most of the optimizer's
    memory of both is dropped, and the learning rate warms up again. The sum's rank grows by r each time."""

    _since = 1_000_000

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        count = int(option(self.adapter, "restarts"))
        self._at = {round(state.max_steps * k / (count + 1)) for k in range(1, count + 1)} - {0, state.max_steps}
        done = [step for step in self._at if step <= state.global_step]
        self._since = state.global_step - max(done) if done else 1_000_000

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        warm = int(option(self.adapter, "warm"))
        if self._since < warm:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= (self._since + 1) / (warm + 1)  # the scheduler sets it afresh after each step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since += 1
        if state.global_step in self._at:
            self._restart(kwargs["optimizer"], seed=args.seed * 1_000_003 + state.global_step)
            self._since = 0

    def _restart(self, optimizer: Any, *, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)

        pairs: dict[str, tuple[Any, Any]] = {}
        for name, layer in lora_layers(self.model):
            a, b = pair(layer)
            if has_companion(self.model):
                done_a, done_b = pair(layer, FROZEN)
                a, b = torch.cat([done_a, a]), torch.cat([done_b, b], dim=1)
            pairs[name] = a, b
        set_companion(self.model, pairs)
        share = float(option(self.adapter, "prune"))
        for _, layer in lora_layers(self.model):
            with torch.no_grad():
                drawn = torch.empty_like(layer.lora_A["default"].weight, device="cpu")
                layer.lora_A["default"].weight.copy_(torch.nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
                layer.lora_B["default"].weight.zero_()
            for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                _prune(optimizer, parameter, share)


def _prune(optimizer: Any, parameter: Any, share: float) -> None:
    """Keep both moments only where the first is largest. One mask for both: A's next gradient is 0, since B is, and a first moment
    over a second one that is gone would be a step of its size over epsilon."""
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = inner.state.get(parameter, {})
    if "exp_avg" not in moments:  # 8-bit optimizers pack theirs
        inner.state.pop(parameter, None)
        return
    size = moments["exp_avg"].abs()
    kept = max(1, round(size.numel() * (1 - share)))
    mask = size >= size.flatten().topk(kept).values[-1]
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name].mul_(mask)


class DeltaLoraUpdate(MethodSteps):
    """After each step from `begin` on, W takes λ s (A₊B₊ − AB). The sum telescopes to λ s (A_T B_T − A_K B_K), which the frozen
    pair holds: the base is never written, and the result is one LoRA of rank 2 r."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = max(1, int(state.max_steps * float(option(self.adapter, "begin"))))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import torch

        if state.global_step < self._begin:
            return
        ratio, pairs = float(option(self.adapter, "ratio")), {}
        begun = has_companion(self.model)
        for name, layer in lora_layers(self.model):
            a, b = pair(layer)
            first_a, first_b = a, -ratio * b
            if begun:
                held_a, held_b = pair(layer, FROZEN)
                first_a, first_b = held_a[len(a) :], held_b[:, len(a) :]
            pairs[name] = torch.cat([a, first_a]), torch.cat([ratio * b, first_b], dim=1)
        set_companion(self.model, pairs)


STEPS = {"adalora": AdaLoraRanks, "relora": ReLoraRestarts, "delta_lora": DeltaLoraUpdate}


def adapted_model(model: Any) -> Any:
    """The PeftModel in what a trainer trains, or None where `attach` did not make it."""
    return next((module for module in model.modules() if hasattr(module, "embedft") and hasattr(module, "peft_config")), None)


def method_steps(model: Any) -> MethodSteps | None:
    """The callback that the model's method needs, if any."""
    adapted = adapted_model(model)
    kind = STEPS.get(adapted.embedft.method.update or "") if adapted is not None else None
    return kind(adapted) if kind else None
