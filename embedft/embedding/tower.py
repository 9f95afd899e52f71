"""The PEFT model as sentence-transformers modules, and the trainer around it. The base is wrapped, never reloaded.

Knows no recipe and no files but the tokenizer's.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from embedft.embedding.batches import BatchPlan
from embedft.encode import EncodeSettings, InputType, TextPreparer, pad
from embedft.methods import train_adapters_only
from embedft.training.interrupt import AdapterCheckpoints


class Tower(InputModule):
    """Token ids → hidden states. Tokenises with the same TextPreparer as inference, prompts included.

    `side='query'`: documents pass through with the adapter switched off.
    """

    def __init__(self, model: Any, preparer: TextPreparer, *, side: str = "both") -> None:
        super().__init__()
        self.model = model
        self.preparer = preparer
        self.side = side

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Texts → input_ids and attention_mask (n, longest). The option `task` (query, document or None) picks the prompt."""
        assert prompt is None, "prompts are the TextPreparer's, so that training and inference cannot differ"
        task: InputType | None = options.get("task")
        input_ids, mask = pad(self.preparer.prepare(list(inputs), task).ids)
        return {"input_ids": input_ids, "attention_mask": mask}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        alone = self.side == "query" and features.get("task") == "document"
        with self.model.disable_adapter() if alone else nullcontext():
            output = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        hidden = output.last_hidden_state
        if alone and self.training:
            hidden = hidden.detach().requires_grad_()  # the cached losses call backward on every column
        features["token_embeddings"] = hidden
        return features

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode)
        if mode:
            train_adapters_only(self.model)
            self.model.training = True  # an evaluation between two steps looks here whether there is dropout to switch off
        return self

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters are published by embedft.training.publish")


def sentence_transformer(model: Any, folder: Path, settings: EncodeSettings, *, hidden_size: int, side: str) -> SentenceTransformer:
    """The adapted model as sentence-transformers sees it; `folder` is the base's, for its tokenizer."""
    modules: list[Any] = [Tower(model, TextPreparer(folder, settings), side=side), Pooling(hidden_size, settings.pooling)]
    if settings.normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device=str(next(model.parameters()).device))


class Unadapted(nn.Module):
    """The same model with its adapter switched off, as a guide: what the base itself says of the same features."""

    def __init__(self, model: SentenceTransformer, tokenizer: Any) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # no submodule: it is trained elsewhere
        self.tokenizer: Any = tokenizer
        self.max_seq_length = 0
        model.tokenizer, model.max_seq_length = tokenizer, 0  # pyright: ignore

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tower: Any = self.model
        with torch.no_grad(), tower[0].model.disable_adapter():
            return tower(features)


class PairTrainer(AdapterCheckpoints, SentenceTransformerTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """sentence-transformers' trainer with our batches, adapter-only checkpoints and no model card of its own."""

    def __init__(self, *args: Any, plan: BatchPlan, **kwargs: Any) -> None:
        self.plan = plan
        super().__init__(*args, **kwargs)

    def get_batch_sampler(self, *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.plan

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Its card asks the hub for data sets; ours is written at publication."""
