"""Publishing, verifying, converting and merging, for every method of the table."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.passport import read_passport
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder, load_model
from embedft.convert import CERTIFICATE, convert
from embedft.errors import AdapterInvalid, BaseMismatch, MethodUnsupported, ProbesFailed, UsageError
from embedft.merge import combine, merge
from embedft.methods import METHODS, load_adapter
from embedft.methods.companion import lora_layers
from embedft.recipe import EmbeddingAdapterSection
from embedft.verify import verify
from serve.proving import import_unproven
from tests.embedft import adapter_fixtures
from tests.embedft.methods.cells import WHOLE
from tests.embedft.methods.published import published
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter

QUANTIZED = {"qlora": "nf4", "llm_int8": "int8", "loftq": "nf4"}
# Methods whose files are laid out alike are one another's tests; with WHOLE every method.
ALIKE = {"rslora", "eva", "lora_plus", "lora_fa", "llm_int8", "olora", "p_tuning", "multitask_prompt_tuning"}
CHOSEN = [name for name in METHODS if WHOLE or name not in ALIKE]
Made = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Method → (adapter folder, folder of its base), filled as tests ask."""
    return {}


@pytest.fixture
def adapter(made: Made, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(method: str, quantization: str | None = None, **settings: Any) -> tuple[Path, Path]:
        quantization = quantization or QUANTIZED.get(method, "none")
        key = f"{method} {quantization} {settings}"
        if key not in made:
            folder = published(tmp_path_factory.mktemp("a"), bases["causal_lm"], method, quantization, **settings)
            made[key] = folder, base_folder(BaseSpec(str(bases["causal_lm"]), quantization))
        return made[key]

    return of


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(range(40, 60))])).logits


@pytest.mark.parametrize("method", CHOSEN)
def test_what_is_published_passes_its_probes_and_without_a_part_of_it_does_not(adapter: Any, method: str) -> None:
    folder, base = adapter(method)
    report = verify(folder, base=base)
    assert report.passed, report.reason
    assert report.error < 1e-3
    passport = read_passport(folder)
    assert passport.probes is not None
    assert passport.probes.sensitivity
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" or not METHODS[method].vllm
    if config["peft_type"] == "LORA":
        assert passport.r == config["r"]


@pytest.mark.parametrize("method", CHOSEN)
def test_conversion_gives_plain_lora_or_is_refused_as_the_table_says(adapter: Any, method: str, tmp_path: Path) -> None:
    import torch

    folder, base = adapter(method)
    row = METHODS[method]
    if row.to_lora == "no":
        with pytest.raises(MethodUnsupported, match="serve it by the peft engine"):
            convert(folder, tmp_path / "out", name="x", base=base)
        return
    certificate = convert(folder, tmp_path / "out", name="x", base=base, rank=None if row.to_lora != "approximate" else 128)
    passport = read_passport(tmp_path / "out")
    assert (passport.method, passport.name, passport.r) == ("lora", "x", certificate.rank)
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["exact_rank"] == certificate.exact_rank
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"adapter": "x"' in card
    assert f"| Method | lora, r={certificate.rank}" in card
    original, plain = (load_adapter(load_model(base, task="causal_lm"), each) for each in (folder, tmp_path / "out"))
    assert certificate.exact
    assert certificate.error < 1e-4
    # AdaLoRA's and LoHa's own ranks bound what a copy needs; DoRA's and LoKr's do not
    bound = {"adalora": 6, "loha": 16, "vera": 4, "relora": 12, "delta_lora": 8, "pissa": 8, "olora": 8}
    if row.to_lora != "approximate":
        assert certificate.exact_rank <= bound.get(method, 4)
    else:
        assert certificate.exact_rank > 16
    error = torch.linalg.vector_norm(logits(original) - logits(plain)) / torch.linalg.vector_norm(logits(original))
    assert error < 1e-2


def test_a_rank_too_small_fails_the_probes_and_says_what_to_do(adapter: Any, tmp_path: Path) -> None:
    folder, base = adapter("lokr")
    with pytest.raises(ProbesFailed, match="give a higher --rank, or serve it by the peft engine"):
        convert(folder, tmp_path / "out", name="x", base=base, rank=1)


