"""The kernels against plain float64 products, over ranks, adapters, tokens and popularities; and what no batch may change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.vllm_cpu_lora import kernels, native
from serve.vllm_cpu_lora.plan import Plan, make_plan
from serve.vllm_cpu_lora.slots import Slots

POPULARITIES = ("distinct", "uniform", "zipf", "identical")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the norm of the output


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel, and torch as where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setenv(native.OFF, "0")
    else:
        assert native.library() is not None, "this machine has a compiler"
    return request.param


def drawn_slots(popularity: str, adapters: int, tokens: int, base: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Slots of `tokens` tokens in sequences of `length`, a share `base` of them without an adapter."""
    sequences = -(-tokens // length)
    if popularity == "distinct":
        of = np.arange(sequences) % adapters
    elif popularity == "uniform":
        of = rng.integers(adapters, size=sequences)
    elif popularity == "zipf":
        weights = 1.0 / np.arange(1, adapters + 1) ** 1.5
        of = rng.choice(adapters, size=sequences, p=weights / weights.sum())
    else:
        of = np.full(sequences, rng.integers(adapters))
    of = np.where(rng.random(sequences) < base, -1, of)
    return np.repeat(of, length)[:tokens]


def loaded(inputs: int, outs: list[int], ranks: list[int], dtype: torch.dtype) -> Slots:
    """Slots as vLLM fills them: through its own shapes, each adapter with its rank; the rest is zero."""
    most = max(ranks)
    a = tuple(torch.empty(len(ranks), 1, most, inputs, dtype=dtype) for _ in outs)
    b = tuple(torch.empty(len(ranks), 1, out, most, dtype=dtype) for out in outs)
    slots = Slots.stacked(a, b)
    for slot, rank in enumerate(ranks):
        for a_view, b_view in zip(slots.a_views(), slots.b_views(), strict=True):
            a_view[slot, 0, :rank].copy_(torch.randn(rank, inputs) / inputs**0.5)
            b_view[slot, 0, :, :rank].copy_(torch.randn(b_view.shape[2], rank) / rank**0.5)
        slots.ranks[slot] = rank
    return slots


def expected(y: Tensor, x: Tensor, slots: Slots, of: np.ndarray) -> Tensor:
    """Row by adapter in float64, from vLLM's views of the weights."""
    result = y.double()
    for slot in set(of.tolist()) - {-1}:
        rows = torch.from_numpy(np.flatnonzero(of == slot))
        parts = [
            x[rows].double() @ a[slot, 0].double().T @ b[slot, 0].double().T for a, b in zip(slots.a_views(), slots.b_views(), strict=True)
        ]
        result[rows] += torch.cat(parts, dim=1)
    return result


def error(answer: Tensor, truth: Tensor, before: Tensor | None = None) -> float:
    """Relative to the norm of the output, of what the change was added to, or of as many numbers of variance one, which a change is
    drawn as: where these or a change's own terms cancel, only their rounding is left."""
    scale = max(truth.numel() ** 0.5, *(float(part.double().norm()) for part in (truth, before) if part is not None))
    return float((answer.double() - truth).norm()) / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None, database=None)
