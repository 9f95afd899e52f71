"""The benchmark's own parts: who asks for which adapter and when, in which order sides are asked, and which ratios it will print."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sharing import report
from benchmarks.sharing.sides import Side, turns
from benchmarks.sharing.workload import arrivals, choose


def row(way: str, rates: list[float], **more: Any) -> dict[str, Any]:
    cell = {"part": "embedding", "N": 8, "popularity": "zipf", "arrivals": "closed", "first_token_p50": None, "p50": 0.1, "p95": 0.2}
    return {**cell, "way": way, "rates": rates, "throughput": rates[0], "processor_seconds": [1 / rate for rate in rates], **more}


def run(*rows: dict[str, Any]) -> dict[str, Any]:
    hardware = {"cpu": "x", "flags": ["avx2"], "cores_each_side": 2, "dtype": "torch.float32"}
    empty: dict[str, Any] = {"sizes": {}, "memory": [], "switching": [], "loading": [], "versions": {}}
    return {"run": "a" * 32, "rounds": 2, "hardware": hardware, "rows": list(rows), **empty}


def test_popularities_are_punicas() -> None:
    assert choose("distinct", 6, 4, seed=0) == [0, 1, 2, 3, 0, 1]
    assert set(choose("identical", 6, 4, seed=0)) == {0}
    assert sorted(Counter(choose("uniform", 64, 128, seed=0)).values()) == [8] * 8
    drawn = Counter(choose("zipf", 20_000, 50, seed=0))
    assert drawn[0] / drawn[1] == pytest.approx(2**1.5, rel=0.1)


def test_arrivals_keep_their_rate_and_their_burstiness() -> None:
    for cv in (1.0, 3.0):
        gaps = np.diff(arrivals(20_000, 5.0, cv=cv, seed=1))
        assert gaps.mean() == pytest.approx(0.2, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_the_pair_takes_turns_and_rounds_go_forth_and_back() -> None:
    sides = [Side(label, "vllm", "x") for label in ("vllm base", "vllm plugin", "other")]
    assert [side.label for side in turns(sides, forth=True)] == ["vllm base", "vllm plugin", "vllm plugin", "vllm base", "other"]
    assert turns(sides, forth=False) == turns(sides, forth=True)[::-1]


def test_a_ratio_is_the_median_of_neighbouring_rounds() -> None:
    both = run(row("vllm plugin", [10.0, 4.0, 9.0]), row("vllm base", [10.0, 8.0, 10.0]))
    assert report.ratio(both, "vllm plugin", "vllm base", part="embedding", N=8) == pytest.approx(0.9)
    assert report.ratio(both, "vllm plugin", "vllm stock", part="embedding", N=8) is None


def test_a_ratio_of_two_runs_is_refused() -> None:
    for stranger in (row("vllm base", [10.0, 10.0], run="b" * 32), row("vllm base", [10.0])):
        with pytest.raises(report.DifferentRuns):
            report.markdown(run(row("vllm plugin", [10.0, 4.0]), stranger))


def test_the_report_holds_every_way_that_was_measured(tmp_path: Path) -> None:
    report.write(run(row("vllm plugin", [10.0, 4.0]), row("vllm base", [20.0, 8.0])), tmp_path)
    text = (tmp_path / "share_the_base_float32.md").read_text()
    assert "| 8 | zipf | closed | vllm plugin | 10.00 | 0.50 |  | 2.00 | 100 | 200 |  |" in text
    ends = (".json", ".md", "_throughput.png", "_memory.png")
    assert {file.name for file in tmp_path.iterdir()} == {f"share_the_base_float32{end}" for end in ends}


def test_a_part_measured_again_takes_the_place_of_what_it_measured_before_and_of_nothing_else(tmp_path: Path) -> None:
    def switched(seconds: float) -> dict[str, Any]:
        row = {"part": "switching", "way": "vllm plugin", "same_p50": 0.01, "other_p50": 0.01 + seconds, "switch": seconds}
        return {**run(), "switching": [row]}

    for measured in (run(row("vllm base", [20.0])), switched(0.005), switched(0.001), run(row("vllm base", [30.0]))):
        report.write(measured, tmp_path)
    kept = json.loads((tmp_path / "share_the_base_float32.json").read_text())
    assert [one["rates"] for one in kept["rows"]] == [[30.0]]
    assert [one["switch"] for one in kept["switching"]] == [0.001]
    assert "| switching | vllm plugin | 10.0 | 11.0 | 1.00 |" in (tmp_path / "share_the_base_float32.md").read_text()
