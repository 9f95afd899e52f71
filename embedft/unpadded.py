"""Texts end to end through transformers' own model, on a CPU: nothing is padded, and each text attends to itself alone.

The model is called as ever, adapters and all: what stands on its layers sees one row with the tokens of all texts. Only its attention
function is ours (transformers' AttentionInterface), and the texts' lengths come to it as one more argument. Knows no text and no pooling.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedft import attention
from embedft.attention import Groups, rows_of
from embedft.shapes import few

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
NAME = "embedft_unpadded"
SHAPES = 32  # tokens of a batch, all its texts together, between one power of two and the next


def usable(model: Any) -> bool:
    """Whether `run` can: an encoder of a family that it knows, on a CPU, with a C compiler, and nothing that stands before a row."""
    config = inner(model).config
    heads = getattr(config, "num_attention_heads", 0)
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False) or config.hidden_size % (heads * attention.STEP):
        return False
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return False
    prompted = any(peft.is_prompt_learning for peft in getattr(model, "peft_config", {}).values())
    if prompted and not getattr(model, "_adapters_disabled", False):
        return False
    return inner(model).device.type == "cpu" and attention.kernels() == "compiled" and _attends(inner(model))


def inner(model: Any) -> Any:
    """The transformers model in a PeftModel, or in whatever else has `get_base_model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def groups_of(lengths: Sequence[int]) -> Groups:
    """Sorted lengths → (texts, length) of each run."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length] = counts.get(length, 0) + 1
    return [(texts, length) for length, texts in counts.items()]


def run(model: Any, ids: Sequence[Sequence[int]], slots: Sequence[int] | None = None) -> tuple[Tensor, Groups]:
    """Texts' token ids, the shortest first → their last hidden states (T, d) and the groups they lie in.

    `slots`: one for each text, for a model that knows such. A few tokens of no text follow, so that batches have few shapes.
    """
    base, total = inner(model), sum(map(len, ids))
    groups, rest = groups_of([len(row) for row in ids]), few(total, steps=SHAPES) - total
    named: dict[str, Any] = {}
    if slots is not None:
        named["slots"] = [slot for row, slot in zip(ids, slots, strict=True) for _ in row] + [-1] * rest
    offset = 0 if base.config.model_type == "bert" else base.embeddings.padding_idx + 1
    tokens = torch.tensor([[token for row in ids for token in row] + [0] * rest])
    positions = torch.tensor([[*(place + offset for row in ids for place in range(len(row))), *[offset] * rest]])
    seen = _Seen(groups)
    hidden = model(input_ids=tokens, position_ids=positions, token_type_ids=torch.zeros_like(tokens), texts=seen, **named).last_hidden_state
    if seen.layers != base.config.num_hidden_layers:
        raise RuntimeError(f"{seen.layers} of {base.config.num_hidden_layers} layers kept the texts apart: their vectors would be wrong")
    return hidden[0], groups


def pooled(x: Tensor, groups: Groups, how: str) -> Tensor:
    """(T, d) → (texts, d) float32; `how`: mean, cls or lasttoken."""
    pieces = rows_of(x, groups)
    shaped = [piece.view(texts, length, -1) for (texts, length), piece in zip(groups, pieces, strict=True)]
    if how == "mean":
        return torch.cat([piece.float().mean(1) for piece in shaped])
    place = 0 if how == "cls" else -1
    return torch.cat([piece[:, place].float() for piece in shaped])


class _Seen:
    """The texts of one row, and how many layers have kept them apart."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.layers = groups, 0


def _attends(base: Any) -> bool:
    """Have the model's attention be ours from now on; padded batches it leaves to transformers' `sdpa`. False where it has another."""
    if base.config._attn_implementation == "sdpa":
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        functions: Any = ALL_ATTENTION_FUNCTIONS
        masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
        functions.register(NAME, _attend)
        masks.register(NAME, sdpa_mask)
        base.set_attn_implementation(NAME)
    return base.config._attn_implementation == NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, texts: _Seen | None = None, **named: Any
) -> tuple[Tensor, None]:
    """(1, heads, T, size) → (1, T, heads, size)."""
    if texts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        stock: Any = sdpa_attention_forward
        return stock(module, query, key, value, attention_mask, **named)
    heads, size = query.shape[1], query.shape[3]
    qkv = torch.cat([part[0].transpose(0, 1).reshape(-1, heads * size) for part in (query, key, value)], dim=1)
    texts.layers += 1
    return attention.attention(qkv, texts.groups, heads)[0].view(1, -1, heads, size), None
