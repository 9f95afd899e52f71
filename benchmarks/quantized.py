"""One base in every quantization: size, what it loses, how fast it runs, who serves it.

python benchmarks/quantized.py CALIBRATION HELD_OUT → benchmarks/results/quantized.json and the page quantized.md beside it
Both are folders of Markdown, apart from each other. Loss: bits a character on the held-out text, and the mean KL divergence of the next
token from the full-precision base. Speed: transformers on this machine, one thread pool for all; vLLM has faster kernels for some.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import table

RESULTS = Path(__file__).parent / "results" / "quantized.json"
KINDS = (("none", False), ("int8", False), ("nf4", False), ("w8a8", False), ("w4a16", False), ("w4a16", True))
WINDOW, WINDOWS = 256, 40
SERVED = {
    "none": "vLLM, peft",
    "int8": "vLLM (vllm-bnb-plugin), peft",
    "nf4": "vLLM (vllm-bnb-plugin), peft",
    "w8a8": "vLLM (which rounds activations too), peft",
    "w4a16": "vLLM, peft",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--base", default="seed-lm")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    reference: Any = None
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "calibration.txt"
        texts.write_text("\n".join(paragraphs(arguments.calibration)), encoding="utf-8")
        for kind, calibrated in KINDS:
            weights = quantized(arguments.base, kind, Path(folder) / f"{kind}-{calibrated}", texts if calibrated else None)
            row, logits = measured(weights, arguments.held_out, reference)
            reference = logits if reference is None else reference
            rows.append({"base": kind + (" (GPTQ)" if calibrated else ""), **row, "served_by": SERVED[kind]})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
    write(rows, arguments)


def paragraphs(folder: Path) -> list[str]:
    """Lines of 40 characters or more, of all Markdown files in order."""
    files = sorted(folder.rglob("*.md"))
    return [line.strip() for path in files for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) >= 40]


def quantized(base: str, kind: str, out: Path, calibration: Path | None) -> Path:
    from embedft.base import BaseSpec, source_folder
    from embedft.quantize import quantize

    source = source_folder(BaseSpec(base))
    return source if kind == "none" else quantize(source, out, scheme=kind, calibration=calibration)


def measured(weights: Path, held_out: Path, reference: Any) -> tuple[dict[str, Any], Any]:
    import torch
    from transformers import AutoTokenizer

    from embedft.base import load_model
    from embedft.footprint import tensor_bytes

    model: Any = load_model(weights, task="causal_lm")
    tokenizer: Any = AutoTokenizer.from_pretrained(weights)
    ids = tokenizer("\n".join(paragraphs(held_out)), add_special_tokens=False)["input_ids"][: WINDOW * WINDOWS]
    batch = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    with torch.inference_mode():
        model(input_ids=batch[:8])  # thread pools, kernels, the weights' pages: not counted
        began = time.perf_counter()
        parts = [model(input_ids=part).logits for part in batch.split(8)]
        seconds = time.perf_counter() - began
        logits = torch.cat([part.float() for part in parts])
        prompt = batch[:8, :32]
        model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)
        again = time.perf_counter()
        made = model.generate(input_ids=prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        decoding = time.perf_counter() - again
    scores = logits[:, :-1].log_softmax(-1)
    bits = -float(scores.gather(2, batch[:, 1:, None]).sum()) / math.log(2)
    characters = sum(len(tokenizer.decode(row[1:])) for row in batch.tolist())
    divergence = 0.0 if reference is None else float((reference.exp() * (reference - scores)).sum(-1).mean()) / math.log(2)
    row = {
        "file_mib": sum(path.stat().st_size for path in weights.glob("*.safetensors")) / 2**20,
        "loaded_mib": tensor_bytes(model) / 2**20,
        "bits_per_character": bits / characters,
        "kl_bits": divergence,
        "prefill_tokens_per_second": batch.numel() / seconds,
        "decode_tokens_per_second": (made.shape[1] - prompt.shape[1]) * len(prompt) / decoding,
    }
    return row, scores


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:

    from benchmarks.machine import machine

    made = {"model": arguments.base, "held_out": arguments.held_out.name, "machine": machine(), "rows": rows}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(f"# {arguments.base}, quantized\n\n{quantized_table(made)}\n", encoding="utf-8")


def quantized_table(made: dict[str, Any]) -> str:
    rows = [
        (
            row["base"],
            f"{row['file_mib']:.1f}",
            f"{row['bits_per_character']:.3f}",
            f"{row['kl_bits']:.4f}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            row["served_by"],
        )
        for row in made["rows"]
    ]
    return table(("base", "MiB", "bits per character", "KL from full, bits", "prefill tokens/s", "decode tokens/s", "served by"), rows)


if __name__ == "__main__":
    main()
