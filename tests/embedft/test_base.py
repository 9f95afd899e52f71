"""Bases: fingerprints, quantized folders and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedft.base import BaseSpec, base_folder, compute_dtype, config_folder, load_base, load_model, source_folder
from embedft.cli import main
from embedft.errors import BaseError, BaseNotFound, MethodUnsupported, QuantizationUnsupported, UsageError
from embedft.files import hash_tensors
from embedft.methods import attach, supported, targeted_modules
from embedft.model_folder import describe, fingerprint, own_template, tokenizer_of
from embedft.quantize import quantize
from embedft.recipe import AdapterSection
from tests.families import tiny_decoder
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama


def test_a_fingerprint_is_of_tensors_not_of_files(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32), np.ones((2, 2), np.float32)
    save_file({"a": a, "b": b}, str(tmp_path / "one.safetensors"), metadata={"format": "pt"})
    save_file({"b": b}, str(tmp_path / "two-1.safetensors"))
    save_file({"a": a}, str(tmp_path / "two-2.safetensors"))
    one = hash_tensors([tmp_path / "one.safetensors"])
    assert one == hash_tensors([tmp_path / "two-1.safetensors", tmp_path / "two-2.safetensors"])
    save_file({"a": a.reshape(2, 3), "b": b}, str(tmp_path / "one.safetensors"))
    assert one != hash_tensors([tmp_path / "one.safetensors"])


def test_changing_one_weight_or_the_tokenizer_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_folder(BaseSpec("minilm")), tmp_path / "copy"))
    before = fingerprint(folder)
    assert before == fingerprint(source_folder(BaseSpec("minilm")))
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    changed = fingerprint(folder)
    tensors = load_file(str(folder / "model.safetensors"))
    name = sorted(tensors)[0]
    tensors[name].flat[0] += 1
    save_file(tensors, str(folder / "model.safetensors"))
    assert len({before, changed, fingerprint(folder)}) == 3


def test_bytes_written_in_place_change_the_fingerprint_and_so_does_a_tokenizer_in_any_file(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    found = {fingerprint(folder)}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x2a")
    found.add(fingerprint(folder))
    (folder / "tokenizer.json").unlink()
    for content in (b"one", b"two"):
        (folder / "tokenizer.model").write_bytes(content)
        found.add(fingerprint(folder))
    assert len(found) == 4


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"])
def test_a_tokenizer_without_a_file_of_its_own_is_part_of_the_fingerprint_in_all_its_files(tmp_path: Path, file: str) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    (folder / "tokenizer.json").unlink()
    found = {fingerprint(folder)}
    for content in ("one", "two"):
        (folder / file).write_text(content)
        found.add(fingerprint(folder))
    assert len(found) == 3


def test_the_same_weights_in_another_format_beside_them_make_no_other_base(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    alone = fingerprint(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert fingerprint(folder) == alone
    load_model(folder, task="causal_lm").save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    shutil.copy(folder / "tokenizer.json", tmp_path / "sharded")
    shutil.copy(folder / "model.safetensors", tmp_path / "sharded" / "consolidated.safetensors")
    assert fingerprint(tmp_path / "sharded") == alone


def test_a_quantized_copy_has_the_tokens_that_were_added_to_a_tokenizer_of_old(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    made: Any = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(made["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in made["merges"])]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": len(made["vocab"])}))
    whole = tokenizer_of(folder)("red <tool> green")["input_ids"]
    assert len(made["vocab"]) in whole
    assert tokenizer_of(quantize(folder, tmp_path / "nf4", scheme="nf4"))("red <tool> green")["input_ids"] == whole


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_base_is_a_folder_that_knows_its_parent(scheme: str) -> None:
    spec = BaseSpec("minilm", scheme)
    info = describe(base_folder(spec))
    assert info.quantization == scheme
    assert info.parent == fingerprint(source_folder(BaseSpec("minilm"))) != info.fingerprint
    assert (info.pooling, info.normalize, info.max_length, info.positions) == ("mean", True, 256, 512)
    base = load_base(spec, task="embedding")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(("family", "told"), [("qwen3_moe", True), ("qwen3", False)])
def test_who_quantizes_a_mixture_is_told_what_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, told: bool
) -> None:
    base = tiny_decoder(tmp_path / "base", family)
    assert main(["quantize", str(base), str(tmp_path / "nf4"), "--scheme", "nf4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert ("in full precision" in shown) == told
    if told:
        experts = 4 * 4 * 3 * 64 * 64 * 4  # layers, experts, matrices of 64 x 64, bytes
        whole = sum(value.nbytes for value in load_file(str(tmp_path / "nf4" / "model.safetensors")).values())
        assert shown["in full precision"].startswith(f"its experts, {experts / whole:.0%} of the bytes")


def test_quantizing_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    again = quantize(source_folder(BaseSpec("minilm")), tmp_path / "again", scheme="nf4")
    assert fingerprint(again) == fingerprint(base_folder(BaseSpec("minilm", "nf4")))


def test_a_quantized_base_is_not_quantized_again(tmp_path: Path) -> None:
    folder = base_folder(BaseSpec("minilm", "nf4"))
    assert base_folder(BaseSpec(str(folder), "nf4")) == folder
    with pytest.raises(QuantizationUnsupported, match="already nf4"):
        quantize(folder, tmp_path / "out", scheme="int8")
    with pytest.raises(QuantizationUnsupported, match="already nf4"):
        base_folder(BaseSpec(str(folder), "int8"))


def test_two_bases_of_one_name_are_quantized_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        source = tiny_llama(tmp_path / str(seed) / "same", layers=1, seed=seed)
        folder = base_folder(BaseSpec(str(source), "int8"))
        assert describe(folder).parent == fingerprint(source)
        assert fingerprint(folder) == fingerprint(quantize(source, tmp_path / str(seed) / "int8", scheme="int8"))


def test_a_quantized_folder_says_of_itself_what_its_parent_says(tmp_path: Path) -> None:
    """How it pools and reads, its chat template and how it ends an answer: trainer and engines go by the folder alone."""
    encoder = tiny_encoder(tmp_path / "encoder", pooling="cls", normalize=False)
    made, parent = describe(quantize(encoder, tmp_path / "encoder-int8", scheme="int8")), describe(encoder)
    for said in ("pooling", "normalize", "max_length", "positions", "hidden_size", "kind"):
        assert getattr(made, said) == getattr(parent, said), said
    decoder = tiny_llama(tmp_path / "decoder", layers=1)
    generation = json.loads((decoder / "generation_config.json").read_text()) | {"eos_token_id": [1, 2]}
    (decoder / "generation_config.json").write_text(json.dumps(generation))
    for scheme in ("int8", "w4a16"):
        folder = quantize(decoder, tmp_path / f"decoder-{scheme}", scheme=scheme)
        assert own_template(folder) == own_template(decoder) is not None
        assert load_model(folder, task="causal_lm").generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize(("given", "reads"), [(16, 16), (999, 64), (None, 64)])
def test_a_base_reads_no_more_than_it_can_place_whatever_its_files_say(tmp_path: Path, given: int | None, reads: int) -> None:
    folder = tiny_encoder(tmp_path / "base", pooling="mean")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": given}))
    assert (describe(folder).max_length, describe(folder).positions) == (reads, 64)


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode": "cls"}, {"pooling_mode_cls_token": True}, {"pooling_mode": "lasttoken"}, {"pooling_mode_lasttoken": True}, {}],
)
def test_how_a_base_pools_is_read_in_the_words_of_any_version_of_sentence_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tiny_encoder(tmp_path / "base", pooling="mean", normalize=False)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | config))
    info, said = describe(folder), str(config)
    assert (info.pooling, info.normalize) == ("cls" if "cls" in said else "lasttoken" if "lasttoken" in said else "mean", False)


def test_a_folder_that_says_nothing_of_pooling_is_pooled_by_its_kind_and_normalised(tmp_path: Path) -> None:
    encoder, decoder = tiny_encoder(tmp_path / "encoder", pooling="cls"), tiny_llama(tmp_path / "decoder", layers=1)
    (encoder / "modules.json").unlink()
    assert [(info.pooling, info.normalize) for info in map(describe, (encoder, decoder))] == [("mean", True), ("lasttoken", True)]


def test_of_a_folders_several_chat_templates_the_default_one_is_its_own(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain words"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert own_template(tmp_path) == "plain words"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed[:1]}))
    assert own_template(tmp_path) is None


def test_of_a_hub_base_the_named_revision_is_asked_for_and_for_a_plan_nothing_but_its_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, asked = tiny_llama(tmp_path / "base", layers=1), list[Any]()

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, any("safetensors" in pattern for pattern in allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    spec = BaseSpec("owner/base", revision="v1")
    assert source_folder(spec) == config_folder(spec) == folder
    assert asked == [("owner/base", "v1", True), ("owner/base", "v1", False)]


def test_a_base_that_is_nowhere_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="neither a built-in"):
        source_folder(BaseSpec("nobody/nothing"))
    with pytest.raises(BaseNotFound, match=r"config\.json"):
        source_folder(BaseSpec(str(tmp_path)))


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.weight", "pooler.dense.weight"])
def test_weights_that_the_files_lack_are_not_drawn_at_random(tmp_path: Path, lost: str) -> None:
    folder = tiny_encoder(tmp_path / "base", pooling="mean")
    tensors = load_file(str(folder / "model.safetensors"))
    del tensors[lost]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    if lost.startswith("pooler"):  # no vector depends on it
        assert load_model(folder, task="embedding") is not None
        return
    with pytest.raises(BaseError, match=r"lacks 1 of its weights \(encoder\.layer\.1\.output\.dense\.weight\)"):
        load_model(folder, task="embedding")
    for scheme in ("nf4", "w4a16"):
        with pytest.raises(BaseError, match="lacks 1 of its weights"):
            quantize(folder, tmp_path / scheme, scheme=scheme)


def test_what_writes_nothing_or_is_two_models_is_no_base(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    with pytest.raises(BaseError, match="sees what follows"):
        load_model(tiny_encoder(tmp_path / "encoder", pooling="mean"), task="causal_lm")
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for kind in (T5EncoderModel, T5ForConditionalGeneration):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        for task in ("embedding", "causal_lm"):
            with pytest.raises(BaseError, match=r"is an encoder-decoder \(t5\)"):
                load_model(tmp_path / kind.__name__, task=task)


@pytest.mark.parametrize("model", ["minilm", "seed-lm", "."])
def test_a_revision_of_what_has_none_is_refused_not_ignored(model: str) -> None:
    with pytest.raises(UsageError, match="is no hub id, so it has no revision 'main'"):
        base_folder(BaseSpec(model, revision="main"))


def test_all_linear_leaves_out_what_the_output_does_not_depend_on() -> None:
    base = load_base(BaseSpec("minilm"), task="embedding")
    names = targeted_modules(base.model, "all-linear")
    assert len(names) == 36
    model = attach(base, AdapterSection(r=2), task="embedding")
    adapted = {name.partition(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapted) == 36
    assert not any("pooler" in name for name in adapted)


def test_targets_that_the_base_lacks_are_named() -> None:
    base = load_base(BaseSpec("minilm"), task="embedding")
    with pytest.raises(MethodUnsupported, match="q_proj"):
        attach(base, AdapterSection(targets=("q_proj",)), task="embedding")


def test_an_unknown_method_names_the_nearest() -> None:
    base = load_base(BaseSpec("minilm"), task="embedding")
    with pytest.raises(MethodUnsupported, match="did you mean 'lora'"):
        attach(base, AdapterSection(method="lorra"), task="embedding")


def test_an_option_of_another_kind_is_named() -> None:
    info = describe(source_folder(BaseSpec("seed-lm")))
    for method, given in (("lora_plus", {"ratio": "abc"}), ("relora", {"restarts": 2.5}), ("lokr", {"decompose_both": 1})):
        with pytest.raises(MethodUnsupported, match=rf"with {next(iter(given))}=.*expected"):
            supported(AdapterSection(method=method, options=given), task="causal_lm", info=info)
    supported(AdapterSection(method="lora_plus", options={"ratio": 4}), task="causal_lm", info=info)


def test_a_user_may_choose_the_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("float32", "bfloat16", "float16"):
        monkeypatch.setenv("EMBEDFT_DTYPE", name)
        assert compute_dtype() is getattr(torch, name)
    monkeypatch.setenv("EMBEDFT_DTYPE", "bf16")
    with pytest.raises(UsageError, match="EMBEDFT_DTYPE=bf16: it is one of float32, bfloat16, float16"):
        compute_dtype()


def test_the_compute_dtype_is_one_that_this_machine_is_fast_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: a product in it takes no longer than a few in float32; emulated bf16 takes tens of times as long."""
    import time

    import torch

    monkeypatch.delenv("EMBEDFT_DTYPE")
    device, taken = "cuda" if torch.cuda.is_available() else "cpu", {compute_dtype(): list[float](), torch.float32: list[float]()}
    for _ in range(20):  # by turns: whatever else the machine does, it does to both
        for dtype, seconds in taken.items():
            a = torch.randn(512, 512, dtype=dtype, device=device)
            began = time.perf_counter()
            float((a @ a)[0, 0])
            seconds.append(time.perf_counter() - began)
    assert compute_dtype() in {torch.float32, torch.bfloat16, torch.float16}
    assert min(taken[compute_dtype()]) < 6 * min(taken[torch.float32])


