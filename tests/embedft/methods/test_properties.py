"""What makes each method itself, as its paper says."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.methods import METHODS, save_weights
from embedft.methods.companion import lora_layers, plain_pairs
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
