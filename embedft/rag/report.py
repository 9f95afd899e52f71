"""An evaluation as report.json, report.md with its figures beside it, and report.html with them inside. Knows no engine."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FIGURES = (
    ("retrieval", "ndcg@10", "nDCG@10", "stage"),
    ("answers", "f1", "F1", "reader"),
    ("answers", "faithfulness", "faithfulness", "reader"),
)


def write_report(out: Path, report: dict[str, Any]) -> list[Path]:
    """Write all of it into `out`; returns the paths of JSON, Markdown, HTML and the figures."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"report.{kind}" for kind in ("json", "md", "html")]
    paths[0].write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tables, figures = list(_tables(report)), dict(_figures(report))
    for name, content in figures.items():
        paths.append(out / f"{name}.png")
        paths[-1].write_bytes(content)
    paths[1].write_text("\n".join(_markdown(report, tables, list(figures))) + "\n", encoding="utf-8")
    paths[2].write_text(_html(report, tables, figures), encoding="utf-8")
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


def _markdown(report: dict[str, Any], tables: Sequence[Table], figures: Sequence[str]) -> Iterable[str]:
    yield f"# RAG evaluation: {report['data']}, {report['questions']} questions\n\nIn brackets: 95 % bootstrap intervals.\n"
    yield from (f"Note: {note}.\n" for note in report.get("notes", ()))
    for title, head, rows in tables:
        yield f"## {title}\n\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head)
        yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        yield ""
    yield from (f"![{name} with 95 % intervals]({name}.png)\n" for name in figures)


def _html(report: dict[str, Any], tables: Sequence[Table], figures: Mapping[str, bytes]) -> str:
    parts = [
        f"<h1>RAG evaluation: {html.escape(report['data'])}, {report['questions']} questions</h1><p>In brackets: 95 % bootstrap intervals."
    ]
    parts += [f"<p>Note: {html.escape(note)}." for note in report.get("notes", ())]
    for title, head, rows in tables:
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("</table>")
    for name, content in figures.items():
        packed = base64.b64encode(content).decode()
        parts.append(f'<p><img alt="{name} with 95 % intervals" src="data:image/png;base64,{packed}">')
    style = "body{font:15px sans-serif;margin:2em auto;max-width:75em}table{border-collapse:collapse}td,th{border:1px solid;padding:.3em}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>RAG evaluation</title><style>{style}</style>{"".join(parts)}</html>\n'
    )


def _figures(report: dict[str, Any]) -> Iterable[tuple[str, bytes]]:
    """(name, PNG) of each metric that some row has."""
    for key, metric, label, second in FIGURES:
        rows = [row for row in report[key] if metric in row["metrics"]]
        if rows:
            names = [f"{row['retriever']}, {row[second]}" for row in rows]
            yield f"{key}-{metric.partition('@')[0]}", _bars(names, [row["metrics"][metric] for row in rows], label)


def _bars(names: Sequence[str], metrics: Sequence[dict[str, Any]], label: str) -> bytes:
    """Means with their intervals, the first row on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1))
    means = [metric["mean"] for metric in metrics]
    ends = [[abs(metric["ci95"][end] - metric["mean"]) for metric in metrics] for end in (0, 1)]
    axes.barh(range(len(names)), means, xerr=ends, color="#2f6f9f", height=0.6, error_kw={"ecolor": "#333", "capsize": 3})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=130)
    pyplot.close(figure)
    return content.getvalue()
