"""A BERT-like encoder and its LoRA over packed token ids: the vectors of the ordinary forward, and cheaper gradients.

Nothing is padded, frozen layers keep nothing for a backward pass, and what lies below the first adapted layer can be computed once.
Knows no text, no data and no loss. `unpackable` says why a model cannot be run this way; then the ordinary forward serves.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from embedft.attention import Groups
from embedft.embedding.packed_ops import Layer, Norm, Projection
from embedft.encode import EncodeSettings, finish
from embedft.shapes import few
from embedft.unpadded import FAMILIES, SHAPES, groups_of, pooled

_PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def unpackable(model: Any) -> str | None:
    """Why this PEFT model cannot run packed; None where it can."""
    config = model.get_base_model().config
    if model.device.type != "cpu":
        return "it is on a GPU"
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        return f"its architecture is {config.model_type}"
    if config.hidden_act != "gelu" or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return "its activation or its positions are of another kind"
    attached = getattr(model, "embedft", None)
    if len(model.peft_config) > 1 or (attached and attached.method.update):
        return "a frozen pair stands, or will stand, beside the one that trains"
    for peft in model.peft_config.values():
        if str(getattr(peft.peft_type, "value", peft.peft_type)) != "LORA" or peft.lora_dropout or peft.use_dora:
            return "its adapter is no plain LoRA without dropout"
    try:
        return None if [*_layers(model)] else "it has no layers"
    except _Unknown as reason:
        return str(reason)


class _Unknown(Exception):
    pass


def _layers(model: Any) -> list[Layer]:
    base = model.get_base_model()
    heads = base.config.num_attention_heads
    made: list[Layer] = []
    for layer in base.encoder.layer:
        parts = [_projection(layer.get_submodule(name)) for name in _PARTS]
        norms = (_norm(layer.attention.output.LayerNorm), _norm(layer.output.LayerNorm))
        made.append(Layer(parts, norms, heads=heads))
    return made


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _projection(module: Any) -> Projection:
    """A linear, plain or NF4 (unpacked once: it computes with exactly these numbers), with the LoRA on it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    frozen: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    bias = None if frozen.bias is None else frozen.bias.detach()
    options: dict[str, Any] = {}
    if isinstance(module, BaseTunerLayer):
        name = module.active_adapters[0]
        options = {"a": module.lora_A[name].weight, "b": module.lora_B[name].weight, "scale": float(module.scaling[name])}  # pyright: ignore
    return Projection(_weight(frozen), bias, **options)


def _weight(frozen: Any) -> Tensor:
    weight = frozen.weight
    if type(frozen) is torch.nn.Linear:
        return weight.detach()
    if type(frozen).__name__ in {"Linear4bit", "LinearNF4"} and getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(frozen.compute_dtype or torch.float32)
    raise _Unknown(f"its linear layers are {type(frozen).__name__}")


class PackedEncoder:
    """Token ids → vectors (n, d) float32, with gradients for the adapter. Raises ValueError where `unpackable`."""

    def __init__(self, model: Any, settings: EncodeSettings) -> None:
        self.settings = settings
        self.layers = _layers(model)
        base = model.get_base_model()
        self._embeddings, self._offset = base.embeddings, 0
        if base.config.model_type != "bert":
            self._offset = base.embeddings.padding_idx + 1  # RoBERTa counts positions from after its padding index
        adapted = [index for index, layer in enumerate(self.layers) if any(p.a is not None for p in layer.projections)]
        self.first_adapted = min(adapted, default=len(self.layers))
        self.width, self.dtype = int(base.config.hidden_size), base.dtype

    @contextmanager
    def adapter_off(self) -> Generator[None]:
        """Inside, the base's own vectors; only without gradients."""
        projections = [projection for layer in self.layers for projection in layer.projections]
        for projection in projections:
            projection.enabled = False
        try:
            yield
        finally:
            for projection in projections:
                projection.enabled = True

    def encode(self, ids: Sequence[Sequence[int]], below: Sequence[Tensor] | None = None) -> Tensor:
        """`below`: the states of `lower` for each text, which saves the layers under the first adapted one."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        groups = groups_of([len(ids[index]) for index in order])
        x = self._filled(torch.cat([below[index] for index in order])) if below else self._lower([ids[index] for index in order], groups)
        for layer in self.layers[self.first_adapted :]:
            x = layer(x, groups)
        vectors = finish(pooled(x, groups, self.settings.pooling), self.settings)
        return vectors[torch.tensor(_inverse(order))]

    def lower(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states that enter the first adapted layer: (length, d) for each text."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        lengths = [len(ids[index]) for index in order]
        states = self._lower([ids[index] for index in order], groups_of(lengths))[: sum(lengths)].split(lengths)
        return [states[place] for place in _inverse(order)]

    def _lower(self, ids: Sequence[Sequence[int]], groups: Groups) -> Tensor:
        with torch.no_grad():
            x = self._filled(self._embed(ids))
            for layer in self.layers[: self.first_adapted]:
                x = layer(x, groups)
        return x

    def _filled(self, x: Tensor) -> Tensor:
        """(T, d) → (T or a little more, d), the rest zeros, which no text sees."""
        return torch.nn.functional.pad(x, (0, 0, 0, few(len(x), steps=SHAPES) - len(x)))

    def _embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        parts = self._embeddings
        tokens = torch.tensor([token for row in ids for token in row])
        positions = torch.cat([torch.arange(len(row)) for row in ids]) + self._offset
        x = parts.word_embeddings(tokens) + parts.token_type_embeddings.weight[0]
        return parts.LayerNorm(x + parts.position_embeddings(positions))


def _inverse(order: Sequence[int]) -> list[int]:
    places = [0] * len(order)
    for place, index in enumerate(order):
        places[index] = place
    return places
