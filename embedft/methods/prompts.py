"""Virtual tokens whose effect does not depend on the rest of the batch. Training, evaluation and engines all go through here.

PEFT drops position ids and leaves the virtual positions in an encoder's output, so its answers change with the padding.
Here positions count what is not padding, and an output has one vector (or one row of logits) a real token.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def place_prompts(model: Any) -> None:
    """Let a PeftModel with a prompt-learning adapter be one of ours: the same tensors, another forward pass."""
    from peft import PeftModelForCausalLM

    lm, encoder = _classes()
    model.__class__ = lm if isinstance(model, PeftModelForCausalLM) else encoder


def is_prompted(model: Any) -> bool:
    return isinstance(model, _classes())


def key_values(model: Any) -> "list[tuple[Tensor, Tensor]]":
    """What the virtual tokens of a causal model's adapter amount to: (keys, values), each (heads, virtual tokens, size), a layer."""
    import torch

    with torch.inference_mode():
        return [(layer.keys[0], layer.values[0]) for layer in _cache(model, 1).layers]


def _cache(model: Any, batch: int) -> Any:
    prompts = _prompts(model, batch)
    if not hasattr(prompts, "shape"):  # prefix tuning: keys and values already
        return prompts
    embeddings = model.get_base_model().get_input_embeddings()
    return model.get_base_model()(inputs_embeds=prompts.to(embeddings.weight.dtype), use_cache=True).past_key_values


def _prompts(model: Any, batch: int) -> Any:
    """(batch, virtual tokens, hidden), or a cache for prefix tuning."""
    import torch

    multitask = hasattr(model.prompt_encoder[model.active_adapter], "prefix_task_cols")
    tasks = torch.zeros(batch, dtype=torch.long, device=model.device) if multitask else None
    return model.get_prompt(batch_size=batch, task_ids=tasks)


def _forward(model: Any, input_ids: "Tensor", attention_mask: "Tensor | None", **rest: Any) -> Any:
    """The base's output on virtual tokens + real ones, of shape as if only the real ones had been given, logits or not."""
    import torch

    base, count = model.get_base_model(), model.active_peft_config.num_virtual_tokens
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
    prompts = _prompts(model, len(input_ids))
    if not hasattr(prompts, "shape"):
        return base(input_ids=input_ids, attention_mask=mask, past_key_values=prompts, **rest), 0
    embeddings = base.get_input_embeddings()(input_ids)
    return base(inputs_embeds=torch.cat([prompts.to(embeddings.dtype), embeddings], dim=1), attention_mask=mask, **rest), count


def _positions(mask: "Tensor | None", ids: "Tensor", count: int, *, prefix: bool) -> "Tensor":
    """Position ids that count what is not padding, the virtual tokens first. A prefix is in the cache: its own are not asked for."""
    import torch

    given = torch.ones_like(ids) if mask is None else mask
    whole = torch.cat([given.new_ones(len(given), count), given], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0).long()
    return positions[:, count:] if prefix else positions


class _Disabled:
    """PEFT switches prompts off by exchanging methods that an encoder does not have; here a flag does it."""

    _adapters_disabled: bool

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = before


@lru_cache(maxsize=1)
def _classes() -> tuple[type, type]:
    """Made on first use: PEFT is heavy."""
    from peft import PeftModelForCausalLM, PeftModelForFeatureExtraction

    class PromptedLM(_Disabled, PeftModelForCausalLM):
        """Logits of real tokens only, for rows padded on either side."""

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:  # pyright: ignore
            if self._adapters_disabled:
                return self.get_base_model()(input_ids=input_ids, attention_mask=attention_mask, **rest)
            config: Any = self.active_peft_config
            rest.pop("position_ids", None)
            kept = rest.pop("logits_to_keep", 0) or input_ids.shape[1]
            prefix = config.peft_type.value == "PREFIX_TUNING"
            positions = _positions(attention_mask, input_ids, config.num_virtual_tokens, prefix=prefix)
            return _forward(self, input_ids, attention_mask, position_ids=positions, logits_to_keep=kept, **rest)[0]

        def generate(self, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:  # pyright: ignore
            import torch

            base: Any = self.get_base_model()
            if self._adapters_disabled:
                return base.generate(input_ids=input_ids, attention_mask=attention_mask, **rest)
            count = int(self.active_peft_config.num_virtual_tokens)  # pyright: ignore
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            made = base.generate(  # the first `count` ids stand for what the cache holds already
                input_ids=torch.cat([input_ids.new_zeros(len(input_ids), count), input_ids], dim=1),
                attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], dim=1),
                past_key_values=_cache(self, len(input_ids)),
                **rest,
            )
            return made[:, count:]

    class PromptedEncoder(_Disabled, PeftModelForFeatureExtraction):
        """Hidden states of real tokens only, for rows padded on the right."""

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:  # pyright: ignore
            if self._adapters_disabled:
                return self.get_base_model()(input_ids=input_ids, attention_mask=attention_mask, **rest)
            output, count = _forward(self, input_ids, attention_mask, **rest)
            output.last_hidden_state = output.last_hidden_state[:, count:]
            return output

    return PromptedLM, PromptedEncoder
