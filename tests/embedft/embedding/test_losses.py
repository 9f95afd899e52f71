"""Every loss trains, and those that are one loss twice give one gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch

from embedft.base import BaseSpec, load_base
from embedft.embedding.losses import LOSSES
from tests.embedft.embedding.runs import PACKED, PADDED, Make
from tests.fixtures_embedding import another, planted_rows, write_rows


@pytest.mark.parametrize(
    ("name", "adapter", "dimensions"),
    [(name, PACKED, ()) for name in LOSSES]
    + [(name, PADDED, ()) for name in ("cached_mnrl", "gist", "kl")]
    + [(name, PACKED, (16, 32)) for name in LOSSES]
    + [("cached_mnrl", PADDED, (32,))],
)
def test_each_loss_falls_while_it_trains(
    name: str, adapter: dict[str, Any], dimensions: tuple[int, ...], make: Make, beir: str, root: Path, tmp_path: Path
) -> None:
    from embedft.embedding.batches import BatchPlan
    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, settings_for
    from embedft.methods import attach

    scored, taught, rows = LOSSES[name].takes == "scored", LOSSES[name].takes == "distilled", planted_rows(96)
    triplets: list[dict[str, Any]] = [
        row | {"negative": rows[another(i)]["document"]} | ({"scores": [9.0, -3.0]} if taught else {}) for i, row in enumerate(rows)
    ]
    pairs: list[dict[str, Any]] = [
        {"query": r["query"], "document": r[key], "score": float(key == "document")} for r in triplets for key in ("document", "negative")
    ]
    recipe = make(
        data={"train": write_rows(root / f"{name}.jsonl", pairs if scored else triplets), "eval": beir},
        loss={"name": name, "dimensions": dimensions},
        adapter=adapter,
        train={"lr": 3e-3 if dimensions else 1e-2},  # several losses at once: their gradients add up
    )
    examples, _ = load_data(recipe.data, recipe.eval, scored=scored, taught=taught)
    assert (examples.rows[0].score is not None) == scored
    base = load_base(BaseSpec(recipe.base.model), task="embedding")
    plan = BatchPlan(examples, batch=16, seed=7, exclusive=not scored)
    torch.manual_seed(0)  # else it begins from what the tests before it left
    model = attach(base, recipe.adapter, task="embedding")
    trainer = make_trainer(model, base, settings_for(recipe, base), examples, recipe, plan=plan, output=tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) >= 3
    assert losses[-1] < 0.9 * losses[0]


def exact_losses(scale: float, y: torch.Tensor, scores: torch.Tensor, q: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> dict[str, Any]:
    """By the formulas in the table; `y` (b,) and `scores` (b, 2) are what scored and distilled losses take."""
    q, p, n = (torch.nn.functional.normalize(part, dim=1) for part in (q, p, n))
    rows, entropy = torch.arange(len(q)), torch.nn.functional.cross_entropy
    near, far = (q * p).sum(1), (q * n).sum(1)
    forth = entropy(scale * q @ torch.cat([p, n]).T, rows)
    higher = y[:, None] > y[None, :]
    apart = torch.eye(len(q)).bool()
    alike = [q @ p.T, (q @ q.T).masked_fill(apart, -torch.inf), (p @ p.T).masked_fill(apart, -torch.inf), q @ n.T]
    above = [part > near[:, None] + 1e-6 for part in alike]  # of a guide that says what the model says
    kept = torch.cat([part.masked_fill(over, -torch.inf) for part, over in zip(alike, above, strict=True)], dim=1)
    wanted, made = scores.softmax(1), (scale * torch.stack([near, far], dim=1)).log_softmax(1)
    return {
        "mnrl": forth,
        "symmetric": (forth + entropy(scale * p @ q.T, rows)) / 2,
        "gist": entropy(scale * kept, rows),
        "triplet": (far - near + 0.2).clamp(min=0).mean(),
        "cosent": torch.log1p(torch.exp(scale * (near[None, :] - near[:, None]))[higher].sum()),
        "margin_mse": (scale * (near - far) - (scores[:, 0] - scores[:, 1])).square().mean(),
        "kl": (wanted * (wanted.log() - made)).sum(1).mean(),
    }


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", ["mnrl", "symmetric", "gist", "triplet", "cosent", "margin_mse", "kl"])
def test_each_loss_is_the_formula_of_its_paper_at_any_scale(name: str, scale: float, bases: dict[str, str]) -> None:
    from embedft.embedding.fast import Given

    torch.manual_seed(4)
    parts = [torch.randn(5, 64) for _ in range(3)]
    parts[1] += 0.3 * parts[0]
    y, scores = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.7]), torch.randn(5, 2)
    takes, tokenizer = LOSSES[name].takes, load_base(BaseSpec(bases["mean"]), task="embedding").tokenizer
    given, guide = (Given(64, tokenizer, key=key) for key in ("vectors", "guide"))
    features = [{"vectors": part, "guide": part} for part in parts[: 2 if takes == "scored" else 3]]
    labels = {"scored": y, "distilled": scores}.get(takes)
    made = LOSSES[name].build(given, scale=scale, guide=guide)(features, labels)
    assert float(made) == pytest.approx(float(exact_losses(scale, y, scores, *parts)[name]), rel=1e-4)


def test_a_loss_of_several_lengths_is_the_sum_of_each_lengths_own(bases: dict[str, str]) -> None:
    from embedft.embedding.fast import Given

    torch.manual_seed(4)
    parts = [torch.randn(5, 64) for _ in range(2)]
    given = Given(64, load_base(BaseSpec(bases["mean"]), task="embedding").tokenizer)

    def loss(width: int, *dimensions: int) -> float:
        built = LOSSES["mnrl"].build(given, scale=20.0, dimensions=dimensions)
        return float(built([{"vectors": part[:, :width]} for part in parts], None))

    assert loss(64, 16, 32, 16) == pytest.approx(loss(64) + loss(32) + loss(16), rel=1e-4)


def test_gradients_of_the_cached_loss_are_those_of_the_plain_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedft.embedding.data import load_data
    from embedft.embedding.train import make_trainer, plan_for, settings_for
    from embedft.methods import attach

    monkeypatch.setattr("embedft.embedding.losses.MINI_BATCH", 3)
    found: list[dict[str, torch.Tensor]] = []
    for name in ("mnrl", "cached_mnrl"):
        recipe = make(loss={"name": name})
        examples, _ = load_data(recipe.data, recipe.eval, scored=False)
        base = load_base(BaseSpec(recipe.base.model), task="embedding")
        torch.manual_seed(1)
        model = attach(base, recipe.adapter, task="embedding")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        plan = plan_for(examples, recipe, loss=LOSSES[name], model=model)
        trainer = make_trainer(model, base, settings_for(recipe, base), examples, recipe, plan=plan, output=tmp_path)
        trainer.compute_loss(trainer.model, {"rows": torch.arange(16)}).backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert gradient.norm() > 0
        assert (gradient - found[1][key]).norm() <= 1e-6 * gradient.norm(), key