def test_the_certificate_tells_what_a_smaller_rank_lost(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = adapter("lora", r=8)
    exact = convert(folder, tmp_path / "exact", name="x", base=base)
    smaller = convert(folder, tmp_path / "small", name="x", base=base, rank=exact.exact_rank - 1)
    assert (smaller.exact, exact.exact) == (False, True)
    assert exact.error < 1e-4 < smaller.error
    assert exact.probes < smaller.probes <= smaller.tolerance
    monkeypatch.setattr("embedft.convert.MAX_RANK", exact.exact_rank - 1)
    assert convert(folder, tmp_path / "bounded", name="x", base=base).rank == smaller.rank, "no more than a server takes"
    assert convert(folder, tmp_path / "asked", name="x", base=base, rank=exact.exact_rank).exact, "unless it is asked for"


@pytest.mark.parametrize(("method", "quantization"), [(name, "none") for name in CHOSEN if name not in QUANTIZED] + [("qlora", "nf4")])
def test_merging_writes_a_model_that_answers_as_the_adapter_does(
    adapter: Any, bases: dict[str, Path], method: str, quantization: str, tmp_path: Path
) -> None:
    import torch

    folder, base = adapter(method, quantization)
    if not METHODS[method].merges:
        with pytest.raises(MethodUnsupported, match="no change of weights"):
            merge(folder, tmp_path / "out", base=bases["causal_lm"])
        return
    merged = merge(folder, tmp_path / "out", base=bases["causal_lm"])
    model = load_model(tmp_path / "out", task="causal_lm")
    if quantization == "none":
        assert torch.allclose(logits(model), logits(load_adapter(load_model(base, task="causal_lm"), folder)), atol=1e-3)
        assert merged.error < 1e-3
    else:  # what it was trained to make good is no longer there
        assert 1e-3 < merged.error < 1


@pytest.mark.parametrize("quantization", ["nf4", "int8", "w8a8"])
def test_a_base_that_came_quantized_is_merged_as_the_weights_that_it_stands_for(adapter: Any, quantization: str, tmp_path: Path) -> None:
    import torch

    from embedft.model_folder import describe

    folder, base = adapter("lora", quantization)
    assert merge(folder, tmp_path / "out", base=base).error < 0.02, "NF4's scales are in bf16, and so are the weights made of them"
    assert describe(tmp_path / "out").quantization == "none"
    merged, apart = load_model(tmp_path / "out", task="causal_lm"), load_adapter(load_model(base, task="causal_lm"), folder)
    assert torch.dist(logits(merged), logits(apart)) < 0.02 * logits(apart).norm()


def test_an_adapted_head_is_merged_beside_the_input_embedding_that_it_shared(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = published(tmp_path / "head", bases["causal_lm"], "lora", targets=["lm_head"])
    assert merge(folder, tmp_path / "out", base=bases["causal_lm"]).error < 1e-3
    model = load_model(tmp_path / "out", task="causal_lm")
    assert not model.config.tie_word_embeddings


def test_a_merged_model_can_be_quantized_and_holds_its_tokenizer(adapter: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    from embedft.model_folder import describe

    folder, _ = adapter("lora")
    merge(folder, tmp_path / "out", base=bases["causal_lm"], scheme="nf4")
    assert describe(tmp_path / "out").quantization == "nf4"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(UsageError, match="not empty"):
        merge(folder, tmp_path / "out", base=bases["causal_lm"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        merge(folder, tmp_path / "file", base=bases["causal_lm"])


def test_nothing_is_merged_into_another_base_of_the_same_shapes(adapter: Any, tmp_path: Path) -> None:
    folder, _ = adapter("lora")
    with pytest.raises(BaseMismatch):
        merge(folder, tmp_path / "out", base=tiny_llama(tmp_path / "other", layers=1, seed=5))
    assert not (tmp_path / "out").exists()


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
    given: Any = {"weights": weights, "how": how, "density": 0.3, "rank": rank, "base": base}
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


def imported(folder: Path, base: Path, **features: Any) -> Path:
    """An adapter that PEFT itself made, with the passport and probes of an import."""
    store = AdapterStore(folder / "store")
    import_unproven(store, featured_adapter(folder / "made", base, seed=3, **features), name="theirs", base=str(base), task="causal_lm")
    return store.folder("theirs")


@pytest.mark.parametrize(
    ("features", "match"),
    [
        ({"bias": "lora_only"}, r"'theirs' cannot be used: it changes biases of the base too \(bias: lora_only\)"),
        ({"modules_to_save": ["lm_head"]}, r"more than weights of linear layers \(modules_to_save: lm_head\)"),
        ({"trainable_token_indices": [5, 6]}, r"trainable_token_indices: 5, 6"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters: mlp.up_proj.weight"),
    ],
)
def test_what_a_lora_would_lose_of_an_adapter_keeps_it_from_becoming_one(
    bases: dict[str, Path], tmp_path: Path, features: dict[str, Any], match: str
) -> None:
    base = bases["causal_lm"]
    folder = imported(tmp_path, base, **features)
    with pytest.raises(AdapterInvalid, match=match):
        convert(folder, tmp_path / "lora", name="x", base=base)
    with pytest.raises(AdapterInvalid, match=match):
        combine([folder, folder], tmp_path / "sum", name="x", weights=[1, 1], base=base)


def test_of_chosen_layers_those_are_converted(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", layers=2)
    folder = imported(tmp_path, base, layers_to_transform=[1], exclude_modules=["o_proj"])
    assert convert(folder, tmp_path / "out", name="x", base=base).exact
    original, plain = (load_adapter(load_model(base, task="causal_lm"), each) for each in (folder, tmp_path / "out"))
    assert [name for name, _ in lora_layers(original)] == [name for name, _ in lora_layers(plain)]


def test_what_peft_cannot_merge_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = imported(tmp_path, bases["causal_lm"], lora_bias=True)
    with pytest.raises(AdapterInvalid, match=r"'theirs' cannot be used: PEFT cannot write it into the base's weights \(.*bias"):
        merge(folder, tmp_path / "merged", base=bases["causal_lm"])


def test_the_command_line_converts_merges_and_combines(adapter: Any, bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from embedft.adapters.transfer import import_folder
    from embedft.cli import main

    folder, base = adapter("vera")
    import_folder(AdapterStore(tmp_path / "store"), folder, name="vera")
    common = ["--adapters", str(tmp_path / "store"), "--base", str(base), "--json"]
    assert main(["adapters", "convert", "vera", "--to", "lora", *common]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["exact"]) == ("vera-lora", True)
    assert main(["adapters", "combine", "double", "vera-lora", "vera-lora", "--weights", "1", "1", *common]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == 2 * said["rank"]
    assert main(["adapters", "merge", "vera-lora", str(tmp_path / "merged"), *common]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert sorted(AdapterStore(tmp_path / "store").names()) == ["double", "vera", "vera-lora"]
