"""From a run's figures: JSON, tables in Markdown, two charts. Computes a ratio only between two sides of one run."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ORDER = [
    "vllm base",
    "vllm plugin",
    "vllm stock",
    "peft engine",
    "PEFT mixed batch",
    "PEFT set_adapter",
    "merged copies",
    "reload at switch",
]


class DifferentRuns(ValueError):
    """A ratio of two sides that were not measured in one run says nothing."""


def ratio(run: dict[str, Any], way: str, other: str, *, of: str = "rates", **cell: Any) -> float | None:
    """Median over rounds of way/other in one cell; None where either was not measured. Raises DifferentRuns."""
    found = [_row(run, label, **cell) for label in (way, other)]
    if None in found:
        return None
    mine, theirs = found
    if len(mine[of]) != len(theirs[of]) or mine.get("run", run["run"]) != theirs.get("run", run["run"]):
        raise DifferentRuns(f"{way} and {other} were not measured in one run")
    return median(a / b for a, b in zip(mine[of], theirs[of], strict=True))


def _row(run: dict[str, Any], way: str, **cell: Any) -> Any:
    wanted = {"arrivals": "closed", **cell, "way": way}
    return next((row for row in run["rows"] if all(row[key] == value for key, value in wanted.items())), None)


def write(run: dict[str, Any], out: Path) -> None:
    """share_the_base_<gpu_><dtype>.json, .md and two .png in `out`. Parts that an earlier run measured there on the same machine stay."""
    out.mkdir(parents=True, exist_ok=True)
    hardware = run["hardware"]
    where = re.sub(r"[^a-z0-9]+", "-", hardware["gpu"].lower()) + "_" if hardware.get("gpu") else ""
    name = f"share_the_base_{where}{hardware['dtype'].removeprefix('torch.')}"
    kept = out / f"{name}.json"
    if kept.exists():
        run = together(json.loads(kept.read_text()), run)
    kept.write_text(json.dumps(run, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(run))
    _chart(out / f"{name}_throughput.png", "requests per second", _throughput_lines(run, "embedding"))
    of = "gpu" if where else "pss"
    _chart(out / f"{name}_memory.png", f"MiB of the {'GPU' if where else 'process (PSS)'}", _memory_lines(run, "embedding", of))


def together(before: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """`run`, and the parts of `before` that it did not measure: each row names its own run. Another machine's are left out."""
    same, now = ([one["hardware"].get(key) for key in ("cpu", "flags", "cores_each_side", "dtype", "gpu")] for one in (before, run))
    if same != now or before["versions"] != run["versions"]:
        return run
    parts = {row["part"] for row in [*run["rows"], *run["memory"], *run["switching"]]} | run["sizes"].keys()
    kept = {key: [row for row in before[key] if row["part"] not in parts] for key in ("rows", "memory", "switching", "loading")}
    sizes = {part: size for part, size in before["sizes"].items() if part not in parts}
    return {**run, **{key: rows + run[key] for key, rows in kept.items()}, "sizes": sizes | run["sizes"]}


def markdown(run: dict[str, Any]) -> str:
    hardware = run["hardware"]
    gpu = f"{hardware['gpu']}; " if hardware.get("gpu") else ""
    lines = ["# Many adapters over one base, every way", ""]
    lines += [
        f"{gpu}{hardware['cpu']} ({', '.join(hardware['flags'])}), {hardware['cores_each_side']} cores for each side in turn, "
        f"{hardware['dtype']}, rank 16 on all linear layers, at most 32 requests in flight. "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + ". Ratios are medians over the rounds of one run, each of neighbours in time; a table is one run.",
        "",
    ]
    for part in dict.fromkeys(row["part"] for row in run["rows"]):
        lines += _throughput(run, part)
    lines += _memory(run, "pss", "PSS in MiB: of the process with the base alone (runtime and base), and what N adapters added. On disk:")
    if hardware.get("gpu"):
        lines += _memory(run, "gpu", "The same on the GPU, as torch reserved it:")
    lines += _switching(run)
    return "\n".join(lines) + "\n"


