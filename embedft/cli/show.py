"""What the commands print: figures, tables, the quality of an adapter. Plain text, so that it pipes; one object with --json."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def show(arguments: argparse.Namespace, content: Mapping[str, Any], *, title: str) -> None:
    if arguments.json:
        print(json.dumps(dict(content), default=str))
        return
    print(title)
    width = max(len(key) for key in content)
    for key, value in content.items():
        shown = (
            f"{value:,.4g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int) and not isinstance(value, bool)
            else value
        )
        print(f"  {key:<{width}}  {json.dumps(shown, ensure_ascii=False) if isinstance(shown, dict | list) else shown}")


def show_scores(metrics: Mapping[str, Any], *, title: str) -> None:
    """The quality table: one row for each side, the gain's 95 % interval, and what else the evaluation found."""
    sides = [side for side in ("base", "bm25", "adapter", "fused") if metrics.get(side)]
    rows = [{"": "bm25 + adapter" if side == "fused" else side, **{k: f"{v:.4f}" for k, v in metrics[side].items()}} for side in sides]
    print(title)
    if rows:
        show_table(rows)
    if metrics.get("gain_ci95"):
        print(f"gain over the base, 95 % interval: {_verdict(metrics['gain_ci95'], 'the base')}")
    if bm25 := metrics.get("intervals", {}).get("adapter - bm25"):
        print(f"gain over BM25, 95 % interval: {_verdict(bm25, 'BM25')}")
    for name, part in metrics.get("strata", {}).items():
        scores = ", ".join(f"{side} {part[side]:.3f}" for side in ("base", "bm25", "adapter"))
        print(f"{part['queries']} queries of {name} word overlap with their documents: {scores}")
    _further(metrics)


def _further(metrics: Mapping[str, Any]) -> None:
    if index := metrics.get("index"):
        cost = f"{index['documents']:,} documents, {index['bytes'] / 2**20:.1f} MiB, {index['seconds']:.0f} s of encoding"
        kept = "an index made with it" if index["again"] else "query-only: an index of the base's vectors serves it as it is, saving"
        print(f"{kept} {'takes ' if index['again'] else ''}{cost}")
    if against := metrics.get("against"):
        score, label = against[metrics["metric"]], f"{against['name']} (side {against['side']})"
        print(f"against {label}, {score:.4f}, 95 % interval: {_verdict(against['difference_ci95'], against['name'])}")
    if mteb := metrics.get("mteb"):
        ties = any(abs(value - metrics["adapter"][name]) > 1e-6 for name, value in mteb.items())
        why = " (it ranks documents with equal vectors in another order: are some in the corpus twice?)" if ties else ""
        print("MTEB's own evaluator: " + ", ".join(f"{name} {value:.6f}" for name, value in mteb.items()) + why)
    if guard := metrics.get("guard"):
        print(f"general set ({guard['data']}, {guard['queries']} queries): base {guard['base']:.4f}, adapter {guard['adapter']:.4f}")


def _verdict(interval: Sequence[float], other: str) -> str:
    low, high = interval
    verdict = f"better than {other}" if low > 0 else f"worse than {other}" if high < 0 else f"no proven difference from {other}"
    return f"{low:+.4f} … {high:+.4f}: {verdict}"


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns as wide as their widest cell; plain text, so that it pipes."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    width = {column: max(len(column), *(len(str(row.get(column, ""))) for row in rows)) for column in columns}
    print("  ".join(column.ljust(width[column]) for column in columns).rstrip())
    for row in rows:
        print("  ".join(str(row.get(column, "")).ljust(width[column]) for column in columns).rstrip())


class Progress:
    """A live line on stderr with the time left; a line every ten seconds where stderr is no terminal.

    Good for several runs, one after another: each goes up to its own total, and its pace is measured from its first call.
    """

    def __init__(self, what: str = "embedding") -> None:
        self._what, self._live = what, sys.stderr.isatty()
        self._began = self._printed = 0.0
        self._first = 0  # done at the run's first call; 0 before it

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._first:
            self._began = self._printed = now
            self._first = done
        last = done == total
        if self._live or last or now - self._printed >= 10:
            self._printed = now
            start, end = ("\r\x1b[K", "\n" if last else "") if self._live else ("", "\n")
            sys.stderr.write(f"{start}{self._what} {done}/{total}{self._left(done, total, now - self._began)}{end}")
            sys.stderr.flush()
        if last:
            self._first = 0

    def _left(self, done: int, total: int, elapsed: float) -> str:
        """'' while nothing is known of the pace."""
        if done == self._first and done < total:
            return ""
        left = int(elapsed / max(1, done - self._first) * (total - done))
        return f"  {left // 60}:{left % 60:02d} left"
