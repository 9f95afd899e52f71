"""What makes each method itself, as its paper says."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.errors import AdapterInvalid
from embedft.methods import METHODS, attach, save_weights
from embedft.methods.companion import lora_layers, padded, plain_pairs
from embedft.methods.starts import dequantized, original_weights
from tests.embedft.methods.cells import STEPS, cell, trained, weights
from tests.fixtures_lm import tiny_llama


def rank_of(delta: Any) -> int:
    import torch

    return int((torch.linalg.svdvals(delta) > 1e-5 * torch.linalg.matrix_norm(delta, 2)).sum())


def test_rslora_scales_by_alpha_over_the_root_of_r(llama: Path, tmp_path: Path) -> None:
    scales = {
        method: next(lora_layers(cell(tmp_path, llama, "causal_lm", method, "none").model))[1].scaling for method in ("lora", "rslora")
    }
    assert scales["lora"]["default"] == 8 / 4
    assert scales["rslora"]["default"] == 8 / 4**0.5


@pytest.mark.parametrize("method", ["lora", "ia3", "relora"])
def test_modules_are_named_in_the_same_order_in_every_process(llama: Path, tmp_path: Path, method: str) -> None:
    save_weights(cell(tmp_path, llama, "causal_lm", method, "none").model, tmp_path / "saved", base_name="llama")
    content = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    sets = [content[key] for key in ("target_modules", "feedforward_modules") if key in content]
    assert len(sets[0]) > 2
    assert sets == [sorted(names) for names in sets]


def test_lora_fa_never_moves_a(llama: Path, tmp_path: Path) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "lora_fa", "none")
    before = weights(made.model, "lora_A")
    after = weights(trained(made), "lora_A")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_lora_fa_has_an_optimizer_of_its_own_and_says_so(llama: Path, tmp_path: Path) -> None:
    from embedft.errors import MethodUnsupported

    with pytest.raises(MethodUnsupported, match=r"leave train\.optimizer out"):
        trained(cell(tmp_path, llama, "causal_lm", "lora_fa", "none", optimizer="adamw_8bit"))


def test_lora_plus_learns_b_sixteen_times_as_fast(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "lora_plus", "none")
    trained(made)
    named = {id(value): name for name, value in made.model.named_parameters()}
    rates = {kind: set() for kind in ("lora_A", "lora_B")}
    for group in made.trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[named[id(parameter)].rpartition(".default")[0][-6:]].add(group["lr"])
    assert [len(found) for found in rates.values()] == [1, 1]
    assert rates["lora_B"].pop() == pytest.approx(16 * rates["lora_A"].pop())


@pytest.mark.parametrize("method", ["lora", "lora_plus", "lora_fa"])
def test_every_methods_optimizer_decays_and_learns_as_the_recipe_says(llama: Path, tmp_path: Path, method: str) -> None:
    made = cell(tmp_path, llama, "causal_lm", method, "none", weight_decay=0.125, lr=0.25, max_steps=1)
    trained(made)
    groups = [group for group in made.trainer.optimizer.param_groups if group["params"]]
    assert groups
    assert {group["weight_decay"] for group in groups} == {0.125}
    assert min(group["lr"] for group in groups) == 0.25


def test_vera_shares_a_and_b_and_trains_only_vectors(llama: Path, tmp_path: Path) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "vera", "none")
    layers = [module for module in made.model.modules() if hasattr(module, "vera_lambda_b")]
    assert len({layer.vera_A["default"].data_ptr() for layer in layers}) == 1
    shared = layers[0].vera_A["default"].clone()
    model = trained(made)
    assert torch.equal(layers[0].vera_A["default"], shared)
    assert {value.ndim for _, value in model.named_parameters() if value.requires_grad} == {1}


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


def test_relora_grows_its_rank_past_r(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "relora", "nf4", max_steps=12)
    pairs = plain_pairs(trained(made)).values()
    assert {len(a) for a, _ in pairs} == {12}  # two restarts, r = 4
    assert max(rank_of(b @ a) for a, b in pairs) > 8


def test_relora_drops_most_of_the_optimizers_memory_at_a_restart(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "relora", "none", max_steps=4, options={"restarts": 1})
    from transformers import TrainerCallback

    seen: list[float] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments = [value["exp_avg"] for value in kwargs["optimizer"].state.values() if "exp_avg" in value]
            seen.append(sum(float((m != 0).sum()) for m in moments) / sum(m.numel() for m in moments))

    made.trainer.add_callback(Look())
    trained(made)
    assert seen[0] > 0.4
    assert seen[1] < 0.02
    assert seen[2] > 0.4


def test_relora_warms_up_again_after_a_restart(llama: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    rates: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    made = cell(tmp_path, llama, "causal_lm", "relora", "none", lr=0.03, max_steps=8, options={"restarts": 1, "warm": 2})
    made.trainer.add_callback(Look())
    trained(made)
    assert rates == pytest.approx([0.03] * 4 + [0.01, 0.02, 0.03, 0.03])


CONFIGURED: list[tuple[str, str, Any, str]] = [
    ("vera", "seed", 5, "projection_prng_key"),
    ("vera", "d_initial", 0.25, "d_initial"),
    ("adalora", "init_r", 7, "init_r"),
    ("adalora", "every", 3, "deltaT"),
    ("lokr", "decompose_both", True, "decompose_both"),
    ("prefix_tuning", "projection", True, "prefix_projection"),
    ("p_tuning", "hidden_size", 24, "encoder_hidden_size"),
    ("prompt_tuning", "text", "red", "prompt_tuning_init_text"),
    ("multitask_prompt_tuning", "ranks", 3, "num_ranks"),
    ("llama_adapter", "layers", 1, "adapter_layers"),
]
USED_ELSEWHERE = {  # in training, or where the adapter begins
    *(("adalora", name) for name in ("warm", "settle", "orthogonal")),
    *(("relora", name) for name in ("restarts", "prune", "warm")),
    *(("delta_lora", name) for name in ("ratio", "begin")),
    *(("pissa", "iterations"), ("eva", "rho"), ("lora_plus", "ratio"), ("prefix_tuning", "hidden_size")),
}


def test_an_option_that_is_new_in_the_table_is_missed_here() -> None:
    known = {(row.name, name) for row in METHODS.values() for name in row.options}
    assert known == {(method, name) for method, name, _, _ in CONFIGURED} | USED_ELSEWHERE


@pytest.mark.parametrize(("method", "name", "value", "field"), CONFIGURED)
def test_an_option_reaches_peft(llama: Path, tmp_path: Path, method: str, name: str, value: Any, field: str) -> None:
    base = tiny_llama(tmp_path / "deep", layers=3) if method == "llama_adapter" else llama
    given, plain = (
        cell(tmp_path, base, "causal_lm", method, "none", options=options).model.peft_config["default"] for options in ({name: value}, {})
    )
    assert getattr(given, field) == value != getattr(plain, field)


def test_a_projected_prefix_and_prompts_by_a_network_are_as_wide_as_asked(llama: Path, tmp_path: Path) -> None:
    options = {"projection": True, "hidden_size": 24}
    prefix = cell(tmp_path, llama, "causal_lm", "prefix_tuning", "none", options=options).model.prompt_encoder["default"]
    assert prefix.transform[0].out_features == 24
    network = cell(tmp_path, llama, "causal_lm", "p_tuning", "none", options={"hidden_size": 24}).model.prompt_encoder["default"]
    assert network.mlp_head[0].out_features == 24


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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_delta_lora_equals_writing_the_weights_at_every_step(llama: Path, tmp_path: Path, quantization: str) -> None:
    """ΔW = s [(1 + λ) A_T B_T − λ A_K B_K], summed up step by step here, from the adapter as it was after each step."""
    import torch
    from transformers import TrainerCallback

    made = cell(tmp_path, llama, "causal_lm", "delta_lora", quantization, options={"ratio": 2.0, "begin": 0.25})
    name, layer = next(lora_layers(made.model))
    products: list[Any] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            products.append((2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double())

    made.trainer.add_callback(Look())
    model = trained(made)
    written = sum(2.0 * (products[step] - products[step - 1]) for step in range(STEPS // 4, STEPS))
    a, b = plain_pairs(model)[name]
    assert a.shape[0] == 8
    exact = products[-1] + written
    assert float((b.double() @ a.double() - exact).norm() / exact.norm()) < 1e-6
    save_weights(model, tmp_path / "adapter", base_name="tiny")
    from embedft.base import load_model
    from embedft.methods import load_adapter

    loaded = load_adapter(load_model(made.base.folder, task="causal_lm"), tmp_path / "adapter")
    assert torch.allclose(made.outputs(loaded), made.outputs(model), atol=1e-4)


def test_llm_int8_and_qlora_are_what_they_say(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "qlora", "nf4")
    layer = next(lora_layers(made.model))[1].get_base_layer()
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    trained(made)
    assert str(made.trainer.args.optim.value) == "paged_adamw_32bit"
    made = cell(tmp_path, llama, "causal_lm", "llm_int8", "int8")
    assert type(next(lora_layers(made.model))[1].get_base_layer().weight).__name__ == "Int8Params"


def test_ia3_rescales_keys_values_and_the_second_layer_of_the_mlp(bases: dict[str, Path], tmp_path: Path) -> None:
    for task, expected in (("causal_lm", {"k_proj", "v_proj", "down_proj"}), ("embedding", {"key", "value", "dense"})):
        made = cell(tmp_path, bases[task], task, "ia3", "none")
        names = {name.split(".ia3_l")[0] for name in weights(made.model, "ia3_l")}
        assert {name.rpartition(".")[2] for name in names} == expected
        assert not any("attention.output" in name for name in names)
