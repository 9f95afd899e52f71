"""Sums of adapters: what each way of combining is by its paper, and what is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.passport import read_passport
from embedft.base import BaseSpec, base_folder, load_model
from embedft.convert import CERTIFICATE
from embedft.errors import AdapterInvalid, UsageError
from embedft.merge import combine
from embedft.methods import load_adapter
from embedft.methods.companion import lora_layers
from embedft.recipe import EmbeddingAdapterSection
from embedft.verify import verify
from tests.embedft import adapter_fixtures
from tests.fixtures_embedding import tiny_encoder

Parts = list[tuple[Any, float]]  # tensors of one shape and their weights


def weighted(parts: Parts) -> Any:
    return sum(weight * part for part, weight in parts)


def largest(part: Any, density: float) -> Any:
    least = part.abs().flatten().sort(descending=True).values[int(density * part.numel()) - 1]
    return part * (part.abs() >= least)


def of_most(parts: Parts) -> Any:
    """TIES after the trimming: of each number the mean over the parts whose sign has the greater mass."""
    import torch

    stacked, weights = torch.stack([part for part, _ in parts]), torch.tensor([weight for _, weight in parts])
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == sign
    return (stacked * weights[:, None, None] * agree).sum(0) / agree.sum(0).clamp(min=1)


def is_drawn(made: Any, parts: Parts, density: float, summed: Any) -> bool:
    """Whether each number is what it may be: the sum of those parts, scaled, that happened to keep it. About as many are kept as should."""
    import torch

    scaled = [part / density for part, _ in parts]
    choices = [
        summed([(part * kept, weight) for part, kept, (_, weight) in zip(scaled, which, parts, strict=True)])
        for which in itertools.product((0, 1), repeat=len(parts))
    ]
    share, wanted = (made.abs() > 1e-7).float().mean(), 1 - (1 - density) ** len(parts)
    return bool(torch.isclose(made, torch.stack(choices), atol=1e-5).any(0).all()) and abs(share - wanted) < 0.15


SUMS: dict[str, Any] = {
    "cat": lambda parts: weighted(parts),
    "svd": lambda parts: weighted(parts),
    "linear": lambda parts: weighted(parts),
    "ties": lambda parts: of_most([(largest(part, 0.3), weight) for part, weight in parts]),
}
DRAWN: dict[str, Any] = {"dare_linear": weighted, "dare_ties": of_most}


@pytest.mark.parametrize("how", [*SUMS, *DRAWN, "ties_svd", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.parametrize("methods", [("lora", "rslora"), ("rslora", "lora")])
def test_combining_adds_the_adapters_updates_as_it_says(adapter: Any, tmp_path: Path, how: str, methods: tuple[str, str]) -> None:
    """cat the very updates, svd the nearest of a rank, _svd by the methods' papers, the others A and B apart, a weight's root on each."""
    import torch

    from embedft.convert import deltas, truncated

    parts, weights = [adapter(method, r=4) for method in methods], [1.0, -0.5]
    base, of = parts[0][1], how.removesuffix("_svd")
    rank = {"cat": 8, "dare_linear_svd": 64, "dare_ties_svd": 64}.get(how, 4)  # of full rank a matrix is what was drawn
    folders = [*(folder for folder, _ in parts), tmp_path / "out"]
    given: Any = {"weights": weights, "how": how, "base": base}
    given |= {"rank": rank} if how.endswith("svd") else {}
    given |= {"density": 0.3} if how.startswith(("ties", "dare")) else {}
    assert combine(folders[:2], folders[2], name="both", **given).r == rank
    assert verify(folders[2], base=base).passed
    models = [load_adapter(load_model(base, task="causal_lm"), folder) for folder in folders]
    updates = [deltas(model) for model in models]

    def right(made: Any, parts: Parts) -> bool:
        return is_drawn(made, parts, 0.3, DRAWN[of]) if of in DRAWN else torch.allclose(made, SUMS[of](parts), atol=1e-5)

    for name, both in updates[2].items():
        if how in {"svd", "ties_svd"}:
            a, b = truncated(SUMS[of]([(updates[0][name], 1.0), (updates[1][name], -0.5)]), rank)
            assert torch.allclose(both, b @ a, atol=1e-5), name
        elif how.endswith("svd") and min(both.shape) > rank:
            assert min(updates[2]["model.layers.0.self_attn.k_proj"].shape) == rank  # that one is looked at
        elif how == "cat" or how.endswith("svd"):
            assert right(both, [(updates[0][name], 1.0), (updates[1][name], -0.5)]), name
        else:
            layers = [dict(lora_layers(model))[name] for model in models]
            roots = [(abs(weight) * layer.scaling["default"]) ** 0.5 for weight, layer in zip(weights, layers, strict=False)]
            pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
            (a, b), (other_a, other_b), (made_a, made_b) = pairs
            assert right(made_a, [(a, roots[0]), (other_a, -roots[1])]), name
            assert right(made_b, [(b, roots[0]), (other_b, roots[1])]), name


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties_svd"])
def test_what_dare_keeps_is_the_same_each_time_by_one_seed(adapter: Any, tmp_path: Path, how: Any) -> None:
    folder, base = adapter("lora", r=4)
    made = {name: combine([folder] * 2, tmp_path / name, name=name, weights=[1, 1], how=how, seed=seed, base=base) for name, seed in
            (("one", 1), ("again", 1), ("two", 2))}  # fmt: skip
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in made}
    assert weights["one"] == weights["again"] != weights["two"]
    said = made["one"].metrics["combined"]
    assert (said["density"], said["seed"]) == (0.5, 1)


def test_what_is_combined_claims_no_more_than_each_of_its_parts(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="mean")
    parts = [adapter_fixtures.make_adapter(tmp_path / name, name=name, seed=seed, model=str(base)) for seed, name in enumerate("ab")]
    said: list[dict[str, Any]] = [{"dimensions": (64, 32, 16)}, {"dimensions": (64, 16), "unproven": True}]
    for part, change in zip(parts, said, strict=True):
        read_passport(part).model_copy(update=change).write(part)
    (parts[0] / CERTIFICATE).write_text("{}")
    passport = combine(parts, tmp_path / "out", name="both", weights=[1.0, -0.5], base=base)
    assert (passport.dimensions, passport.unproven) == ((64, 16), True)
    assert not (tmp_path / "out" / CERTIFICATE).exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"adapter": "both"' in card
    assert "The sum of 1 × a, -0.5 × b, by cat. Not evaluated." in card


@pytest.mark.parametrize("order", [1, -1])
def test_combining_keeps_the_layers_of_all_whichever_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    import torch

    from embedft.convert import deltas

    monkeypatch.setattr(adapter_fixtures, "AdapterSection", lambda r: EmbeddingAdapterSection(r=r, layers=2))
    few = adapter_fixtures.make_adapter(tmp_path / "few")
    monkeypatch.undo()
    parts = [few, adapter_fixtures.make_adapter(tmp_path / "all", seed=1)][::order]
    combine(parts, tmp_path / "out", name="both", weights=[1.0, 1.0])
    base = base_folder(BaseSpec("minilm"))
    one, other, both = (deltas(load_adapter(load_model(base, task="embedding"), each)) for each in (*parts, tmp_path / "out"))
    zero = torch.zeros(1)
    assert both.keys() == one.keys() | other.keys()
    assert all(torch.allclose(both[name], one.get(name, zero) + other.get(name, zero), atol=1e-5) for name in both)


@pytest.mark.parametrize(
    "given",
    [
        {"weights": [float("nan"), 1.0]},
        {"weights": [0.0, 0.0]},
        {"weights": [1.0, 1.0], "how": "dare_linear", "density": 0.0},
        {"weights": [1.0, 1.0], "how": "svd", "rank": 65},
    ],
)
def test_weights_and_densities_that_would_leave_no_numbers_are_refused(adapter: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    folder, base = adapter("lora", r=4)
    with pytest.raises(UsageError, match=r"weights|density|rank 65: the smallest layer that they adapt has 64"):
        combine([folder, folder], tmp_path / "out", name="x", base=base, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"how": "cat", "rank": 3}, r"rank 3: cat gives the rank .* use a way that ends in svd"),
        ({"how": "linear", "rank": 4}, "rank 4: linear"),
        ({"how": "svd", "density": 0.3}, "density 0.3: svd keeps all there is"),
        ({"how": "ties", "weights": [1.0, 0.0]}, "weights 1, 0: .* leave that part out"),
        ({"how": "dare_ties_svd", "weights": [0.0, 1.0]}, "weights 0, 1"),
    ],
)
def test_a_setting_that_the_way_does_not_heed_is_refused(adapter: Any, tmp_path: Path, given: dict[str, Any], told: str) -> None:
    folder, base = adapter("lora", r=4)
    given = {"weights": [1.0, 1.0], **given}
    with pytest.raises(UsageError, match=told):
        combine([folder, folder], tmp_path / "out", name="x", base=base, **given)


def test_adapters_that_do_not_belong_together_are_not_combined(adapter: Any, tmp_path: Path) -> None:
    (lora, base), (other, _), (dora, _) = adapter("lora"), adapter("lora", "nf4"), adapter("dora")
    with pytest.raises(AdapterInvalid, match="its base is not that of"):
        combine([lora, other], tmp_path / "out", name="x", weights=[1, 1], base=base)
    with pytest.raises(AdapterInvalid, match="adapters convert dora --to lora"):
        combine([lora, dora], tmp_path / "out", name="x", weights=[1, 1], base=base)
    with pytest.raises(AdapterInvalid, match="ia3 is no plain LoRA: it has no LoRA form"):
        combine([lora, adapter("ia3")[0]], tmp_path / "out", name="x", weights=[1, 1], base=base)
    with pytest.raises(AdapterInvalid, match="'none' cannot be used: it changes nothing"):
        combine([lora, lora], tmp_path / "none", name="none", weights=[1e-30, 1e-30], base=base)
    with pytest.raises(AdapterInvalid, match="'gone' cannot be used: its parts take each other away"):
        combine([lora, lora], tmp_path / "gone", name="gone", weights=[1, -1], base=base)
