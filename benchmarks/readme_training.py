"""The README's figures of training: what adapters win on public sets, and how fast they are trained."""

from statistics import median
from typing import Any

from benchmarks.tables import table

METRICS = ("hit@5", "mrr@10", "ndcg@10")


def retrieval_table(results: dict[str, dict[str, Any]]) -> str:
    """nDCG@10 of each side, and the adapter's gain over base and BM25."""
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        both, query, metric = result["adapters"]["both"], result["adapters"].get("query"), result["metric"]
        scores = [f"{scored[metric]:.3f}" for scored in (result["base"], result["bm25"], both["adapter"])]
        scores += [f"{query['adapter'][metric]:.3f}" if query else "–", f"{both['fused'][metric]:.3f}"]
        gains = [f"{low:+.3f} … {high:+.3f}" for low, high in (both["intervals"][f"adapter - {side}"] for side in ("base", "bm25"))]
        size = f"{result['queries']:,} · {result['documents']:,}"
        rows.append((f"[{name}](benchmarks/results/retrieval_{name}.json)", size, *scores, *gains))
    head = ("data", "queries · documents", "base", "BM25", "adapter", "query-only", "adapter and BM25", "adapter − base", "adapter − BM25")
    return table(head, rows)


def retrieval_text(results: dict[str, dict[str, Any]]) -> str:
    """The comparison with the published figures, whichever way it goes, by the median over the seeds."""
    finance = results["finance_10k"]
    published, seeds = finance["published"], finance.get("seeds") or [finance["adapters"]["both"]["adapter"]]
    found = {name: sorted(one[name] for one in seeds) for name in METRICS}
    middle = {name: median(values) for name, values in found.items()}
    below = [name for name in METRICS if middle[name] <= published[name][1]]
    said = f"**not** reached in {', '.join(below)}" if below else "passed by the adapter in all three"
    spans = ", ".join(f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in found.items())
    several = f", the median of {len(seeds)} seeds ({spans})" if len(seeds) > 1 else ""
    return (
        f"finance_10k is trained on one company's report and asked about another's. Published for BGE-small, fine-tuned whole: "
        f"{_figures({name: published[name][1] for name in METRICS})};\n"
        f"{said}. MiniLM here: {_figures(finance['base'])}; with the adapter {_figures(middle)}{several};\n"
        f"fused with BM25 {_figures(finance['adapters']['both']['fused'])}; BM25 alone {_figures(finance['bm25'])}."
    )


def _figures(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {scores[name]:.3f}" for name in METRICS)


def speed_tables(reports: dict[str, dict[str, Any]]) -> str:
    """One table for what ours computed in."""
    return "\n\n".join(f"{_dtype(report)}:\n\n{_speed_table(report)}" for report in reports.values())


def _dtype(report: dict[str, Any]) -> str:
    has = f"{report['machine']['cpu_capability']}, {report['machine']['matmul_gflops']:.0f} GFLOP/s"
    if "stock_bf16" in report["settings"]["sides"]:
        return f"Ours in bf16, theirs in fp32 and under bf16 autocast ({has} in bf16 products)"
    return f"Both in fp32 ({has})"


OURS = {"ours_same": "their targets", "ours": "every linear layer", "ours_last2": "the last two layers", "ours_query": "query-only"}


def _speed_table(report: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    shown = {side: what for side, what in OURS.items() if all(side in part["sides"] for part in report["lengths"].values())}
    for length, part in sorted(report["lengths"].items(), key=lambda item: int(item[0])):
        sides = part["sides"]
        stock = f"{sides['stock']['pairs_per_second']:.1f} pairs/s, {sides['stock']['peak_bytes'] / 2**20:,.0f} MiB"
        if "stock_bf16" in sides:
            stock += f"; {sides['stock_bf16']['pairs_per_second']:.1f}, {sides['stock_bf16']['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append((f"{length} tokens", stock, *(_beside(sides[side]) for side in shown)))
    return table(("longest text", "SentenceTransformerTrainer", *(f"ours, {what}" for what in shown.values())), rows)


def _beside(side: dict[str, Any]) -> str:
    times = f"{side['times_stock']:.1f}×" + (f", {side['times_stock_bf16']:.1f}×" if "times_stock_bf16" in side else "")
    return f"{side['pairs_per_second']:.1f} (**{times}**), {side['peak_bytes'] / 2**20:,.0f} MiB"


def speed_text(reports: dict[str, dict[str, Any]]) -> str:
    settings = next(iter(reports.values()))["settings"]
    parts = [part for report in reports.values() for part in report["lengths"].values()]
    sides = [part["sides"][side] for part in parts for side in OURS if side in part["sides"]]
    kept = "in every cell the interval of nDCG@10 against theirs reaches zero or lies above it"
    lost = f"{sum(not side['quality_kept'] for side in sides)} of {len(sides)} cells are below theirs in nDCG@10"
    return (
        f"The same {settings['pairs']} pairs, batch {settings['batch']}, {settings['epochs']} epochs, rank and learning rate, "
        f"{settings['threads']} threads, each run in a process of its own;\n"
        f"{kept if all(side['quality_kept'] for side in sides) else lost}.\n" + "\n".join(map(_limit, reports.values())) + "\n"
        "From `benchmarks/results/train_embed_*.json`, made by `benchmarks/train_embed.py`."
    )


def _limit(report: dict[str, Any]) -> str:
    """How near the machine's limit both sides are; the aim was five times the stock trainer."""
    parts, most = report["lengths"].values(), report["machine"]["matmul_gflops"]
    ours, stock = ([part["sides"][side]["linear_gflops"] for part in parts] for side in ("ours", "stock"))
    counted = f"{min(ours):.0f} to {max(ours):.0f} of them count in ours, {min(stock):.0f} to {max(stock):.0f} in the stock trainer"
    what = "In bf16 a" if "stock_bf16" in report["settings"]["sides"] else "In fp32 a"
    reached = f"{what} plain product reaches {most:.0f} GFLOP/s on that machine. With every layer adapted {counted}"
    return f"{reached}:\n{_aims(report)}."


def _aims(report: dict[str, Any]) -> str:
    said = f"our aim of five times {_aim(report, 'times_stock', 5, 'their fp32 speed')}"
    bf16 = "stock_bf16" in report["settings"]["sides"]
    return f"{said}; of three times {_aim(report, 'times_stock_bf16', 3, 'theirs under bf16 autocast')}" if bf16 else said


def _aim(report: dict[str, Any], key: str, aim: int, speed: str) -> str:
    found: dict[bool, list[str]] = {True: [], False: []}
    for side, what in (("ours_same", "their targets"), ("ours", "every linear layer")):
        times = [part["sides"][side][key] for part in report["lengths"].values() if side in part["sides"]]
        if times:
            found[min(times) >= aim].append(f"with {what} ({min(times):.1f} at least)")
    said = ((f"{speed} is met", found[True]), (f"{speed} is missed" if not found[True] else "missed", found[False]))
    return ", ".join(f"{verdict} {' and '.join(sides)}" for verdict, sides in said if sides)


def attention_text(report: dict[str, Any]) -> str:
    """What the compiled kernel gains, over all lengths and both passes."""
    times = {dtype: [row[part]["times"] for row in report["rows"] if row["dtype"] == dtype for part in ("forward", "backward")]
             for dtype in ("bfloat16", "float32")}  # fmt: skip
    spans = {dtype: f"{min(each):.1f} to {max(each):.1f}" for dtype, each in times.items()}
    longest = [row["longest"] for row in report["rows"]]
    return (
        "Attention over packed texts is a C kernel, compiled at first use: on texts of at most "
        f"{min(longest)} to {max(longest)} tokens {spans['bfloat16']} times as fast as torch's flash kernels in bf16,\n"
        f"{spans['float32']} times in fp32 (`benchmarks/results/packed_attention.json`). Without a C compiler, or with `EMBEDFT_NATIVE=0`, "
        "torch's kernels do it."
    )


SIDES = {"lora": "LoRA", "qlora": "QLoRA, NF4", "full": "all weights"}


def tasks_table(report: dict[str, Any]) -> str:
    """One task a row: the base, then each way of training it with what it took."""
    rows: list[tuple[str, ...]] = []
    for task in dict.fromkeys(row["task"] for row in report["rows"]):
        found = {row["method"]: row for row in report["rows"] if row["task"] == task}
        first = next(iter(found.values()))
        rows.append((task, first["metric"], f"{first['base']:.3f}", *(_trained(found.get(side)) for side in SIDES)))
    return table(("task", "metric", "base", *SIDES.values()), rows)


def _trained(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    took = "" if row["seconds"] is None else f"{row['seconds']:.0f} s, "
    return f"{row['score']:.3f} ({took}{row['peak_mib']} MiB)"


def tasks_text(report: dict[str, Any]) -> str:
    share = {row["method"]: row["trainable_percent"] for row in report["rows"]}
    named = {f"{row['task']} by {SIDES[row['method']]}": row["gain_ci95"] for row in report["rows"]}
    worse = [name for name, (_, high) in named.items() if high < 0]
    unproven = [name for name, (low, high) in named.items() if low <= 0 <= high]
    found = [("worse than the base, interval and all", worse), ("no gain that its interval shows", unproven)]
    gains = "; ".join(f"{said}: {', '.join(names)}" for said, names in found if names) or "every gain's 95 % interval lies above zero"
    verified = sum(row["verified"] for row in report["rows"])
    return (
        f"seed-lm in {report.get('dtype', 'float32')}, {report['epochs']} epochs in batches of {report['batch']}, "
        f"{report['test_rows']} test rows, one thread; "
        f"{share['lora']:.1f} % of the weights trained, or all; the base's figure "
        f"is the unquantized one's. {gains[0].upper()}{gains[1:]};\n"
        f"{verified} of {len(report['rows'])} pass `adapters verify`. "
        "From [lm_tasks.json](benchmarks/results/lm_tasks.json), made by `benchmarks/lm_tasks.py DATA`."
    )


def methods_table(reports: dict[str, Any]) -> str:
    """One method a row: what it learnt, what it trained, and how far its effect is from the trainer's in each engine."""
    made, served = reports["methods"], reports["served"]
    rows: list[tuple[str, ...]] = []
    for row in made["rows"]:
        if "failed" in row:
            rows.append((row["method"], row["base"], *["–"] * 5, row["failed"]))
            continue
        peft, vllm = ({one["name"]: one for one in served.get(f"{engine} {row['base']}", [])} for engine in ("peft", "vllm"))
        name = f"method-{row['method'].replace('_', '-')}"
        low, high = row["gain_ci95"]
        copy = vllm.get(f"{name}-lora")
        in_vllm = f"{_served(copy)} as LoRA of rank {copy['r']}" if copy else _served(vllm.get(name))
        gain, size = f"{low:+.3f} … {high:+.3f}", f"{row['adapter_bytes'] / 2**10:,.0f}"
        learnt = (f"{row['exact_match']:.3f}", gain, f"{row['trainable']:,}", size, f"{row['seconds']:.0f}")
        rows.append((row["method"], row["base"], *learnt, _served(peft.get(name)), in_vllm))
    head = ("method", "base", "exact match", "gain, 95 % interval", "trained", "KiB", "s", "`peft` engine", "vLLM")
    return table(head, rows)


def _served(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return "no" if row["state"] != "serving" else f"{row['probe_error']:.0e}"


def methods_text(reports: dict[str, Any]) -> str:
    made = reports["methods"]
    verified = sum(bool(row.get("verified")) for row in made["rows"])
    serving = {one["name"] for cell, found in reports["served"].items() if "vllm" in cell for one in found if one["state"] == "serving"}
    names = [f"method-{row['method'].replace('_', '-')}" for row in made["rows"]]
    plain, copies = (sum(f"{name}{ending}" in serving for name in names) for ending in ("", "-lora"))
    rows = f"{made['batch']} rows, {made['test_rows']} test rows"
    return (
        f"seed-lm in {made.get('dtype', 'float32')} on {made['task']}: {made['steps']} steps of {rows}, one thread, "
        "each method by its shipped recipe\n"
        "(rates of those that are not LoRA's kin, and how many virtual tokens: the best of two or three on 100 rows of the dev split);\n"
        f"the base scores {made['rows'][0]['base_exact_match']:.3f}. {verified} of {len(made['rows'])} pass `adapters verify`. "
        "An engine's figure is the error of the adapter's effect there, of its norm;\n"
        f"vLLM takes {plain} as they are and {copies} as converted LoRA. "
        "From [methods.json](benchmarks/results/methods.json) and [methods_served.json](benchmarks/results/methods_served.json), made by "
        "`benchmarks/methods.py` and `methods_served.py`."
    )


def lm_speed_text(runs: dict[str, dict[str, Any]]) -> str:
    """The language-model trainer beside TRL's: tokens a second and peak memory; what packing gives, in examples."""
    made = next(iter(runs.values()))
    return (
        f"Beside TRL's `SFTTrainer` on {made['data']} (LoRA of rank {made['r']}, batch {made['batch']}, {made['machine']['cores']} cores, "
        f"sides by turns):\n" + "\n".join(_lm_speed(run, name.rpartition("_")[2]) for name, run in runs.items()) + "\n"
        "From `benchmarks/results/train_lm_*.json`, made by `benchmarks/train_lm.py`."
    )


UNPACKED = ("embedft", "trl")


def _lm_speed(made: dict[str, Any], dtype: str) -> str:
    rows = {(row["side"], row["base"]): row for row in made["rows"]}

    def beside(base: str) -> str:
        ours, theirs = rows["embedft", base], rows["trl", base]
        speed, memory = (ours[of] / theirs[of] for of in ("tokens_per_second", "peak_bytes"))
        return f"**{speed:.2f}** of its tokens a second at {memory:.2f} of its peak memory"

    packed, theirs = (
        rows["embedft-packed", "none"]["examples_per_second"] / rows[side, "none"]["examples_per_second"] for side in UNPACKED
    )
    return (
        f"in {dtype} ({made['machine']['cpu_capability']}) {beside('none')} on the full base, {beside('nf4')} on NF4; "
        f"`train.packing` gives **{packed:.1f}** times the examples a second, {theirs:.1f} times TRL's unpacked."
    )


def plan_text(report: dict[str, Any]) -> str:
    peaks = sorted(row["peak_ratio"] for row in report["rows"])
    seconds = sorted(row["planned_seconds_per_step"] / row["measured_seconds_per_step"] for row in report["rows"])
    return (
        f"`plan` says what a run will cost before it runs. In {len(peaks)} settings its peaks were {peaks[0]:.2f} to {peaks[-1]:.2f} "
        f"of what training then allocated;\nits seconds leave out what a run does before its first step: "
        f"of runs of four steps they were {seconds[0]:.1f} to {seconds[-1]:.1f}.\n"
        "From [plan.json](benchmarks/results/plan.json), made by `benchmarks/plan.py`."
    )
