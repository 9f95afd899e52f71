"""Rows of a table, each made by a process of its own, so that none inherits another's memory; kept as they are done, resumable."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from embedft.base import BaseSpec, base_folder, compute_dtype
from embedft.model_folder import describe


def rows_one_by_one(
    script: str,
    results: Path,
    about: Mapping[str, Any],
    cells: Sequence[tuple[str, ...]],
    *,
    page: Callable[[Any], str],
    of: Callable[[Mapping[str, Any]], tuple[str, ...]],
) -> None:
    """For each cell that the results do not have yet: `script … --one CELL`, whose last line of output is the row.

    `of(row)`: its cell. `page(results)`: the Markdown beside them. Rows that were made with other settings than `about`, other weights of
    seed-lm or in another dtype are not kept.
    """
    about = {**about, "seed_lm": describe(base_folder(BaseSpec("seed-lm"))).fingerprint[:12], "dtype": str(compute_dtype()).split(".")[1]}
    made = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    kept = made["rows"] if all(made.get(key) == value for key, value in about.items()) else []
    rows = {of(row): row for row in kept}
    for cell in (cell for cell in cells if cell not in rows):
        done = subprocess.run([sys.executable, script, *sys.argv[1:], "--one", *cell], stdout=subprocess.PIPE, text=True, check=True)
        rows[cell] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(json.dumps(rows[cell]) + "\n")
        sys.stdout.flush()
        results.parent.mkdir(exist_ok=True)
        made = {**about, "machine": machine(), "rows": list(rows.values())}
        results.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        results.with_suffix(".md").write_text(f"{page(made)}\n", encoding="utf-8")
