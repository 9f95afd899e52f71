"""One cell of the matrix: a method on a quantization of a tiny base, attached, trained by the real trainer, judged."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedft.base import Base, BaseSpec, compute_dtype, load_base
from embedft.methods import METHODS, attach
from embedft.recipe import parse_recipe
from tests import fixtures_embedding, fixtures_lm

STEPS = 8
RATES = {"vera": 0.1, "ia3": 0.1, "prefix_tuning": 0.1, "p_tuning": 0.02, "prompt_tuning": 0.3, "multitask_prompt_tuning": 0.3}
RATES |= {"llama_adapter": 0.1, "full": 2e-3, "adalora": 0.05, "lora_plus": 1e-3, "eva": 3e-3, "lokr": 0.05, "lora_fa": 0.02}


WHOLE = os.environ.get("EMBEDFT_MATRIX") == "whole"  # `make test-matrix`: every cell, some minutes; else one of each kind
QUANTIZED = {"qlora": "nf4", "llm_int8": "int8", "loftq": "nf4"}  # what a method is for


def same(one: Any, other: Any, bound: float) -> bool:
    """Equal to `bound` everywhere; computed in bf16, within 3 % of the norm: a deep sum in another order."""
    if compute_dtype() is torch.float32:
        return float((one - other).abs().max()) < bound
    return float((one - other).norm()) <= 3e-2 * float(other.norm())


@dataclass
class Cell:
    """`outputs(model)` are logits or vectors on fixed inputs, and `loss(model)` what training lowers."""

    base: Base
    model: Any
    trainer: Any
    outputs: Callable[[Any], Any]
    loss: Callable[[Any], float]
    before: Any = None
    held: "Counter[str]" = field(default_factory=Counter)


def tensors_of(model: Any) -> "Counter[str]":
    """A hash of each tensor that the model holds, quantization states too."""
    found = [*model.parameters(), *model.buffers()]
    for parameter in list(found):
        state = getattr(parameter, "quant_state", None)
        found += [state.absmax, state.state2.absmax] if state is not None else []
        found += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    return Counter(
        hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for tensor in found
    )


def small(method: str, r: int = 4) -> dict[str, Any]:
    """`adapter` of a recipe: of that rank, where the method has one."""
    return {"method": method} | ({"r": r} if method not in METHODS or METHODS[method].rank else {})


def cell(folder: Path, base: Path, task: str, method: str, quantization: str, **settings: Any) -> Cell:
    """The adapter attached and its trainer made; nothing trained yet. Raises what `attach` raises."""
    loaded = load_base(BaseSpec(str(base), quantization), task=task)  # type: ignore[arg-type]
    make = _lm if task == "causal_lm" else _embedding
    options = settings.pop("options", {})
    adapter = small(method) | {"options": options} | settings.pop("adapter", {})
    train = {"batch": 12, "lr": RATES.get(method, 0.02), "max_length": 48, "max_steps": STEPS, "warmup": 0.0, "schedule": "constant"}
    torch.manual_seed(7)
    return make(folder, loaded, adapter, train | settings)


def _lm(folder: Path, base: Base, adapter: dict[str, Any], train: dict[str, Any]) -> Cell:
    from embedft.causal_lm.batches import Collate
    from embedft.causal_lm.template import template_of
    from embedft.causal_lm.train import build_trainer, read_split, tokenized

    data = {"train": str(fixtures_lm.write_jsonl(folder / "train.jsonl", fixtures_lm.planted_rows(60)))}
    content = {"task": "causal_lm", "name": "c", "base": {"model": base.spec.model}, "adapter": adapter, "data": data, "train": train}
    recipe: Any = parse_recipe(content)
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)
    collate = Collate(base.tokenizer.pad_token_id, base.model.dtype)
    fixed = collate(examples[:12])

    def outputs(model: Any) -> Any:
        model.eval()
        with torch.no_grad():
            return model(**{key: value for key, value in fixed.items() if key != "labels"}).logits.float()

    def loss(model: Any) -> float:
        model.eval()
        with torch.no_grad():
            return float(model(**fixed).loss)

    before, held = outputs(base.model), tensors_of(base.model)
    model = attach(base, recipe.adapter, task="causal_lm", batches=[collate(examples[:24])])
    trainer = build_trainer(model, base, examples, recipe.train, folder=folder / "run")
    return Cell(base, model, trainer, outputs, loss, before, held)


def _embedding(folder: Path, base: Base, adapter: dict[str, Any], train: dict[str, Any]) -> Cell:
    from embedft.embedding.batches import BatchPlan
    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, settings_for
    from embedft.encode import Encoder, pad

    data = {"train": fixtures_embedding.write_rows(folder / "train.jsonl", fixtures_embedding.planted_rows(96))}
    content = {"task": "embedding", "name": "c", "base": {"model": base.spec.model}, "adapter": adapter, "data": data, "train": train}
    recipe: Any = parse_recipe(content)
    examples, _ = load_data(recipe.data, recipe.eval, scored=False)
    settings = settings_for(recipe, base)
    rows = fixtures_embedding.planted_rows(16)
    texts = [row["query"] for row in rows], [row["document"] for row in rows]

    def outputs(model: Any) -> Any:
        model.eval()
        return torch.tensor(Encoder(model, base.folder, settings).encode(texts[0] + texts[1][:3]))

    def loss(model: Any) -> float:
        model.eval()
        queries, documents = (torch.tensor(Encoder(model, base.folder, settings).encode(side)) for side in texts)
        return float(torch.nn.functional.cross_entropy(20 * queries @ documents.T, torch.arange(len(queries))))

    before, held = outputs(base.model), tensors_of(base.model)
    ids, mask = pad(Encoder(None, base.folder, settings).preparer.prepare(texts[0]).ids)
    model = attach(base, recipe.adapter, task="embedding", batches=[{"input_ids": ids, "attention_mask": mask}])
    plan = BatchPlan(examples, batch=recipe.train.batch, seed=7, exclusive=True)
    trainer = make_trainer(model, base, settings, examples, recipe, plan=plan, output=folder / "run")
    return Cell(base, model, trainer, outputs, loss, before, held)


def trained(made: Any) -> Any:
    """The cell's model, after its run."""
    made.trainer.train()
    return made.model


def weights(model: Any, part: str) -> dict[str, Any]:
    """Copies of the parameters with `part` in their name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if part in name}
