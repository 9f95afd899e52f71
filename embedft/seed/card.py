"""seed-lm's model card from measured figures alone. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedft.seed.model import Shape


def card(scores: Mapping[str, Any], data: Mapping[str, Any], shape: Shape, *, parameters: int, history: str = "") -> str:
    """Markdown for the export's README.md; `scores` as in scores.json, `data` as in data.json.

    `history` tells what the script's own defaults do not: say, that a run was begun with others.
    """
    extra = f"\n{history}" if history else ""
    kinds = "\n".join(f"| {kind} | {share:.1%} |" for kind, share in scores["exact_match_by_kind"].items())
    tokens = data["tokens"]
    packages = ", ".join(sorted(data["packages"]))
    state = "the whole schedule" if scores["finished"] else "a schedule that was cut short"
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# seed-lm

A small causal language model for demos, tests and offline work, and for nothing else: it is far from trained to its limit
({scores["tokens"] / 1e6:.1f} million tokens for {parameters / 1e6:.1f} million parameters). It knows hardly any facts, and its prose
wanders. Use a real base (SmolLM2, Qwen3) wherever quality counts.

Llama architecture: {shape.layers} layers, hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.heads} heads of
{shape.hidden // shape.heads} ({shape.kv_heads} key-value heads), context {shape.context}, tied embeddings,
byte-level BPE of {shape.vocab} entries, ChatML template. The weights are bf16, trained in float32
(products in bf16 where the machine has them).

## Data
| stream | tokens at hand | what |
|---|---|---|
| prose | {tokens["prose"]:,} | {data["books"]} public-domain books, an equal share of each |
| code | {tokens["code"]:,} | source files, docstrings included, of installed Python packages under permissive licences |
| tasks | {tokens["tasks"]:,} | {data["examples"]:,} chat examples made from both by script (`embedft/seed/tasks.py`) |

The tasks: extractive questions over three short passages, cloze and continuation questions, function and docstring, repeat and quote.
A batch takes 30 % of its rows from prose, 20 % from code and 50 % from tasks, whose answer tokens weigh four times as much; besides,
up to a quarter of its rows are random runs of tokens said two to four times.
Packages read: {packages}.

## Training
{scores["step"]:,} steps, {scores["tokens"]:,} tokens, {scores["seconds"] / 60:.0f} minutes on a CPU, {state}:
Muon and AdamW, warm-up, level, linear decay; sequences of 512 tokens, in every eighth step of 2,048. Copying is guided:
for 40 % of the run an added loss points one attention head at the previous token and two at the place to copy
from, and a tenth of it stays to the end.{extra}

## Held-out scores
Documents are held out whole ({data["books_held_out"]} books, one source file in 40).

| what | value |
|---|---|
| bits per character, books' prose | {scores["prose_bits_per_character"]:.3f} |
| bits per character, code | {scores["code_bits_per_character"]:.3f} |
| three-passage extractive questions, exact match over {scores["questions"]} | {scores["exact_match"]:.1%} |

Exact match is greedy and to the last character. An answer is a span of one of three passages: whoever always found the right kind
of span but drew the passage by chance would get 33.3 %, a random span practically 0 %. By kind of
question (made like the training's, from documents never trained on):

| kind | exact match |
|---|---|
{kinds}

## How to make it again
    python -m embedft.seed.pretrain --books BOOKS.txt.xz --out WORK --hours 2.2

`BOOKS` is text with books separated by U+001E; without it only packages are read. The run resumes after a stop;
`WORK/export` is this folder.
Other machines have other packages installed, so the result has other weights.

Licence of the weights: Apache-2.0.
"""
