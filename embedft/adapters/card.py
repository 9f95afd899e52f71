"""The README.md of an adapter folder: a model card made from its passport and nothing else."""

import json
from collections.abc import Mapping
from typing import Any

from embedft.adapters.passport import Passport

CARD = "README.md"


def model_card(passport: Passport) -> str:
    """Markdown with the front matter that model hubs read."""
    base, settings = passport.base, {"r": passport.r, "alpha": passport.alpha}
    library = "sentence-transformers" if passport.task == "embedding" else "peft"
    front = [
        "---",
        f"base_model: {json.dumps(base.model)}",
        f"library_name: {library}",
        f"tags: [embedft, {passport.method}]",
        "---",
    ]
    facts = [
        ("Task", passport.task),
        ("Base", f"`{base.model}`" + (f" at `{base.revision}`" if base.revision else "")),
        ("Base's quantization", base.quantization),
        ("Base's fingerprint", f"`{base.fingerprint}`"),
        ("Method", ", ".join([passport.method, *(f"{key}={value:g}" for key, value in settings.items() if value)])),
        ("Longest input", f"{passport.max_length} tokens"),
        ("Made", passport.created),
    ]
    if passport.task == "embedding":
        pooled = f"{passport.pooling} pooling" + (", normalised" if passport.normalize else "")
        facts[5:5] = [
            ("Vectors", pooled),
            ("Prompts", f"`{json.dumps(passport.prompts, ensure_ascii=False)}`"),
            ("Side", passport.side),
        ]
    lines = [*front, "", f"# {passport.name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]
    return "\n".join([*lines, "", *_quality(passport.metrics), *_use(passport)]) + "\n"


def _quality(metrics: Mapping[str, Any]) -> list[str]:
    if combined := metrics.get("combined"):
        parts = ", ".join(f"{weight:g} × {name}" for name, weight in zip(combined["of"], combined["weights"], strict=True))
        return [f"The sum of {parts}, by {combined['how']}. Not evaluated.", ""]
    columns = [name for name in ("base", "bm25", "adapter") if isinstance(metrics.get(name), Mapping)]
    if not columns:
        return ["Not evaluated: the recipe names no evaluation data.", ""]
    names = list(metrics[columns[-1]])
    rows = [f"| {name} | " + " | ".join(_number(metrics[column].get(name)) for column in columns) + " |" for name in names]
    lines = ["## Quality", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows, ""]
    if interval := metrics.get("gain_ci95"):
        low, high = interval
        lines += [f"Gain over the base: 95 % interval {low:+.4f} to {high:+.4f} (paired bootstrap over the evaluation rows).", ""]
    if made := metrics.get("converted"):
        need = "an exact copy" if made["rank"] >= made["exact_rank"] else f"an exact copy needs rank {made['exact_rank']}"
        lines += [f"Measured on {made['of']} ({made['method']}), before it was converted to LoRA of rank {made['rank']}; {need}.", ""]
    return lines


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _use(passport: Passport) -> list[str]:
    text = [
        "## Use",
        "",
        f'`embedft serve` applies it to requests with `"adapter": "{passport.name}"`, after its probes have passed.',
        "",
    ]
    if passport.base.quantization != "none":
        text += [
            f"It was trained on the base in {passport.base.quantization}; on the unquantized base its outputs differ a little.",
            "",
        ]
    return text
