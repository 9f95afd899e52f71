"""The demo's findings as report.json, report.md and one figure."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write all three into `out`."""
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _figure(out / "report.png", report["quality"])
    (out / "report.md").write_text("\n".join(_markdown(report, adapters=out / "adapters")) + "\n", encoding="utf-8")


def _markdown(report: dict[str, Any], *, adapters: Path) -> Iterable[str]:
    engines = ", ".join(f"{base} in {engine}" for base, engine in report["engines"].items())
    yield f"# embedft demo: four adapters, two quantized bases, one server ({engines})\n"
    if report["quick"]:
        yield "Made with --quick, on a fraction of the data: it shows that all works here, not how much the adapters gain.\n"
    yield "## Quality on held-out data\n"
    yield from _table(
        ("adapter", "metric", "base", "BM25", "adapter", "gain, 95 % interval", "trained in"),
        [
            (
                row["adapter"],
                row["metric"],
                f"{row['base']:.3f}",
                "–" if row["bm25"] is None else f"{row['bm25']:.3f}",
                f"{row['score']:.3f}",
                f"{row['gain_ci95'][0]:+.3f} … {row['gain_ci95'][1]:+.3f}",
                f"{row['train_seconds']:.0f} s",
            )
            for row in report["quality"]
        ],
    )
    answers = report["answers"]
    yield "\n![base, BM25 and adapter](report.png)\n\n## The same input, answered by the base, by A and by B\n"
    yield f"Query: {answers['query']!r}\n"
    yield from _table(("adapter", "cosine of its vector to the base's"), [(k, f"{v:.4f}") for k, v in answers["cosine_to_base"].items()])
    yield f"\nPrompt:\n\n```\n{answers['prompt']}\n```\n"
    yield from _table(("answered by", "answer"), [(name, "`" + text.replace("\n", " ") + "`") for name, text in answers["answers"].items()])
    yield "\n## Switching\n"
    yield from _table(
        ("", "same adapter again", "another adapter", "cost of the switch"),
        [(task, *(f"{row[key]:.1f} ms" for key in ("same", "switched", "cost"))) for task, row in report["switch_ms"].items()],
    )
    yield "\n## Memory\n"
    yield from _table(
        ("base", "way", "adapters", "model", "process"),
        [(r["base"], r["way"], str(r["adapters"]), _mb(r["model_bytes"]), _mb(r["process_bytes"])) for r in report["memory_bytes"]],
    )
    yield f"\nThe server itself, gateway and both engines with their runtimes: {_mb(report['server_memory_bytes'])}.\n"
    yield "## Probes through the engine\n"
    yield from _table(
        ("adapter", "error of its effect", "allowed"),
        [(row["adapter"], f"{row['error']:.5f}", f"{row['tolerance']:.3f}") for row in report["parity"]],
    )
    first = report["quality"][0]["adapter"]
    yield (
        f"\nReady {report['ready_seconds']:.0f} s after its start; {report['seconds']:.0f} s in all.\n\n## Next\n\n```\n"
        f"embedft serve --adapters {adapters}\n"
        'curl localhost:8000/v1/embeddings -H "content-type: application/json" \\\n'
        f'  -d \'{{"adapter": "{first}", "input": "a query", "input_type": "query"}}\'\n'
        f"embedft recipes list\nembedft adapters list --adapters {adapters}\n```"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _figure(path: Path, quality: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.4))
    sides = (("base", "#9aa5b1", "base"), ("bm25", "#d9b26f", "BM25"), ("score", "#2f6f9f", "adapter"))
    for offset, (key, colour, label) in enumerate(sides):
        heights = [row[key] if row[key] is not None else 0.0 for row in quality]
        bars = axes.bar([i + 0.26 * (offset - 1) for i in range(len(quality))], heights, 0.24, color=colour, label=label)
        axes.bar_label(bars, labels=["" if row[key] is None else f"{row[key]:.2f}" for row in quality], fontsize=8, padding=1)
    axes.set_xticks(range(len(quality)), [f"{row['adapter']}\n{row['metric']}" for row in quality])
    axes.set_ylim(0, 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.12))
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