def _throughput(run: dict[str, Any], part: str) -> list[str]:
    heads = ["N", "popularity", "arrivals", "way", "requests/s", "of vLLM's base", "of vLLM stock", "CPU time, of base", "p50 ms", "p95 ms"]
    rounds = max(len(row["rates"]) for row in run["rows"] if row["part"] == part)
    lines = [f"## {part}: {rounds} round{'s'[: rounds > 1]}", ""]
    lines += [f"| {' | '.join(heads)} | first token ms |", "|---" * (len(heads) + 1) + "|"]
    for row in (row for row in run["rows"] if row["part"] == part):
        cell = {key: row[key] for key in ("part", "N", "popularity", "arrivals")}
        shares = [ratio(run, row["way"], "vllm base", **cell), ratio(run, row["way"], "vllm stock", **cell)]
        shares.append(ratio(run, row["way"], "vllm base", of="processor_seconds", **cell))
        first = "" if row["first_token_p50"] is None else f"{1000 * row['first_token_p50']:.0f}"
        told = [str(row["N"]), row["popularity"], row["arrivals"], row["way"], f"{row['throughput']:.2f}", *map(_number, shares)]
        lines.append("| " + " | ".join([*told, f"{1000 * row['p50']:.0f}", f"{1000 * row['p95']:.0f}", first]) + " |")
    return [*lines, ""]


def _memory(run: dict[str, Any], of: str, what: str) -> list[str]:
    lines = ["## Memory", "", what]
    lines += [
        f"{part}: base {size['base'] / 2**20:.0f} MiB, an adapter {size['adapter'] / 2**20:.1f} MiB." for part, size in run["sizes"].items()
    ]
    lines += ["", "Slots: what vLLM's plugin takes before its first adapter and vLLM's base alone does not (32 adapters in one batch):"]
    counts = sorted({row["N"] for row in run["memory"]} - {0})
    rows: list[str] = []
    for part, size in run["sizes"].items():
        held = {(row["way"], row["N"]): row for row in run["memory"] if row["part"] == part and row[of] is not None}
        at = {cell: row[of] / 2**20 for cell, row in held.items()}
        if ("vllm plugin", 0) in at and ("vllm base", 0) in at:
            lines.append(f"{part} {at['vllm plugin', 0] - at['vllm base', 0]:.0f} MiB.")
        for way in (way for way in ORDER if (way, 0) in at):
            cells = [f"{at[way, count] - at[way, 0]:.0f}" if (way, count) in at else "" for count in counts]
            runtime = f"{(held[way, 0]['rss'] - size['weights']) / 2**20:.0f}" if of == "pss" and "weights" in size else ""
            rows.append(f"| {part} | {way} | {at[way, 0]:.0f} | {runtime} | " + " | ".join(cells) + " |")
    heads = ["part", "way", "no adapter", "runtime (RSS less the base's weights)", *(f"+{count}" for count in counts)]
    return [*lines, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, ""]


def _switching(run: dict[str, Any]) -> list[str]:
    lines = ["## Switching and loading", "", "One request at a time, p50 in ms.", ""]
    lines += ["| part | way | same adapter again | another adapter | a switch adds |", "|---|---|---|---|---|"]
    for row in run["switching"]:
        lines.append(
            f"| {row['part']} | {row['way']} | {1000 * row['same_p50']:.1f} | {1000 * row['other_p50']:.1f} | {1000 * row['switch']:.2f} |"
        )
    lines += ["", "| part | way | an adapter from disk, first answer included |", "|---|---|---|"]
    lines += [f"| {row['part']} | {row['way']} | {1000 * row['first_answer_p50']:.0f} |" for row in run["loading"]]
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def summaries(runs: dict[str, dict[str, Any]]) -> str:
    """What the plugin is worth in vLLM: one table a processor, one line a workload."""
    return "\n\n".join(f"{_where(run)}:\n\n{_summary(run)}" for run in runs.values() if not run["hardware"].get("gpu"))


def _where(run: dict[str, Any]) -> str:
    hardware = run["hardware"]
    if hardware.get("gpu"):
        return f"On {hardware['gpu']} in {hardware['dtype'].removeprefix('torch.')}"
    return f"On {hardware['cores_each_side']} cores ({', '.join(hardware['flags'])}) in {hardware['dtype'].removeprefix('torch.')}"


def _summary(run: dict[str, Any]) -> str:
    lines = ["| workload | base, requests/s | with adapters | stock vLLM | of the base | times stock |", "|---|---|---|---|---|---|"]
    for row in (row for row in run["rows"] if row["way"] == "vllm plugin" and row["arrivals"] == "closed"):
        cell = {key: row[key] for key in ("part", "N", "popularity")}
        base, stock = _row(run, "vllm base", **cell), _row(run, "vllm stock", **cell)
        shares = [ratio(run, "vllm plugin", way, **cell) for way in ("vllm base", "vllm stock")]
        told = [_told(base), f"{row['throughput']:.2f}", _told(stock), *map(_number, shares)]
        lines.append(f"| {row['part']}, {row['N']} adapter{'s'[: row['N'] > 1]}, {row['popularity']} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def headlines(runs: dict[str, dict[str, Any]]) -> str:
    """The README's paragraphs, one a processor."""
    return "\n\n".join(map(headline, runs.values()))


def headline(run: dict[str, Any]) -> str:
    """Speed, memory, switching, loading; what was not measured is left out."""
    cells = (("embedding", "MiniLM's embeddings"), ("prefill", "a 135 M Llama reading"), ("decode", "it writing"))
    told: list[str] = []
    used, of = ("vllm stock", "gpu") if run["hardware"].get("gpu") else ("vllm plugin", "pss")  # the plugin is for CPUs
    for part, name in cells:
        shares = [ratio(run, used, way, part=part, N=8, popularity="distinct") for way in ("vllm base", "vllm stock")]
        if shares[0] is not None and shares[1] is not None:
            stock = "" if used == "vllm stock" else f" ({shares[1]:.1f} times stock vLLM)"
            told.append(f"{name} **{shares[0]:.2f}** of the base's speed{stock}")
    text = f"{_where(run)}, eight adapters mixed in one batch: {'; '.join(told)}. "
    at = {row["N"]: row[of] for row in run["memory"] if (row["part"], row["way"]) == ("embedding", used)}
    if len(at) > 1:
        most = max(at)
        size = most * run["sizes"]["embedding"]["adapter"] / 2**20
        text += f"{most} adapters ({size:.0f} MiB of files) added {(at[most] - at[0]) / 2**20:.0f} MiB. "
    for row in run["switching"]:
        if (row["part"], row["way"]) == ("switching", used):
            text += f"Changing the adapter between two requests cost {max(1000 * row['switch'], 0):.1f} ms at the median; "
    for row in run["loading"]:
        if (row["part"], row["way"]) == ("embedding", used):
            text += f"loading one from disk, its first answer included, took {1000 * row['first_answer_p50']:.0f} ms."
    return text


def _told(row: Any) -> str:
    return "" if row is None else f"{row['throughput']:.2f}"


def _throughput_lines(run: dict[str, Any], part: str) -> dict[str, list[tuple[int, float]]]:
    rows = [r for r in run["rows"] if (r["part"], r["popularity"], r["arrivals"]) == (part, "zipf", "closed")]
    return {way: [(r["N"], r["throughput"]) for r in rows if r["way"] == way] for way in ORDER}


def _memory_lines(run: dict[str, Any], part: str, of: str) -> dict[str, list[tuple[int, float]]]:
    rows = [r for r in run["memory"] if r["part"] == part and r["N"] and r[of] is not None]
    return {way: [(r["N"], r[of] / 2**20) for r in rows if r["way"] == way] for way in ORDER}


def _chart(path: Path, unit: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for way, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
    if any(lines.values()):
        axes.legend(fontsize=8)
        counts = sorted({count for points in lines.values() for count, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="adapters (MiniLM, rank 16, Zipf 1.5)", ylabel=unit)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
