"""How vLLM is started, and for which base it is not."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

from embedft.errors import EngineFailed
from embedft.model_folder import describe
from serve.engines import vllm
from serve.engines.command import engine_command
from serve.engines.settings import KEY, EngineSettings, parse_cores
from serve.engines.vllm import check_base, lora_rank
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama


def test_cores_are_read_as_vllm_reads_them() -> None:
    assert parse_cores("0-2,5") == {0, 1, 2, 5}


def test_a_rank_is_rounded_up_to_one_vllm_has() -> None:
    assert [lora_rank(r) for r in (1, 2, 16, 17, 300)] == [1, 8, 16, 32, 320]
    with pytest.raises(EngineFailed):
        lora_rank(513)


def test_the_vllm_command_carries_pooling_length_and_a_key_that_is_not_an_argument(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="cls", normalize=False)
    settings = EngineSettings(max_lora_rank=12, cores="1", max_length=20)
    argv, env = engine_command("vllm", folder=base, task="embedding", socket=tmp_path / "s", settings=settings)
    option = dict(itertools.pairwise(argv))
    assert json.loads(option["--pooler-config"]) == {"seq_pooling_type": "CLS", "use_activation": False}
    assert (option["--max-lora-rank"], option["--max-model-len"], env["EMBEDFT_ENGINE_CORES"]) == ("16", "20", "1")
    assert env["VLLM_API_KEY"] == env[KEY]
    assert env[KEY] not in " ".join(argv)


def test_vllm_compiles_on_a_gpu_only_whatever_its_parents_do() -> None:
    on_gpu, on_cpu = (vllm._environment(EngineSettings(), "key", on_cpu=kind) for kind in (False, True))
    assert (on_gpu["TORCHDYNAMO_DISABLE"], on_cpu["TORCHDYNAMO_DISABLE"]) == ("0", "1")
    assert "EMBEDFT_ENGINE_CORES" not in on_gpu  # by which the server knows


def test_vllm_is_not_started_for_a_base_it_cannot_serve(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", pooling="mean")
    with pytest.raises(EngineFailed, match="encoder"):
        engine_command("vllm", folder=base, task="causal_lm", socket=tmp_path / "s", settings=EngineSettings())
    config = json.loads((base / "config.json").read_text()) | {"num_attention_heads": 4}
    (base / "config.json").write_text(json.dumps(config))
    if not torch.cuda.is_available():
        with pytest.raises(EngineFailed, match="head sizes"):
            engine_command("vllm", folder=base, task="embedding", socket=tmp_path / "s", settings=EngineSettings())


@pytest.mark.parametrize(
    ("said", "served"),
    [
        ({"dim": 128, "n_heads": 4}, True),
        ({"dim": 128, "n_heads": 8}, False),
        ({"n_embd": 128, "n_head": 8}, False),
        ({"hidden_size": 128, "num_attention_heads": 8, "head_dim": 64}, True),
        ({"hidden_size": 128}, True),  # vLLM will say for itself
    ],
)
def test_head_sizes_are_read_in_the_words_of_each_family(tmp_path: Path, said: dict[str, int], *, served: bool) -> None:
    info = describe(tiny_encoder(tmp_path / "base", pooling="mean"))
    (tmp_path / "config.json").write_text(json.dumps(said))
    check = functools.partial(check_base, tmp_path, info, task="embedding", on_cpu=True)
    if served:
        check()
        return
    with pytest.raises(EngineFailed, match="this base has 16"):
        check()


def test_compressed_tensors_are_refused_where_vllm_has_no_kernel_for_them(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "compressed-tensors"}}))
    check = functools.partial(check_base, folder, describe(folder), task="causal_lm")
    check(on_cpu=False)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        check(on_cpu=True)
    else:
        with pytest.raises(EngineFailed, match=r"AVX512 only.*use the peft engine"):
            check(on_cpu=True)
