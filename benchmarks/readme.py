"""Writes the READMEs' figures from benchmarks/results/, between its `<!-- name -->` and `<!-- /name -->` marks.

python benchmarks/readme.py            write            python benchmarks/readme.py --check    exit 1 where they differ
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from benchmarks import readme_training as training  # noqa: E402
from benchmarks.readme_rag import rag_table, rag_text  # noqa: E402
from benchmarks.sharing.report import headlines, summaries  # noqa: E402


def demo_table(demo: dict[str, Any]) -> str:
    head = "| adapter | base model | metric | base | BM25 | adapter | gain, 95 % interval |\n|---|---|---|---|---|---|---|\n"
    rows: list[str] = []
    for row in demo["quality"]:
        model = "MiniLM, NF4" if row["task"] == "embedding" else "seed-lm, NF4"
        bm25 = "–" if row["bm25"] is None else f"{row['bm25']:.3f}"
        low, high = row["gain_ci95"]
        cells = (row["adapter"], model, row["metric"], f"{row['base']:.3f}", bm25, f"{row['score']:.3f}", f"{low:+.3f} … {high:+.3f}")
        rows.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(rows)


def demo_text(demo: dict[str, Any]) -> str:
    machine, switch = demo["machine"], demo["switch_ms"]
    costs = " and ".join(
        f"{max(switch[task]['cost'], 0):.1f} ms ({label})" for task, label in (("embedding", "MiniLM"), ("causal_lm", "seed-lm"))
    )
    error = max(row["error"] for row in demo["parity"])
    cores, seconds = f"{machine['cores']} CPU cores ({machine['cpu_capability']}, no GPU)", f"{demo['seconds'] / 60:.1f} minutes"
    return (
        f"Measured on {cores}, all of it in {seconds}. Changing the adapter from one request to the\n"
        f"next cost {costs} at the median. The adapters' effects in the serving engine differed from\n"
        f"the trainer's by at most {error:.1e} of their norm. From [demo.json](benchmarks/results/demo.json), made by `benchmarks/demo.py`."
    )


def gateway_text(reports: dict[str, dict[str, Any]]) -> str:
    """What the gateway adds to either engine, beside what we want."""
    rows = [
        f"| `{report['engine']}` | {name} | {row['direct_p50_ms']:.1f} | {row['added_ms']:+.1f} | {row['throughput_ratio']:.2f} |"
        for report in reports.values()
        for name, row in report["workloads"].items()
    ]
    cores = next(iter(reports.values()))["machine"]["cores"]
    return "\n".join(
        [
            f"What the gateway adds, with client, gateway and engine on the same {cores} cores (aim: at most 2 ms, at least 0.95):",
            "",
            "| engine | request | asked directly, p50 ms | through the gateway, ms more | requests a second, of the direct ones |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "The same requests to the same engine process, by turns. Below 0 and above 1: the gateway has its own way to vectors,",
            "past OpenAI's schemas, and one connection for all it asks.",
            "From `benchmarks/results/gateway-*.json`, made by `benchmarks/gateway.py`.",
        ]
    )


def soak_text(reports: dict[str, dict[str, Any]]) -> str:
    """What came of long mixed traffic, by engine."""
    said = (
        f"{one['seconds'] / 60:.0f} minutes of zipf traffic over {one['adapters']} adapters{_in_slots(one)} "
        f"on the `{one['engine']}` engine "
        f"({one['cores_used']} core{'s'[: one['cores_used'] > 1]}), with {one['done']['reload']} reloads, "
        f"{sum(count for kind, count in one['done'].items() if kind.startswith('bad load refused'))} bad loads, "
        f"{one['cancelled']} cancelled streams and {one['done'].get('kill', 0) or 'no'} engine kills:\n{one['sent']} requests sent, "
        f"{one['answered']} answered, {sum(one['refused'].values())} refused while an engine was away, "
        f"**{one['wrong']} wrong, {one['lost']} lost**; {_memory_of(one)}."
        for one in reports.values()
    )
    return (
        "\n".join(said)
        + "\nFrom `benchmarks/results/soak-*.json`, made by `benchmarks/soak.py`, which holds every answer against the adapter's own."
    )


def _in_slots(soaked: dict[str, Any]) -> str:
    return f" in {soaked['slots']} slots" if soaked["slots"] else ""


def _memory_of(soaked: dict[str, Any]) -> str:
    """How slots and caches fill, and whether that ends; after a kill it begins anew."""
    minutes = " ".join(map(str, soaked["memory_mib_by_minute"]))
    if soaked["done"].get("kill"):  # a line through what falls with each kill would slope nowhere
        return f"memory by the minute, in MiB, which an engine begins anew after each kill: {minutes}"
    return f"memory by the minute, in MiB, while slots and caches fill: {minutes}"


PLUGIN = "serve/vllm_cpu_lora/README.md"
BLOCKS: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "demo-table": ("README.md", "demo.json", demo_table),
    "demo-text": ("README.md", "demo.json", demo_text),
    "gateway-text": ("README.md", "gateway-*.json", gateway_text),
    "soak-text": ("README.md", "soak-*.json", soak_text),
    "retrieval-table": ("README.md", "retrieval_*.json", training.retrieval_table),
    "retrieval-text": ("README.md", "retrieval_*.json", training.retrieval_text),
    "speed-table": ("README.md", "train_embed_*.json", training.speed_tables),
    "speed-text": ("README.md", "train_embed_*.json", training.speed_text),
    "attention-text": ("README.md", "packed_attention.json", training.attention_text),
    "plan-text": ("README.md", "plan.json", training.plan_text),
    "tasks-table": ("README.md", "lm_tasks.json", training.tasks_table),
    "tasks-text": ("README.md", "lm_tasks.json", training.tasks_text),
    "lm-speed-text": ("README.md", "train_lm_*.json", training.lm_speed_text),
    "methods-table": ("README.md", "methods*.json", training.methods_table),
    "methods-text": ("README.md", "methods*.json", training.methods_text),
    "rag-table": ("README.md", "rag.json", rag_table),
    "rag-text": ("README.md", "rag.json", rag_text),
    "share-text": ("README.md", "share_the_base_*.json", headlines),
    "plugin-table": (PLUGIN, "share_the_base_*.json", summaries),
}


def rendered(page: str, text: str) -> str:
    """One README with each of its blocks made anew."""
    for name, (_, source, render) in ((name, block) for name, block in BLOCKS.items() if block[0] == page):
        files = {
            path.stem.partition("_")[2] or path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(source))
        }
        content = render(files if "*" in source else next(iter(files.values())))
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no block {name}")
        text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)
    return text


def main() -> None:
    for page in dict.fromkeys(block[0] for block in BLOCKS.values()):
        text = (ROOT / page).read_text(encoding="utf-8")
        made = rendered(page, text)
        if made == text:
            continue
        if "--check" in sys.argv:
            raise SystemExit(f"{page} differs from benchmarks/results: run python benchmarks/readme.py")
        (ROOT / page).write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