def test_int8_weights_compute_as_their_floating_point_selves_whatever_the_batch() -> None:
    import torch

    base = load_base(BaseSpec("minilm", "int8"), task="embedding")
    layer = base.model.encoder.layer[0].attention.self.query
    weight = layer.weight.data.to(compute_dtype()) * (layer.weight.SCB / 127).to(compute_dtype())[:, None]
    torch.manual_seed(0)
    x = torch.randn(5, 384, dtype=compute_dtype())
    x[0] *= 50  # an outlier must not change how its neighbours are computed
    x.requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert torch.allclose(out, x @ weight.T + layer.bias, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer(x[3:4])[0], out[3], rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


def test_a_decoder_in_nf4_computes_in_the_machines_dtype_as_an_encoder_too() -> None:
    base = load_base(BaseSpec("seed-lm", "nf4"), task="embedding")
    assert {parameter.dtype for parameter in base.model.parameters() if parameter.is_floating_point()} == {compute_dtype()}


def test_the_head_is_multiplied_once_not_once_a_row(tmp_path: Path) -> None:
    """Of the last positions of rows torch makes a product a row, each with the head's weights copied, unless they lie together."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, torch.Tensor))
            return out

    base = load_base(BaseSpec(str(tiny_llama(tmp_path / "llama", layers=1))), task="causal_lm")
    head = base.model.get_output_embeddings().weight
    with Sizes():
        base.model(input_ids=torch.randint(5, 50, (8, 6)), logits_to_keep=2)
    assert max(sizes) <= 2 * head.numel()
