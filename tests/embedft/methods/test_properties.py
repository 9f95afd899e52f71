"""What makes each method itself, as its paper says."""

from pathlib import Path
from typing import Any

import pytest

from embedft.methods import METHODS, attach, save_weights
from embedft.methods.companion import lora_layers, plain_pairs
from embedft.methods.starts import dequantized, original_weights
from tests.embedft.causal_lm.test_settings import keep_gradients
from tests.embedft.methods.cells import STEPS, cell


@pytest.fixture
def llama(bases: dict[str, Path]) -> Path:
    return bases["causal_lm"]


def trained(made: Any) -> Any:
    made.trainer.train()
    return made.model


def weights(model: Any, part: str) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if part in name}


def rank_of(delta: Any) -> int:
    import torch

    return int((torch.linalg.svdvals(delta) > 1e-5 * torch.linalg.matrix_norm(delta, 2)).sum())


def test_rslora_scales_by_alpha_over_the_root_of_r(llama: Path, tmp_path: Path) -> None:
    scales = {
        method: next(lora_layers(cell(tmp_path, llama, "causal_lm", method, "none").model))[1].scaling for method in ("lora", "rslora")
    }
    assert scales["lora"]["default"] == 8 / 4
    assert scales["rslora"]["default"] == 8 / 4**0.5


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


def test_vera_shares_a_and_b_and_trains_only_vectors(llama: Path, tmp_path: Path) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", "vera", "none")
    layers = [module for module in made.model.modules() if hasattr(module, "vera_lambda_b")]
    assert len({layer.vera_A["default"].data_ptr() for layer in layers}) == 1
    shared = layers[0].vera_A["default"].clone()
    model = trained(made)
    assert torch.equal(layers[0].vera_A["default"], shared)
    assert {value.ndim for _, value in model.named_parameters() if value.requires_grad} == {1}


def test_adalora_reaches_its_budget_with_ranks_that_differ(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", max_steps=16)
    layers = len(list(lora_layers(made.model)))
    model = trained(made)
    ranks = {name: sum(kept) for name, kept in model.peft_config["default"].rank_pattern.items()}
    assert sum(ranks.values()) == 4 * layers
    assert len(set(ranks.values())) > 1
    effective = sum(int((layer.lora_E["default"] != 0).sum()) for _, layer in lora_layers(model))
    assert effective <= 4 * layers < 6 * layers


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


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning", "prompt_tuning", "multitask_prompt_tuning"])
def test_an_answer_does_not_depend_on_the_padding_of_its_batch(llama: Path, tmp_path: Path, method: str) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", method, "none")
    model = trained(made).eval()
    ids = torch.tensor([[0, 0, 0, 9, 8, 7], [3, 4, 5, 6, 7, 8]])
    mask = (ids > 0).long()
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[0, 3:]
        alone = model(input_ids=ids[:1, 3:]).logits[0]
        made_together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
        made_alone = model.generate(input_ids=ids[:1, 3:], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.allclose(padded, alone, atol=1e-4)
    assert torch.equal(made_together[0, 6:], made_alone[0, 3:])


def test_llama_adapter_begins_with_closed_gates(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "llama_adapter", "none")
    gates = weights(made.model, "adaption_gate")
    assert gates
    assert all(float(value.abs().max()) == 0 for value in gates.values())
    assert any(float(value.abs().max()) > 0 for value in weights(trained(made), "adaption_gate").values())


def test_ia3_rescales_keys_values_and_the_second_layer_of_the_mlp(bases: dict[str, Path], tmp_path: Path) -> None:
    for task, expected in (("causal_lm", {"k_proj", "v_proj", "down_proj"}), ("embedding", {"key", "value", "dense"})):
        made = cell(tmp_path, bases[task], task, "ia3", "none")
        names = {name.split(".ia3_l")[0] for name in weights(made.model, "ia3_l")}
        assert {name.rpartition(".")[2] for name in names} == expected
        assert not any("attention.output" in name for name in names)


def test_an_unknown_option_or_method_is_named(llama: Path, tmp_path: Path) -> None:
    from embedft.errors import MethodUnsupported

    with pytest.raises(MethodUnsupported, match="its options are: ratio"):
        cell(tmp_path, llama, "causal_lm", "lora_plus", "none", options={"rate": 3})
    with pytest.raises(MethodUnsupported, match="did you mean 'lora_plus'"):
        cell(tmp_path, llama, "causal_lm", "LoRA-plus", "none")


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("adalora", {"every": 0}, "a whole number of at least 1"),
        ("adalora", {"warm": 2.0}, "a number from 0 to 0.9"),
        ("adalora", {"init_r": 2}, "ranks only fall"),
        ("delta_lora", {"begin": 3}, "a number from 0 to 1"),
        ("eva", {"rho": 0.5}, "of at least 1"),
        ("lora_plus", {"ratio": -4}, "of at least 1"),
        ("multitask_prompt_tuning", {"ranks": 0}, "of at least 1"),
    ],
)
def test_an_option_that_would_make_it_another_method_is_refused(
    llama: Path, tmp_path: Path, method: str, options: dict[str, Any], expected: str
) -> None:
    from embedft.errors import MethodUnsupported

    with pytest.raises(MethodUnsupported, match=expected):
        cell(tmp_path, llama, "causal_lm", method, "none", options=options)


