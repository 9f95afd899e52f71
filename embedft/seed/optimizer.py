"""Muon for the matrices inside the layers, AdamW for embeddings and gains. Knows no model.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (momentum, then the nearest orthogonal matrix by Newton-Schulz).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MuonAdamW:
    """One optimizer whose whole state is a flat dict of named tensors, so that it saves as safetensors."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float = 0.02,
        adam_lr: float = 4e-3,
        momentum: float = 0.95,
        decay: float = 0.01,
    ) -> None:
        parameters = list(named)
        self.muon_lr, self.adam_lr, self.momentum, self.decay, self.steps = muon_lr, adam_lr, momentum, decay, 0
        self.adam = [(name, p) for name, p in parameters if p.dim() < 2 or "embed" in name]
        matrices = [(name, p) for name, p in parameters if p.dim() == 2 and "embed" not in name]
        self.muon: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}  # by shape: one batched iteration for all of a shape
        for name, p in matrices:
            self.muon.setdefault(tuple(p.shape), []).append((name, p))
        self.state: dict[str, Tensor] = {f"momentum.{name}": torch.zeros_like(p) for name, p in matrices}
        for name, p in self.adam:
            self.state[f"first.{name}"], self.state[f"second.{name}"] = torch.zeros_like(p), torch.zeros_like(p)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both learning rates times `scale`; clears the gradients."""
        self.steps += 1
        for (rows, columns), group in self.muon.items():
            updates: list[Tensor] = []
            for name, p in group:
                gradient, buffer = _gradient(p), self.state[f"momentum.{name}"]
                buffer.lerp_(gradient, 1 - self.momentum)
                updates.append(gradient.lerp(buffer, self.momentum))
            rate = self.muon_lr * scale
            for update, (_, p) in zip(orthogonal(torch.stack(updates)), group, strict=True):
                p.mul_(1 - rate * self.decay).add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        for name, p in self.adam:
            self._adam(name, p, self.adam_lr * scale)

    def _adam(self, name: str, p: nn.Parameter, rate: float, beta1: float = 0.9, beta2: float = 0.95) -> None:
        gradient, first, second = _gradient(p), self.state[f"first.{name}"], self.state[f"second.{name}"]
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        scale = (second / (1 - beta2**self.steps)).sqrt_().add_(1e-10)
        p.addcdiv_(first, scale, value=-rate / (1 - beta1**self.steps))


def _gradient(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        raise RuntimeError("a parameter has no gradient: run backward before step")
    gradient, p.grad = p.grad, None
    return gradient


def orthogonal(x: Tensor, *, steps: int = 5) -> Tensor:
    """About the nearest orthogonal matrix of each of (count, rows, columns), by five quintic Newton-Schulz steps."""
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT
