"""The benchmark's own parts: who asks for which adapter and when, in which order sides are asked, and which ratios it will print."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sharing import report
from benchmarks.sharing.engine import PeftEngine
from benchmarks.sharing.sides import Measurement, Side, turns
from benchmarks.sharing.ways import Peft, Vllm
from benchmarks.sharing.workload import Request, adapters, arrivals, choose
from tests.fixtures_lm import tiny_llama


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


def test_a_gpus_results_are_kept_apart_and_tell_of_its_memory(tmp_path: Path) -> None:
    on_cpu = run(row("vllm stock", [1.0]))
    memory = [{"part": "embedding", "way": "vllm stock", "N": n, "pss": 3 << 30, "gpu": (1 << 30) + n * (2 << 20)} for n in (0, 8)]
    memory += [{"part": "embedding", "way": "peft engine", "N": n, "pss": 1 << 30, "gpu": None} for n in (0, 8)]
    on_gpu: dict[str, Any] = {**run(row("vllm stock", [10.0])), "memory": memory, "sizes": {"embedding": {"base": 1, "adapter": 1}}}
    on_gpu["hardware"] = on_gpu["hardware"] | {"gpu": "NVIDIA H100 80GB HBM3", "dtype": "torch.bfloat16"}
    for measured in (on_cpu, on_gpu):
        report.write(measured, tmp_path)
    assert {file.stem for file in tmp_path.glob("*.json")} == {"share_the_base_float32", "share_the_base_nvidia-h100-80gb-hbm3_bfloat16"}
    text = (tmp_path / "share_the_base_nvidia-h100-80gb-hbm3_bfloat16.md").read_text()
    assert "| embedding | vllm stock | 1024 |  | 16 |" in text
    assert text.count("| embedding | peft engine |") == 1  # the driver did not tell of its GPU memory


def test_memory_tells_slots_and_runtime_apart_from_what_adapters_add(tmp_path: Path) -> None:
    held = [("vllm base", 0, 600, 650), ("vllm plugin", 0, 660, 700), ("vllm plugin", 8, 680, 720)]
    memory = [{"part": "embedding", "way": way, "N": n, "pss": pss << 20, "rss": rss << 20, "gpu": None} for way, n, pss, rss in held]
    report.write({**run(), "memory": memory, "sizes": {"embedding": {"base": 1, "adapter": 1, "weights": 45 << 20}}}, tmp_path)
    text = (tmp_path / "share_the_base_float32.md").read_text()
    assert "embedding 60 MiB." in text
    assert "| embedding | vllm base | 600 | 605 |  |" in text
    assert "| embedding | vllm plugin | 660 | 655 | 20 |" in text


def test_on_a_gpu_the_plugin_is_left_out_and_stock_gets_whole_rounds() -> None:
    sides = [Side("vllm base", "vllm", "base"), Side("vllm plugin", "vllm", "plugin"), Side("vllm stock", "vllm", "stock", slow=True)]
    sides.append(Side("PEFT set_adapter", "peft", "switch", slow=True))
    ways = Measurement(rounds=1, counts=(1,), limit=1, gpu="NVIDIA H100").ways(sides)
    assert [(side.mode, side.slow) for side in ways] == [("base", False), ("stock", False), ("switch", True)]
    assert Measurement(rounds=1, counts=(1,), limit=1).ways(sides) == sides


class Steady(Side):
    """Answers as many requests a second as its mode says."""

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> dict[str, Any]:
        del flight, tokens
        return {"seconds": len(requests) / float(self.mode)}


def test_a_turn_is_as_many_requests_as_take_a_second_and_not_fewer_than_are_in_flight() -> None:
    requests = [Request(0, [1])] * 500

    def turn(rate: str, *, slow: bool = False, requests: Sequence[Request] = requests) -> int:
        return Steady("side", "vllm", rate, slow=slow).turn(requests, flight=32, tokens=1)

    assert [turn(rate) for rate in ("4", "200", "4000")] == [32, 200, 500]
    assert [turn(rate, slow=True) for rate in ("4", "20")] == [8, 20]
    assert turn("4", requests=[Request(0, [1], arrival=0.1)] * 500) == 500


@pytest.mark.parametrize("mode", ["switch", "mixed", "copies", "engine"])
def test_a_way_that_generates_tells_when_its_first_token_was_there(tmp_path: Path, mode: str) -> None:
    base = tiny_llama(tmp_path / "base")
    way = PeftEngine(mode, base, "causal_lm") if mode == "engine" else Peft(mode, base, "causal_lm")
    try:
        way.register(adapters(tmp_path, base, "causal_lm", 2))
        requests = [Request(k % 2, [5, 6, 7 + k]) for k in range(4)]
        for tokens in (1, 24):
            for start, first, end in way.run(requests, flight=2, tokens=tokens):
                assert first is not None
                assert 0 <= start < first <= end
                if tokens > 1:
                    assert first - start < 0.7 * (end - start)
    finally:
        if isinstance(way, PeftEngine):
            way.process.terminate()
            way.process.wait(30)


def test_a_side_that_is_not_what_it_is_called_is_refused() -> None:
    """vLLM's base holds no LoRA operations, stock has its own, and only the plugin's side has ours."""

    def named(kind: str | None) -> Any:
        manager: Any = SimpleNamespace(punica_wrapper_mapping={"layer": type(kind, (), {})()} if kind else {})
        runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(worker=SimpleNamespace(model_runner=runner)))
        way = Vllm.__new__(Vllm)
        way.engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(model_executor=worker)))
        return way

    own = {"stock": "PunicaWrapperCPU", "plugin": "SegmentedPunicaWrapper"}
    for mode, other in (("stock", "plugin"), ("plugin", "stock")):
        named(own[mode])._check(mode, on_cpu=True)
        with pytest.raises(RuntimeError, match=f"is to be vLLM's {mode} but its LoRA operations are .*{own[other]}"):
            named(own[other])._check(mode, on_cpu=True)
    named(None)._check("base", on_cpu=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_is_refused_where_there_is_none() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.share_the_base", "--gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


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
