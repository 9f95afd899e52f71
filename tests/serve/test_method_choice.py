"""vLLM is given only what its kernels serve; the refusal names the way out."""

import pytest

from embedft.adapters.passport import BaseIdentity, Passport
from embedft.errors import AdapterInvalid, MethodUnsupported
from embedft.methods import METHODS
from embedft.model_folder import BaseInfo, describe
from serve.config import BaseConfig, ServerConfig
from serve.engine import Engine, create_engine
from serve.fitting import check_fit
from tests.fixtures_lm import tiny_llama


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    base = tiny_llama(folder / "base")

    async def nothing(engine: Engine) -> None:
        pass

    made: dict[str, Engine] = {}
    for kind in ("vllm", "peft"):
        config = BaseConfig(name="words", model=str(base), task="causal_lm", engine=kind, max_lora_rank=16)
        server = ServerConfig(bases=(config,), adapters=folder)
        made[kind] = create_engine(config, server, folder, prepare=nothing)
    return made


def passport(info: BaseInfo, method: str, *, r: int = 4) -> Passport:
    base = BaseIdentity(model="tiny", fingerprint=info.fingerprint)
    return Passport(name="a", task="causal_lm", base=base, method=method, r=r, alpha=8, max_length=64)


@pytest.mark.parametrize("method", METHODS)
def test_vllm_takes_what_its_row_allows_and_names_the_conversion_for_the_rest(engines: dict[str, Engine], method: str) -> None:
    info = describe(engines["vllm"].folder)
    check_fit("a", passport(info, method), engines["peft"])
    if METHODS[method].vllm:
        check_fit("a", passport(info, method), engines["vllm"])
        return
    wanted = "no LoRA form: serve it by the peft engine" if METHODS[method].to_lora == "no" else "embedft adapters convert a --to lora"
    with pytest.raises(MethodUnsupported, match=wanted):
        check_fit("a", passport(info, method), engines["vllm"])


def test_a_rank_above_the_engines_is_refused_for_lora_only(engines: dict[str, Engine]) -> None:
    info = describe(engines["vllm"].folder)
    with pytest.raises(AdapterInvalid, match="raise max_lora_rank"):
        check_fit("a", passport(info, "lora", r=32), engines["vllm"])
    check_fit("a", passport(info, "vera", r=256), engines["peft"])
