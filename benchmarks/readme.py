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

from benchmarks.readme_rag import rag_table, rag_text  # noqa: E402
from benchmarks.sharing.report import headline as share_text  # noqa: E402
from benchmarks.sharing.report import summary  # noqa: E402


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


def retrieval_table(results: dict[str, dict[str, Any]]) -> str:
    head = (
        "| data | queries · documents | base | BM25 | adapter | query-only adapter | BM25 + adapter | adapter − base | adapter − BM25 |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    rows: list[str] = []
    for name, result in results.items():
        both, metric = result["adapters"]["both"], result["metric"]
        query = result["adapters"].get("query")
        intervals = [f"{low:+.3f} … {high:+.3f}" for low, high in (both["intervals"][f"adapter - {side}"] for side in ("base", "bm25"))]
        scores = [f"{result[side][metric]:.3f}" for side in ("base", "bm25")] + [f"{both['adapter'][metric]:.3f}"]
        scores += [f"{query['adapter'][metric]:.3f}" if query else "–", f"{both['fused'][metric]:.3f}"]
        label = f"[{name}](benchmarks/results/retrieval_{name}.json)"
        rows.append("| " + " | ".join([label, f"{result['queries']:,} · {result['documents']:,}", *scores, *intervals]) + " |")
    return head + "\n".join(rows)


def retrieval_text(results: dict[str, dict[str, Any]]) -> str:
    """The comparison with the published figures, whichever way it goes."""
    finance = results["finance_10k"]
    adapter, fused, published = (*(finance["adapters"]["both"][name] for name in ("adapter", "fused")), finance["published"])
    metrics = ("hit@5", "mrr@10", "ndcg@10")

    def figures(scores: dict[str, float]) -> str:
        return ", ".join(f"{metric} {scores[metric]:.3f}" for metric in metrics)

    reached = all(adapter[metric] > published[metric][1] for metric in metrics)
    return (
        f"finance_10k against {published['source']} ({', '.join(f'{m} {published[m][0]:.3f} → {published[m][1]:.3f}' for m in metrics)}):\n"
        f"MiniLM with the adapter has {figures(adapter)}; fused with BM25 {figures(fused)}; BM25 alone {figures(finance['bm25'])}.\n"
        + (
            "The adapter is above the published figures."
            if reached
            else "The adapter alone does **not** reach them: MiniLM reads 256 tokens, and these chunks have a thousand."
        )
    )


def speed_table(report: dict[str, Any]) -> str:
    head = "| longest text | sentence-transformers | ours, all layers | ours, last two layers | ours, query-only |\n|---|---|---|---|---|\n"
    rows: list[str] = []
    for length, part in sorted(report["lengths"].items(), key=lambda item: int(item[0])):
        sides = part["sides"]
        cells = [f"{sides['stock']['pairs_per_second']:.1f} pairs/s"]
        cells += [
            f"{sides[side]['pairs_per_second']:.1f} ({sides[side]['times_stock']:.1f}×)" for side in ("ours", "ours_last2", "ours_query")
        ]
        rows.append("| " + " | ".join([f"{length} tokens", *cells]) + " |")
    return head + "\n".join(rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def methods_table(made: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for row in made["rows"]:
        if "failed" in row:
            rows.append((row["method"], row["base"], *["–"] * 5, row["failed"]))
            continue
        given = row["vllm"]
        vllm = "as it is" if given == "yes" else f"as LoRA of rank {given['rank']}" if isinstance(given, dict) else "no"
        score, change = f"{row['exact_match']:.3f}", f"{row['gain_ci95'][0]:+.3f} … {row['gain_ci95'][1]:+.3f}"
        size = f"{row['adapter_bytes'] / 2**10:,.0f}"
        cells = (row["method"], row["base"], score, change, f"{row['trainable']:,}", size, f"{row['seconds']:.0f}", vllm)
        rows.append(cells)
    head = ("method", "base", "exact match", "gain, 95 % interval", "trained", "KiB", "s", "vLLM")
    return _table(head, rows)


def tasks_table(made: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for row in made["rows"]:
        base, score = f"{row['base']:.3f}", f"{row['score']:.3f}"
        share = f"{row['trainable_percent']:.1f}"
        rows.append((row["task"], row["metric"], row["method"], base, score, share, str(row["peak_mib"]), f"{row['seconds']:.0f}"))
    return _table(("task", "metric", "method", "base", "adapter", "% trained", "peak MiB", "s"), rows)


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
    return _table(("base", "MiB", "bits per character", "KL from full, bits", "prefill tokens/s", "decode tokens/s", "served by"), rows)


PLUGIN = "serve/vllm_cpu_lora/README.md"
BLOCKS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "demo-table": ("README.md", "demo.json", demo_table),
    "demo-text": ("README.md", "demo.json", demo_text),
    "rag-table": ("README.md", "rag.json", rag_table),
    "rag-text": ("README.md", "rag.json", rag_text),
    "share-text": ("README.md", "share_the_base.json", share_text),
    "plugin-table": (PLUGIN, "share_the_base.json", summary),
}


def rendered(page: str, text: str) -> str:
    """One README with each of its blocks made anew."""
    for name, (_, source, render) in ((name, block) for name, block in BLOCKS.items() if block[0] == page):
        files = {path.stem.partition("_")[2]: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(source))}
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
        if made != text and "--check" in sys.argv:
            raise SystemExit(f"{page} differs from benchmarks/results: run python benchmarks/readme.py")
        (ROOT / page).write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