@given(
    popularity=st.sampled_from(POPULARITIES),
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=64),
    tokens=st.integers(1, 300) | st.integers(301, 8192),
    base=st.sampled_from([0.0, 0.3, 1.0]),
    length=st.sampled_from([1, 3, 70]),
    inputs=st.sampled_from([1, 7, 40, 96]),
    outs=st.lists(st.sampled_from([1, 15, 32, 70]), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_each_token_gets_its_own_adapter_at_its_own_rank(
    dtype: torch.dtype, popularity: str, ranks: list[int], tokens: int, base: float, length: int, inputs: int, outs: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    of = drawn_slots(popularity, len(ranks), tokens, base, length, np.random.default_rng(seed))
    slots = loaded(inputs, outs, ranks, dtype)
    x, y = torch.randn(tokens, inputs, dtype=dtype), torch.randn(tokens, sum(outs), dtype=dtype)
    truth, before = expected(y, x, slots, of), y.clone()
    kernels.add(y, x, slots, make_plan(of, threads=2))
    assert error(y, truth, before) < TOLERANCE[dtype]
    without = torch.from_numpy(of < 0)
    assert torch.equal(y[without], before[without])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_may_be_larger_than_the_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    of = np.repeat([0, 1], 60)
    slots = loaded(1, [1], [64, 63], dtype)
    for _ in range(50):  # what is written beyond its memory ends the process sooner or later
        x, y = torch.randn(120, 1, dtype=dtype), torch.randn(120, 1, dtype=dtype)
        truth, before = expected(y, x, slots, of), y.clone()
        kernels.add(y, x, slots, make_plan(of, threads=2))
        assert error(y, truth, before) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_eight_thousand_tokens_over_64_adapters(popularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    of = drawn_slots(popularity, 64, 8192, 0.2, 37, np.random.default_rng(0))
    slots = loaded(48, [48, 16, 16], [1 + (7 * k) % 64 for k in range(64)], dtype)
    x, y = torch.randn(8192, 48, dtype=dtype), torch.zeros(8192, 80, dtype=dtype)
    truth = expected(y, x, slots, of)
    kernels.add(y, x, slots, make_plan(of, threads=2))
    assert error(y, truth) < TOLERANCE[dtype]


def ways_of_torch() -> dict[str, np.ndarray]:
    return {
        "long runs": np.repeat([0, -1, 1, 0], 90),
        "few tokens": np.tile([0, 1, 2, -1], 8),
        "few tokens, one adapter crowded": np.concatenate(([0, 1] * 3, [0] * 30, [1, -1, 2])),
        "many short runs": np.tile([2, 0, 1], 200),
    }


@pytest.mark.parametrize("case", ways_of_torch())
def test_every_way_of_computing_gives_the_same(case: str) -> None:
    torch.manual_seed(1)
    of = ways_of_torch()[case]
    slots = loaded(33, [20, 9], [5, 16, 1], torch.float32)
    x, y = torch.randn(len(of), 33), torch.randn(len(of), 29)
    truth = expected(y, x, slots, of)
    kernels.add(y, x, slots, make_plan(of))
    assert error(y, truth) < 1e-5


def test_bf16_goes_to_the_matrix_units_where_groups_are_long(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    monkeypatch.setattr(kernels, "has_matrix_units", lambda: True)
    asked = list[int]()
    monkeypatch.setattr(native, "library", lambda: asked.append(1))
    for dtype, length, natively in ((torch.bfloat16, 40, 0), (torch.bfloat16, 4, 1), (torch.float32, 40, 1)):
        slots, of = loaded(32, [32], [8, 8], dtype), np.repeat([0, 1, -1], length)
        x, y = torch.randn(len(of), 32, dtype=dtype), torch.randn(len(of), 32, dtype=dtype)
        truth = expected(y, x, slots, of)
        asked.clear()
        kernels.add(y, x, slots, make_plan(of))
        assert len(asked) == natively
        assert error(y, truth) < TOLERANCE[dtype]


def test_an_answer_does_not_depend_on_its_neighbours_or_their_order() -> None:
    torch.manual_seed(2)
    slots = loaded(64, [64], [16, 3, 64], torch.float32)
    x, of = torch.randn(50, 64), np.random.default_rng(2).integers(-1, 3, size=50)

    def answer(rows: np.ndarray) -> Tensor:
        y = torch.zeros(len(rows), 64)
        kernels.add(y, x[torch.from_numpy(rows)], slots, make_plan(of[rows]))
        return y

    together, order = answer(np.arange(50)), np.random.default_rng(3).permutation(50)
    assert torch.allclose(answer(order), together[torch.from_numpy(order)], rtol=1e-5, atol=1e-6)
    alone = torch.cat([answer(np.array([row])) for row in range(50)])
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_a_reused_slot_holds_nothing_of_the_adapter_before() -> None:
    torch.manual_seed(3)
    slots = loaded(16, [16], [8, 8], torch.float32)
    slots.forget(0)
    x, y = torch.randn(4, 16), torch.zeros(4, 16)
    plan = make_plan(np.array([0, 0, 0, 0]))
    kernels.add(y, x, slots, plan)
    assert not y.any()
    slots.a_views()[0][0, 0, :2] = 1.0
    slots.b_views()[0][0, 0, :, :2] = 1.0
    slots.ranks[0] = 8  # as if the rank of the adapter before still held: its rows must be zero
    kernels.add(y, x, slots, plan)
    assert torch.allclose(y, 2 * x.sum(1, keepdim=True).expand(4, 16), atol=1e-4)


def test_inputs_and_outputs_may_be_windows_of_larger_tensors() -> None:
    torch.manual_seed(4)
    slots = loaded(24, [10, 6], [4, 4], torch.float32)
    of = np.array([0, 1, -1, 1, 0])
    wide, out = torch.randn(5, 60), torch.zeros(5, 30)
    x, y = wide[:, 7:31], out[:, 3:19]
    truth = expected(y, x, slots, of)
    kernels.add(y, x, slots, make_plan(of))
    assert error(y, truth) < 1e-5
    assert not out[:, :3].any()
    assert not out[:, 19:].any()
    columns = torch.randn(24, 5).T  # rows that do not lie in one piece
    y, truth = torch.zeros(5, 16), expected(torch.zeros(5, 16), columns, slots, of)
    kernels.add(y, columns, slots, make_plan(of))
    assert error(y, truth) < 1e-5


def test_weights_as_vllm_lays_them_out_serve_too() -> None:
    torch.manual_seed(5)
    a, b, of = torch.randn(3, 1, 4, 12), torch.randn(3, 1, 9, 4), np.array([2, -1, 0, 2])
    x, y = torch.randn(4, 12), torch.zeros(4, 9)
    kernels.add(y, x, Slots.foreign(a, b), make_plan(of))
    for row, slot in enumerate(of):
        truth = torch.zeros(9) if slot < 0 else b[slot, 0] @ (a[slot, 0] @ x[row])
        assert torch.allclose(y[row], truth, atol=1e-5)


def test_an_embedding_is_expanded_only() -> None:
    torch.manual_seed(6)
    slots = Slots(None, [torch.randn(2, 8, 20)])
    slots.ranks[:] = [3, 8]
    of = np.array([1, 0, -1])
    x, y = torch.randn(3, 8), torch.zeros(3, 20)
    kernels.add(y, x, slots, make_plan(of))
    assert torch.allclose(y[0], x[0] @ slots.b[0][1], atol=1e-5)
    assert torch.allclose(y[1], x[1, :3] @ slots.b[0][0, :3], atol=1e-5)
    assert not y[2].any()


def test_fewer_rows_than_tokens_are_refused_not_read_past() -> None:
    slots = loaded(8, [8], [2], torch.float32)
    with pytest.raises(ValueError, match="3 rows"):
        kernels.add(torch.zeros(3, 8), torch.zeros(3, 8), slots, make_plan(np.zeros(4, dtype=np.int64)))


def test_a_batch_of_the_base_alone_costs_nothing_and_changes_nothing() -> None:
    slots = loaded(8, [8], [2], torch.float32)
    y = torch.randn(3, 8)
    before, plan = y.clone(), make_plan(np.full(3, -1))
    assert plan.segments == ()
    kernels.add(y, torch.randn(3, 8), slots, plan)
    assert torch.equal(y, before)


def test_a_plan_groups_tokens_and_cuts_them_for_every_thread() -> None:
    plan: Plan = make_plan(np.array([1, 1, -1, 0, 1]), threads=2)
    assert plan.rows.tolist() == [3, 0, 1, 4]
    assert [(s.slot, s.first, s.last) for s in plan.segments] == [(0, 0, 1), (1, 1, 4)]
    assert [(s.slot, s.first, s.last) for s in plan.runs] == [(1, 0, 2), (0, 3, 4), (1, 4, 5)]
    covered = [row for _, first, last in make_plan(np.zeros(1000, dtype=np.int64), threads=2).chunks for row in range(first, last)]
    assert covered == list(range(1000))
