"""Where an adapter begins: directions of the weights, of the inputs, of what quantization lost; and what is published of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.errors import AdapterInvalid
from embedft.methods import attach, save_weights
from embedft.methods.companion import lora_layers, padded, plain_pairs
from embedft.methods.starts import dequantized, original_weights
from tests.embedft.methods.cells import cell, trained


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loftq_comes_closer_to_the_full_weights_than_the_quantized_base(llama: Path, tmp_path: Path, quantization: str) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "loftq", quantization)
    weight_of, pairs = original_weights(made.base), plain_pairs(made.model)
    for name, layer in lora_layers(made.model):
        lost = weight_of(name) - dequantized(layer.get_base_layer())
        best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        left = (lost - pairs[name][1] @ pairs[name][0]).norm()
        assert float(left) == pytest.approx(float(best), rel=1e-3)
        assert left < lost.norm()


def test_loftq_takes_what_there_is_of_a_layer_with_fewer_directions_than_its_rank(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "loftq", "nf4", adapter={"r": 96})
    weight_of, pairs = original_weights(made.base), plain_pairs(made.model)
    for name, layer in lora_layers(made.model):
        lost = weight_of(name) - dequantized(layer.get_base_layer())
        if min(lost.shape) <= 96:
            assert (lost - pairs[name][1] @ pairs[name][0]).norm() < 1e-3 * lost.norm()


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_start_that_would_edit_the_base_is_published_as_plain_lora_of_twice_the_rank(llama: Path, tmp_path: Path, method: str) -> None:
    import torch
    from peft import PeftConfig

    from embedft.base import load_model

    made = cell(tmp_path, llama, "causal_lm", method, "none")
    a, b = next(iter((layer.lora_A["default"].weight, layer.lora_B["default"].weight) for _, layer in lora_layers(made.model)))
    weight = next(lora_layers(made.model))[1].get_base_layer().weight
    if method == "pissa":  # the principal part of W
        assert float((2.0 * b @ a).norm()) == pytest.approx(float(torch.linalg.svdvals(weight)[:4].square().sum().sqrt()), rel=1e-4)
    else:  # B's columns are orthonormal
        assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-4)
    model = trained(made)
    save_weights(model, tmp_path / "adapter", base_name="tiny")
    config: Any = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 8, True)
    from peft import PeftModel

    plain: Any = load_model(made.base.folder, task="causal_lm")
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))  # plain PEFT, none of our code
    assert torch.allclose(made.outputs(loaded), made.outputs(model), atol=1e-4)


def test_eva_begins_with_orthonormal_directions_of_the_inputs(llama: Path, tmp_path: Path) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "eva", "nf4")
    for _, layer in lora_layers(made.model):
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-3)


def test_evas_rho_lets_ranks_go_from_layer_to_layer(llama: Path, tmp_path: Path) -> None:
    ranks = []
    for rho in (1.0, 2.0):
        layers = lora_layers(cell(tmp_path, llama, "causal_lm", "eva", "none", options={"rho": rho}).model)
        ranks.append({name: len(layer.lora_A["default"].weight) for name, layer in layers})
    assert set(ranks[0].values()) == {4}
    assert max(ranks[1].values()) > 4
    assert sum(ranks[1].values()) <= sum(ranks[0].values()), "what one layer gets another gives up"


def test_how_an_adapter_began_is_not_published(llama: Path, tmp_path: Path) -> None:
    """It changes nothing that is served, and vLLM refuses the name."""
    made = cell(tmp_path, llama, "causal_lm", "eva", "none")
    save_weights(made.model, tmp_path / "adapter", base_name="tiny")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["eva_config"]) == (True, None)


def test_a_folder_of_others_that_names_its_start_rewrites_no_weight_of_the_base_and_one_that_needs_that_is_refused(
    llama: Path, tmp_path: Path
) -> None:
    import torch

    from embedft.base import load_model
    from embedft.methods import load_adapter

    made = cell(tmp_path, llama, "causal_lm", "lora", "none")
    save_weights(trained(made), tmp_path / "adapter", base_name="tiny")
    path = tmp_path / "adapter" / "adapter_config.json"
    for harmless in ("gaussian", "orthogonal", "mica"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": harmless}))
        loaded: Any = load_adapter(load_model(made.base.folder, task="causal_lm"), tmp_path / "adapter")
        assert torch.equal(made.outputs(loaded), made.outputs(made.model))
        with loaded.disable_adapter():
            assert torch.equal(made.outputs(loaded), made.before)
    for start in ("pissa_niter_4", "corda"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
        with pytest.raises(AdapterInvalid, match=f"{start} starts from a changed base"):
            load_adapter(load_model(made.base.folder, task="causal_lm"), tmp_path / "adapter")


def test_eva_without_data_is_refused(llama: Path) -> None:
    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection

    with pytest.raises(MethodUnsupported, match="batches of the training data"):
        attach(load_base(BaseSpec(str(llama)), task="causal_lm"), AdapterSection(method="eva"), task="causal_lm")


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_start_from_a_layers_directions_is_refused_by_the_layer_that_has_fewer(llama: Path, method: str) -> None:
    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection

    with pytest.raises(MethodUnsupported, match=r"the 65 greatest directions of .*[kv]_proj, which has 64"):
        attach(load_base(BaseSpec(str(llama)), task="causal_lm"), AdapterSection(method=method, r=65), task="causal_lm")
    attach(load_base(BaseSpec(str(llama)), task="causal_lm"), AdapterSection(r=65), task="causal_lm")  # which begins from nothing


def test_pairs_of_unequal_ranks_are_filled_up_to_one_and_stay_what_they_were() -> None:
    import torch

    pairs = {f"layer{rank}": (torch.randn(rank, 6), torch.randn(5, rank)) for rank in (1, 3, 2)}
    filled = padded(pairs)
    assert {(tuple(a.shape), tuple(b.shape)) for a, b in filled.values()} == {((3, 6), (5, 3))}
    assert all(torch.allclose(filled[name][1] @ filled[name][0], b @ a) for name, (a, b) in pairs.items())


def test_a_prompt_begins_as_the_text_that_was_given(llama: Path, tmp_path: Path) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "prompt_tuning", "none", options={"text": "red mean"})
    ids = made.base.tokenizer("red mean", add_special_tokens=False)["input_ids"]
    words = made.base.model.get_input_embeddings()(torch.tensor((ids * 4)[:4]))
    assert torch.equal(made.model.get_prompt(batch_size=1)[0], words)


def test_pissas_iterations_look_for_its_directions_by_chance_and_find_nearly_the_same(llama: Path, tmp_path: Path) -> None:
    import torch

    def products(iterations: int, seed: int) -> list[Any]:
        from embedft.base import BaseSpec, load_base
        from embedft.recipe import AdapterSection

        torch.manual_seed(seed)
        section = AdapterSection(method="pissa", r=4, options={"iterations": iterations})
        model: Any = attach(load_base(BaseSpec(str(llama)), task="causal_lm"), section, task="causal_lm")
        return [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for _, layer in lora_layers(model)]

    exact, again = products(0, 1), products(0, 2)
    one, other = products(4, 1), products(4, 2)
    assert all(torch.equal(*pair) for pair in zip(exact, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    for near, true in zip(one, exact, strict=True):
        assert float(near.norm()) == pytest.approx(float(true.norm()), rel=0.1)
