"""What a model folder says of itself: its fingerprint, its quantization, how it pools. Reads files only; loads no weights."""

import hashlib
import json
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from embedft.compressed import scheme_of
from embedft.errors import BaseError, BaseNotFound, EmbedftError
from embedft.files import HeaderInvalid, hash_tensors
from embedft.sentence_folder import Pooling, longest, published

Task = Literal["embedding", "causal_lm"]
PLAIN = "plain"
CHATML = (  # Jinja, as folders' tokenizer_config.json has it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZERS = ("*.model", "vocab.*", "merges.txt", "added_tokens.json")  # what stands in for a tokenizer.json
_OTHER_SENSES = ("vision_config", "audio_config", "text_config", "thinker_config")
RECORD = "embedft.json"  # in a quantized folder: its scheme and its parent's fingerprint


@dataclass(frozen=True)
class BaseInfo:
    """What a base folder says of itself; `pooling`, `normalize` and `prompts` (query, document) as sentence-transformers would have them.

    Of a text it reads `max_length` tokens by itself, as published; an adapter may be trained to read up to `positions`.
    """

    fingerprint: str
    parent: str | None
    quantization: str
    architecture: str
    kind: Literal["encoder", "decoder"]
    pooling: Pooling
    normalize: bool
    max_length: int
    positions: int
    hidden_size: int
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, limit: int | None) -> int:
        """Tokens of one text that a process over it takes at most, where `limit` was asked for (None: all it can)."""
        return min(limit or self.positions, self.positions)


def quantization_of(folder: Path) -> str:
    """'none', 'nf4', 'int8', 'w4a16', 'w8a8' or the config's own quant_method."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if not quantization:
        return "none"
    if quantization.get("quant_method") == "bitsandbytes":
        return "nf4" if quantization.get("load_in_4bit") else "int8"
    if quantization.get("quant_method") == "compressed-tensors":
        return scheme_of(quantization)
    return str(quantization.get("quant_method", "unknown"))


def fingerprint(folder: Path) -> str:
    """sha256 (64 hex) over sorted (tensor name, dtype, shape, bytes) of the safetensors files, then the tokenizer's bytes.

    BaseNotFound where there are none, BaseError where one is half there.
    """
    files = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [*weight_files(folder), *_tokenizer_files(folder)])
    if not any(name.endswith(".safetensors") for name, _, _ in files):
        raise BaseNotFound(f"{folder} holds no safetensors weights (a pickle is never read): convert it with save_pretrained")
    try:
        return _fingerprint(files)
    except HeaderInvalid as error:
        raise BaseError(f"{folder.name} is damaged ({error}): download it again, whole (a git clone of it needs git lfs)") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads. What lies beside them (the same weights in Mistral's own format, a copy in fp16) is no
    part of the base. BaseError where one is not there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    listed = sorted(set(read_json(index).get("weight_map", {}).values()))
    if lost := [name for name in listed if not (folder / name).is_file()]:
        raise BaseError(f"{folder.name} lacks {len(lost)} of {len(listed)} files of weights ({lost[0]}): download it again, whole")
    return [folder / name for name in listed]


def _tokenizer_files(folder: Path) -> list[Path]:
    if (folder / "tokenizer.json").is_file():
        return [folder / "tokenizer.json"]
    return sorted({path for pattern in TOKENIZERS for path in folder.glob(pattern)})


@lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    weights = [Path(name) for name, _, _ in files if name.endswith(".safetensors")]
    return hash_tensors(weights, then=[Path(name).read_bytes() for name, _, _ in files if not name.endswith(".safetensors")])


AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "roberta-prelayernorm", "ibert"}
# families whose positions start after the padding index


def describe(folder: Path) -> BaseInfo:
    """Read what `folder` says of itself; loads no weights.

    BaseError where it is no model of text alone, or its vectors are made by what is not here.
    """
    config = read_json(folder / "config.json")
    check_plain(folder, config)
    architecture, decoder = _architecture(config), _is_decoder(config)
    vectors = published(folder, decoder=decoder)
    max_length, positions = lengths(folder, config)
    return BaseInfo(
        fingerprint=fingerprint(folder),
        parent=read_json(folder / RECORD).get("parent") if (folder / RECORD).is_file() else None,
        quantization=quantization_of(folder),
        architecture=architecture,
        kind="decoder" if decoder else "encoder",
        pooling=vectors.pooling,
        normalize=vectors.normalize,
        max_length=max_length,
        positions=positions,
        hidden_size=hidden_size(folder, config),
        prompts=vectors.prompts,
    )


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """That it is one model, of text alone. BaseError."""
    if other := next((name for name in _OTHER_SENSES if config.get(name)), None):
        raise BaseError(
            f"{folder.name} ({config.get('model_type')}) is no model of text alone, its config.json has a {other}: "
            "take one of its family that only reads and writes text"
        )
    if (folder / "adapter_config.json").is_file():
        raise BaseError(
            f"{folder.name} holds an adapter beside its weights (adapter_config.json), which some programs would add to them and others "
            "would not: move adapter_config.json and adapter_model.safetensors to a folder of their own"
        )


def _architecture(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or ["unknown"])[0]


def _is_decoder(config: Mapping[str, Any]) -> bool:
    return "CausalLM" in _architecture(config) or _architecture(config) == "GPT2LMHeadModel"


def hidden_size(folder: Path, config: dict[str, Any]) -> int:
    """Components of a token's state, whatever the family calls them. BaseError."""
    for name in ("hidden_size", "dim", "d_model", "n_embd"):
        if isinstance(config.get(name), int):
            return int(config[name])
    raise BaseError(f"{folder.name}/config.json says no hidden_size: a base is an encoder or a decoder of text")


