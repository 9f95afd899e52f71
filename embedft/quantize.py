"""Base folder → quantized base folder that trainer and engine both load. The only place where weights are quantized.

Quantizing once, to files, is what lets two programs agree: each quantizing for itself in flight, their vectors part (cosine 0.997).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from embedft.compressed import BITS, compress
from embedft.errors import QuantizationUnsupported
from embedft.files import publish_folder, staged_folder, tensor_table
from embedft.model_folder import RECORD, check_whole, describe, fingerprint, quantization_of, tokenizer_of, told, weight_files
from embedft.packed import READ

SCHEMES = ("nf4", "int8", "w4a16", "w8a8")
CALIBRATION_LINES = 512
# Left in full precision: the output embedding, and a pooler that sentence embeddings never use.
SKIPPED = ("lm_head", "pooler")
_COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.jinja",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "*.model",
)


def quantize(source: Path, out: Path, *, scheme: str, calibration: Path | None = None, called: str | None = None) -> Path:
    """Write `source` quantized to `out` (whole or not at all) and return `out`.

    nf4: bitsandbytes NormalFloat-4 with double quantization (QLoRA, arXiv 2305.14314); int8: LLM.int8() (arXiv 2208.07339);
    w4a16 and w8a8: compressed-tensors. `calibration`: a text file, by whose lines w4a16 is rounded (GPTQ, arXiv 2210.17323).
    `called`: what `out` names as its source (default: the folder's name).
    Raises QuantizationUnsupported for another scheme, an already quantized source or an `out` that holds files.
    """
    if scheme not in SCHEMES:
        other = "gptq and awq folders are read and not written (w4a16 with --calibrate rounds by GPTQ): " if scheme in READ else ""
        raise QuantizationUnsupported(f"no scheme {scheme!r}: {other}there are {', '.join(SCHEMES)}")
    if calibration is not None and scheme != "w4a16":
        raise QuantizationUnsupported(f"{scheme} takes no calibration: it is for w4a16")
    if quantization_of(source) != "none":
        raise QuantizationUnsupported(f"{source} is already {quantization_of(source)}: start from the unquantized weights")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationUnsupported(f"{out} is {'not empty' if out.is_dir() else 'a file'}: name a new folder")
    with staged_folder(out.parent) as stage:
        _write_compressed(source, stage, scheme, calibration) if scheme in BITS else _write_weights(source, stage, scheme)
        copy_rest(source, stage)
        record = {"scheme": scheme, "parent": fingerprint(source), "source": called or source.name}
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            publish_folder(stage, out)
        except OSError:
            if not (out / RECORD).is_file():  # else another process finished first: its folder is as good
                raise
    return out


def _write_weights(source: Path, stage: Path, scheme: str) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    skipped = list(SKIPPED)
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
        if scheme == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    )
    loader: Any = AutoModelForCausalLM if describe(source).kind == "decoder" else AutoModel
    device = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    with told(source):
        model, loading = loader.from_pretrained(source, quantization_config=config, dtype="auto", output_loading_info=True, **device)
    check_whole(source, loading)
    model.save_pretrained(stage)


def _write_compressed(source: Path, stage: Path, scheme: str, calibration: Path | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM if describe(source).kind == "decoder" else AutoModel
    with told(source):
        model, loading = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    check_whole(source, loading)
    model.eval()
    dtype: Any = AutoConfig.from_pretrained(source).dtype or torch.float32
    compress(model, stage, scheme=scheme, skipped=SKIPPED, dtype=dtype, batches=_batches(source, calibration) if calibration else ())


def _batches(source: Path, calibration: Path) -> list[dict[str, Any]]:
    """The first lines of a text file, as the model is given them."""
    if not calibration.is_file():
        raise QuantizationUnsupported(f"{calibration}: there is no such file of calibration texts, one a line")
    try:
        text = calibration.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuantizationUnsupported(f"{calibration}: not UTF-8 (byte {error.start}): convert it") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()][:CALIBRATION_LINES]
    if not lines:
        raise QuantizationUnsupported(f"{calibration}: no text in it; expected texts such as the model will see, one a line")
    tokenizer: Any = tokenizer_of(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made: list[dict[str, Any]] = []
    for first in range(0, len(lines), 16):
        given = tokenizer(lines[first : first + 16], padding=True, truncation=True, max_length=256, return_tensors="pt")
        made.append({key: given[key] for key in ("input_ids", "attention_mask")})
    return made


def experts_share(folder: Path) -> float:
    """Share of a quantized folder's bytes that are a mixture's experts in full precision: they lie in no linear layers, which is what a
    scheme packs."""
    tensors = [row for path in weight_files(folder) for row in tensor_table(path)]
    experts = sum(size for name, dtype, _, _, size in tensors if ".experts." in name and dtype in ("F64", "F32", "F16", "BF16"))
    return experts / max(sum(row[4] for row in tensors), 1)


def copy_rest(source: Path, stage: Path) -> None:
    """Tokenizer, pooling and the like: all of a base folder that is no weight and no config."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file() and not (stage / path.name).exists():
                shutil.copyfile(path, stage / path.name)
    for folder in source.iterdir():
        if folder.is_dir() and folder.name[:1].isdigit():  # 1_Pooling and its like
            shutil.copytree(folder, stage / folder.name)
