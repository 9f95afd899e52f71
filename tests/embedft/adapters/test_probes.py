"""Probes: which are kept, when an engine fails them, and what a file of them may hold."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedft.adapters.probes import PROBES, Probe, ProbeReport, RecordedProbes, choose, compare, read_probes, write_probes
from embedft.encode import EncodeSettings
from embedft.errors import AdapterInvalid
from embedft.verify import near_refusal, record, refused_here, unnoticed, verify
from tests.embedft.adapter_fixtures import damaged


def test_an_untouched_adapter_passes_its_probes(adapter: Path) -> None:
    report = verify(adapter)
    assert report.passed
    assert report.error < 1e-5
    assert report.signal > 0.1


@pytest.mark.parametrize("kind", ["query", "key", "value", "intermediate.dense", "attention.output.dense"])
def test_an_adapter_with_any_module_type_zeroed_is_refused(adapter: Path, kind: str) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * 0 if f"{kind}.lora_B" in name else tensor))
    assert not report.passed
    assert "differs from the trainer's" in report.reason


def test_an_adapter_scaled_by_0_8_is_refused(adapter: Path) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * np.float32(0.8) if "lora_B" in name else tensor))
    assert not report.passed
    assert 0.1 < report.error < 0.4


def test_an_adapter_that_does_nothing_is_refused(adapter: Path) -> None:
    report = verify(damaged(adapter, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor))
    assert not report.passed
    assert "changes nothing" in report.reason


def test_an_adapter_that_did_not_train_gets_no_probes_and_what_they_would_not_notice_is_named(tmp_path: Path) -> None:
    from embedft.base import BaseSpec, load_base
    from embedft.methods import attach, save_weights
    from embedft.recipe import AdapterSection

    base = load_base(BaseSpec("minilm"), task="embedding")
    save_weights(attach(base, AdapterSection(r=2), task="embedding"), tmp_path, base_name="minilm")
    with pytest.raises(AdapterInvalid, match=r"'mine'.*it changes nothing: it did not train"):
        record(
            tmp_path, base=base.folder, tokenizer=base.tokenizer, task="embedding", settings=EncodeSettings("mean", True, 64), name="mine"
        )
    recorded = RecordedProbes((), (), (), {"query": 0.02, "key": 0.1, "value": 0.11}, 0.1)
    assert unnoticed(recorded) == ["query", "key"]


def test_probes_that_were_tampered_with_are_refused(adapter: Path) -> None:
    (adapter / PROBES).write_bytes(b"nonsense")
    with pytest.raises(AdapterInvalid, match="malformed"):
        read_probes(adapter)


@pytest.mark.parametrize(
    ("tolerance", "count", "length", "taken"),
    [
        (0.1, 64, 4096, True),
        (0.11, 1, 1, False),
        (0.0, 1, 1, False),
        (float("nan"), 1, 1, False),
        (0.1, 65, 1, False),
        (0.1, 1, 4097, False),
    ],
)
def test_probes_that_allow_or_ask_for_more_than_any_trainer_writes_are_refused(
    tmp_path: Path, tolerance: float, count: int, length: int, taken: bool
) -> None:
    """Who brings an adapter brings its probes: they must not be their own judge, nor work without end."""
    effect = np.ones(4, np.float32)
    write_probes(tmp_path, RecordedProbes((Probe((1,) * length),) * count, (), (effect,) * count, {}, tolerance))
    if taken:
        assert len(read_probes(tmp_path).probes) == count
        return
    with pytest.raises(AdapterInvalid, match="malformed"):
        read_probes(tmp_path)


def test_probes_whose_lengths_do_not_add_up_are_refused(tmp_path: Path) -> None:
    write_probes(tmp_path, RecordedProbes((Probe((1, 2)),) * 2, (), (np.ones(4, np.float32),) * 2, {}, 0.1))
    tensors: dict[str, np.ndarray] = load_file(str(tmp_path / PROBES))
    save_file(tensors | {"effect": tensors["effect"][:-1]}, str(tmp_path / PROBES), metadata={"tolerance": "0.1"})
    with pytest.raises(AdapterInvalid, match="lengths that do not add up"):
        read_probes(tmp_path)


@pytest.mark.parametrize("broken", ["base", "adapted", "base_again"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_engine_whose_outputs_are_no_numbers_or_of_another_shape_fails(broken: str, value: float) -> None:
    effect = np.full(4, 0.1, np.float32)
    recorded = RecordedProbes((Probe((1,)),), (), (effect,), {}, 0.1)
    given = {"base": np.zeros(4, np.float32), "adapted": effect, "base_again": np.zeros(4, np.float32)}
    for wrong, said in ((np.array([value, 0, 0, 0], np.float32), "not finite"), (np.zeros(3, np.float32), "another shape")):
        report = compare(recorded, **{name: [array] for name, array in (given | {broken: wrong}).items()})  # type: ignore[arg-type]
        assert not report.passed
        assert said in report.reason


def test_the_probes_kept_are_those_that_show_the_least_visible_module() -> None:
    probes = [Probe((index,)) for index in range(4)]
    effects = [np.ones(2, np.float32)] * 4
    without = {
        "seen everywhere": [np.zeros(2, np.float32)] * 4,
        "seen in two": [np.full(2, 1 - share, np.float32) for share in (0.01, 0.3, 0.02, 0.4)],
    }
    recorded = choose(probes, [np.full(2, index, np.float32) for index in range(4)], effects, without, keep=2)
    assert [array[0] for array in recorded.base] == [probe.ids[0] for probe in recorded.probes]
    assert {probe.ids[0] for probe in recorded.probes} == {1, 3}
    assert recorded.tolerance == pytest.approx(0.1)


def test_a_signal_within_the_engines_noise_fails() -> None:
    effect = (np.full(4, 0.1, np.float32),)
    recorded = RecordedProbes((Probe((1,)),), (), effect, {}, 0.1)
    base, again = [np.zeros(4, np.float32)], [np.full(4, 0.05, np.float32)]
    assert not compare(recorded, base=base, adapted=list(effect), base_again=again).passed
    assert compare(recorded, base=base, adapted=list(effect), base_again=base).passed


def test_an_engine_may_differ_by_its_rounding_which_its_base_shows_but_never_by_more_than_a_tenth(tmp_path: Path) -> None:
    base, effect = np.ones(100, np.float32), np.full(100, 0.1, np.float32)
    write_probes(tmp_path, RecordedProbes((Probe((1,)),), (base,), (effect,), {}, 0.02))
    recorded = read_probes(tmp_path)
    assert np.array_equal(recorded.base[0], base)
    for moved, off, passed in ((0.0, 0.05, False), (0.003, 0.05, True), (0.003, 0.07, False), (0.29, 0.09, True), (0.29, 0.11, False)):
        plain = [base + np.float32(moved)]
        report = compare(recorded, base=plain, adapted=[plain[0] + effect * np.float32(1 + off)], base_again=plain)
        assert report.passed == passed, (moved, off, report)
        assert ("EMBEDFT_DTYPE" in report.reason) == (not passed and moved > 0), "whose base rounds is told what would help"


def test_an_engine_that_computes_another_base_than_the_trainer_is_refused_however_well_the_effect_agrees(tmp_path: Path) -> None:
    base, effect = np.ones(100, np.float32), np.full(100, 0.1, np.float32)
    write_probes(tmp_path, RecordedProbes((Probe((1,)),), (base,), (effect,), {}, 0.02))
    recorded = read_probes(tmp_path)
    for moved, passed in ((0.29, True), (-0.29, True), (0.31, False), (-0.31, False)):
        plain = [base + np.float32(moved)]
        report = compare(recorded, base=plain, adapted=[plain[0] + effect], base_again=plain)
        assert report.passed == passed, (moved, report)
        assert ("computes another base than the trainer" in report.reason) == (not passed)
        assert ("by 0.31 of their norm; serve it by another engine" in report.reason) == (not passed)


def test_what_passes_so_narrowly_that_an_engine_may_refuse_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("embedft.verify.compute_dtype", lambda: torch.bfloat16)
    for error, said in ((0.074, False), (0.092, True)):
        monkeypatch.setattr("embedft.verify._replayed", lambda *_, error=error: ProbeReport(error, 1.0, 0.0, 0.1, True, ""))
        assert bool(refused_here(Path("a"))) == said
    assert near_refusal(ProbeReport(0.074, 1.0, 0.0, 0.1, True, "")) is None
    told = near_refusal(ProbeReport(0.092, 1.0, 0.0, 0.1, True, ""))
    assert told is not None
    assert told.startswith("its effect differs here from the trainer's by 0.092 of its norm, where 0.100 is allowed")
    assert "EMBEDFT_DTYPE" in told
