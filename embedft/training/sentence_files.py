"""The files by which plain sentence-transformers loads an adapter folder and pools, prompts and truncates as in training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedft.encode import EncodeSettings

_MODULE = "sentence_transformers.models."


def write_sentence_files(folder: Path, tokenizer: Any, settings: "EncodeSettings", *, dimension: int) -> None:
    """Tokenizer, modules.json, 1_Pooling, 2_Normalize, prompts and max_seq_length.

    Without modules.json sentence-transformers mean-pools silently, whatever the base does.
    """
    tokenizer.save_pretrained(folder)
    _write_pooling(folder, settings, dimension)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    if settings.normalize:
        modules.append(("2", "2_Normalize", "Normalize"))
    listed = [{"idx": int(number), "name": number, "path": path, "type": _MODULE + kind} for number, path, kind in modules]
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": settings.max_length, "do_lower_case": False})
    prompts = {"query": settings.prompts.get("query", ""), "document": settings.prompts.get("document", "")}
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _write_pooling(folder: Path, settings: "EncodeSettings", dimension: int) -> None:
    """1_Pooling/config.json for vectors of `dimension` components, and 2_Normalize."""
    (folder / "1_Pooling").mkdir()
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dimension,
            "pooling_mode_cls_token": settings.pooling == "cls",
            "pooling_mode_mean_tokens": settings.pooling == "mean",
            "pooling_mode_lasttoken": settings.pooling == "lasttoken",
            "include_prompt": True,
        },
    )
    if settings.normalize:
        (folder / "2_Normalize").mkdir()
        _write(folder / "2_Normalize" / "config.json", {})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
