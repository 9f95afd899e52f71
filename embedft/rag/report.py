"""An evaluation as report.json, report.md and report.html with its figure inside. Knows no engine."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_report(out: Path, report: dict[str, Any]) -> list[Path]:
    """Write all three into `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"report.{kind}" for kind in ("json", "md", "html")]
    paths[0].write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tables = list(_tables(report))
    paths[1].write_text("\n".join(_markdown(report, tables)) + "\n", encoding="utf-8")
    paths[2].write_text(_html(report, tables), encoding="utf-8")
    return paths


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows


def _tables(report: dict[str, Any]) -> Iterable[Table]:
    for key, title, first in (
        ("retrieval", "What each adapter and each stage finds", ("retriever", "stage")),
        ("answers", "What is answered from it", ("retriever", "reader")),
    ):
        rows = report[key]
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
        head = (*first, *names, f"gain in {names[-1]} over the first row, 95 %", "note")
        yield title, head, [_row(row, first, names) for row in rows]
    if report["indexes"]:
        head = ("lineage", "made by", "chunks", "kind", "bytes", "built in", "searched by")
        yield (
            "Indexes",
            head,
            [
                (
                    row["lineage"][:12],
                    row["made_by"],
                    f"{row['chunks']:,}",
                    row["kind"],
                    f"{row['bytes']:,}" if "bytes" in row else "–",
                    f"{row['seconds']:.1f} s" if "seconds" in row else "–",
                    ", ".join(row["adapters"]) or "all",
                )
                for row in report["indexes"]
            ],
        )


def _row(row: dict[str, Any], first: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    cells = [_cell(row["metrics"].get(name)) for name in names]
    return (*(str(row[key]) for key in first), *cells, _gain(row, names[-1]), row["note"])


def _cell(metric: dict[str, Any] | None) -> str:
    return f"{metric['mean']:.3f} ({metric['ci95'][0]:.3f} … {metric['ci95'][1]:.3f})" if metric else "–"


def _gain(row: dict[str, Any], name: str) -> str:
    gain = row["metrics"].get(name, {}).get("gain_ci95")
    return f"{gain[0]:+.3f} … {gain[1]:+.3f}" if gain else "–"


def _markdown(report: dict[str, Any], tables: Sequence[Table]) -> Iterable[str]:
    yield f"# RAG evaluation: {report['data']}, {report['questions']} questions\n\nIn brackets: 95 % bootstrap intervals.\n"
    for title, head, rows in tables:
        yield f"## {title}\n\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head)
        yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        yield ""


def _html(report: dict[str, Any], tables: Sequence[Table]) -> str:
    parts = [f"<h1>RAG evaluation: {html.escape(report['data'])}, {report['questions']} questions</h1>"]
    if report["retrieval"]:
        parts.append(f'<img alt="scores with intervals" src="data:image/png;base64,{_figure(report["retrieval"])}">')
    for title, head, rows in tables:
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("</table>")
    style = "body{font:15px sans-serif;margin:2em auto;max-width:75em}table{border-collapse:collapse}td,th{border:1px solid;padding:.3em}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>RAG evaluation</title><style>{style}</style>{"".join(parts)}</html>\n'
    )


def _figure(rows: Sequence[dict[str, Any]]) -> str:
    """nDCG@10 of each row with its interval, as base64 PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 1))
    means = [row["metrics"]["ndcg@10"]["mean"] for row in rows]
    below = [mean - row["metrics"]["ndcg@10"]["ci95"][0] for mean, row in zip(means, rows, strict=True)]
    above = [row["metrics"]["ndcg@10"]["ci95"][1] - mean for mean, row in zip(means, rows, strict=True)]
    axes.barh(range(len(rows)), means, xerr=[below, above], color="#2f6f9f", height=0.6, error_kw={"ecolor": "#333", "capsize": 3})
    axes.set_yticks(range(len(rows)), [f"{row['retriever']}, {row['stage']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("nDCG@10")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=130)
    pyplot.close(figure)
    return base64.b64encode(content.getvalue()).decode()