@pytest.mark.parametrize("task", ["causal_lm", "embedding"])
def test_adaloras_penalty_counts_once_a_step_in_either_task(bases: dict[str, Path], tmp_path: Path, task: str) -> None:
    def penalty(accumulate: int) -> float:
        norms: list[Any] = []
        for weight in (0.0, 0.5):
            settings = {"max_steps": 1, "lr": 1e-12, "max_grad_norm": 1e9, "batch": 6, "accumulate": accumulate}
            folder = tmp_path / f"{accumulate}-{weight}"
            folder.mkdir()
            made = cell(folder, bases[task], task, "adalora", "none", options={"orthogonal": weight}, **settings)
            gradients: dict[str, Any] = {}
            keep_gradients(made.trainer, gradients)
            made.trainer.train()
            norms.append(gradients)
        return sum(float((norms[1][name] - norms[0][name]).norm()) for name in norms[0] if "lora_A" in name)

    once = penalty(1)
    assert once > 0
    assert penalty(4) == pytest.approx(once, rel=0.05)


def test_adaloras_penalty_is_no_part_of_an_evaluations_loss(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", options={"orthogonal": 50.0}, max_steps=1, lr=1e-12)
    assert made.loss(trained(made)) < 20


@pytest.mark.parametrize("settle", [0.0, 0.9])
def test_adalora_reaches_its_budget_however_early_its_ranks_settle(llama: Path, tmp_path: Path, settle: float) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", options={"settle": settle, "warm": 0.0})
    model = trained(made)
    pattern: Any = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4 * len(pattern)


def test_a_decoder_without_linear_layers_is_known_for_one_and_refused_with_what_to_do(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection
    from tests.fixtures_lm import tiny_tokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(BaseSpec(str(tmp_path)), task="causal_lm")
    assert base.info.kind == "decoder"
    with pytest.raises(MethodUnsupported, match=r"are convolutions.*method=full"):
        attach(base, AdapterSection(), task="causal_lm")


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.quantizations[0] == "none"])
def test_dropout_and_targets_are_there_or_refused_as_the_table_says(llama: Path, method: str) -> None:
    """The table's columns against what PEFT then holds."""
    from dataclasses import replace

    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection

    row, base = METHODS[method], load_base(BaseSpec(str(llama)), task="causal_lm")
    plain = AdapterSection(method=method, r=4)
    batch = [{"input_ids": torch_ids(), "attention_mask": torch_ids().ne(-1)}]
    if not row.dropout:
        with pytest.raises(MethodUnsupported, match=r"set adapter\.dropout=0"):
            attach(base, plain.model_copy(update={"dropout": 0.25}), task="causal_lm")
    if not row.targets:
        with pytest.raises(MethodUnsupported, match=r"leave adapter\.targets out"):
            attach(base, plain.model_copy(update={"targets": ("q_proj",)}), task="causal_lm")
    chosen: dict[str, Any] = ({"dropout": 0.25} if row.dropout else {}) | ({"targets": ("q_proj",)} if row.targets else {})
    model: Any = attach(replace(base), plain.model_copy(update=chosen), task="causal_lm", batches=batch)
    if row.targets:
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        assert trained
        assert all("q_proj" in name or "vera_" in name for name in trained)
    if row.dropout:
        config = model.peft_config["default"]
        given = [getattr(config, name) for name in ("lora_dropout", "vera_dropout", "module_dropout") if hasattr(config, name)]
        assert given == [0.25]


def torch_ids() -> Any:
    import torch

    return torch.arange(40, 56)[None]


@pytest.mark.parametrize("task", ["causal_lm", "embedding"])
@pytest.mark.parametrize("method", ["prompt_tuning", "multitask_prompt_tuning", "p_tuning"])
def test_virtual_tokens_begin_as_words(bases: dict[str, Path], tmp_path: Path, method: str, task: str) -> None:
    import torch

    made = cell(tmp_path, bases[task], task, method, "none")
    words = made.base.model.get_input_embeddings().weight
    tasks = torch.zeros(1, dtype=torch.long) if method == "multitask_prompt_tuning" else None
    prompts = made.model.get_prompt(batch_size=1, task_ids=tasks)[0].detach()
    nearest = torch.cdist(prompts, words).argmin(1)
    assert len(set(nearest.tolist())) > 1
    lost = (prompts - words[nearest]).norm(dim=1) / words[nearest].norm(dim=1)
    assert float(lost.max()) < (0.15 if tasks is not None else 1e-3)  # a task's own factors begin near one, not at it


def test_a_prefix_begins_as_the_keys_and_values_of_words(llama: Path, tmp_path: Path) -> None:
    import torch

    from embedft.methods.prompts import key_values

    made = cell(tmp_path, llama, "causal_lm", "prefix_tuning", "none")
    base = made.base.model
    with torch.no_grad():
        cache = base(input_ids=torch.arange(base.config.vocab_size)[:, None], use_cache=True).past_key_values.layers
    for layer, (keys, values) in enumerate(key_values(made.model)):
        first = torch.cat([keys[:, 0], values[:, 0]]).flatten()  # the first virtual token saw nothing before it
        of_words = torch.cat([cache[layer].keys[:, :, 0], cache[layer].values[:, :, 0]], dim=1).flatten(1)
        assert float((of_words - first).norm(dim=1).min() / first.norm()) < 1e-3