def lengths(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """(tokens of a text that it reads by itself, tokens that it can place at most), from its small files alone."""
    positions = int(config.get("max_position_embeddings") or config.get("n_positions") or 512)
    if config.get("model_type") in AFTER_PADDING:
        positions -= (1 if config.get("pad_token_id") is None else int(config["pad_token_id"])) + 1
    return min(positions, longest(folder, decoder=_is_decoder(config)) or positions), positions


def stop_tokens(tokenizer: Any) -> list[int]:
    """Ids that end an answer, in training, evaluation and every engine: the end of text, what the base's own folder names beside it, and
    the end of a turn whatever the base calls its eos."""
    vocabulary = tokenizer.get_vocab()
    ids = [tokenizer.eos_token_id, *_named_ends(Path(tokenizer.name_or_path))]
    ids += [vocabulary[token] for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if token in vocabulary]
    return sorted({int(token) for token in ids if token is not None})


def _named_ends(folder: Path) -> list[int]:
    """The eos ids of a base folder's generation_config.json; without that file, of its config.json."""
    path = next((path for name in ("generation_config.json", "config.json") if (path := folder / name).is_file()), None)
    named: Any = read_json(path).get("eos_token_id") if path else None
    return list(cast("list[int]", named)) if isinstance(named, list) else [named] if isinstance(named, int) else []


def template_hash(source: str | None) -> str:
    """sha256 (64 hex) of a chat template's Jinja; None is plain text."""
    return hashlib.sha256((source or PLAIN).encode()).hexdigest()


def own_template(folder: Path) -> str | None:
    """The chat template that a base folder brings, as engines render by it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    given: Any = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(given, list):  # several, by name
        entries = cast("list[dict[str, str]]", given)
        given = next((entry["template"] for entry in entries if entry.get("name") == "default"), None)
    return given or None


def write_template(folder: Path, source: str | None) -> None:
    """Let that be the chat template which a base folder brings; None: it has none."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if config.is_file() and "chat_template" in (content := read_json(config)):
        content = {key: value for key, value in content.items() if key != "chat_template"}
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(source, encoding="utf-8")


def check_whole(folder: Path, loading: Mapping[str, Any], *, pooler: bool = False) -> None:
    """`loading`: transformers' own account. What the files do not hold it draws at random: BaseError. Many lack a pooler, on which no
    vector here depends; `pooler`: what is asked for does.
    """
    missing: Collection[str] = loading["missing_keys"]
    if lost := sorted(name for name in missing if pooler or "pooler" not in name.split(".")):
        if any(name.endswith(".qweight") for name in loading["unexpected_keys"]):
            raise BaseError(f"{folder.name}: its weights are packed (qweight), and its config.json has no quantization_config")
        listed = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        raise BaseError(f"{folder.name} lacks {len(lost)} of its weights ({listed}): download or save it again, whole")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BaseNotFound(f"{path.parent} holds no {path.name}: it is not a model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{path.parent.name}/{path.name} is malformed ({error}): download it again") from None
    if not isinstance(content, dict):
        raise BaseError(f"{path.parent.name}/{path.name} holds no object: it is not a model's")
    return cast("dict[str, Any]", content)


def tokenizer_of(folder: Path) -> Any:
    """A base folder's tokenizer, as transformers reads it. BaseError."""
    from transformers import AutoTokenizer

    with told(folder, "its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else transformers asks whoever sits there


@contextmanager
def told(folder: Path, what: str = "it cannot be loaded") -> Generator[None]:
    """Whatever transformers and what it calls raise about a folder's files becomes a BaseError with their reason."""
    try:
        yield
    except EmbedftError:
        raise
    except Exception as error:
        said = str(error).strip()
        reason = next((ours for theirs, ours in _REASONS.items() if theirs in said), said.split("\n")[0][:300] or type(error).__name__)
        raise BaseError(f"{folder.name}: {what}: {reason}") from error


_REASONS = {  # what transformers says in words for a programmer
    "trust_remote_code": "it brings code of its own, which is never run here: take one of a family that transformers knows",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says: download both again, from one place",
    "backend tokenizer": "it has no tokenizer's files (tokenizer.json, or tokenizer.model): copy them from where its weights are from",
}
