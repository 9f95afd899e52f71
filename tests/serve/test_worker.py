"""The peft engine's worker: what it queues, gathers, refuses and goes on with."""

import asyncio
import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from embedft.base import BaseSpec, load_base
from embedft.encode import Encoder, EncodeSettings
from embedft.errors import EngineBusy, EngineFailed, InputInvalid
from serve.engines.peft.answers import Piece
from serve.engines.peft.batch import Batch, Row, Step
from serve.engines.peft.bodies import Chat, Completion
from serve.engines.peft.generation import Request
from serve.engines.peft.sampling import Sampling
from serve.engines.peft.threads import AGAIN, TRIED, Threads
from serve.engines.peft.tools import ToolReader
from serve.engines.peft.worker import MAX_WAITING, Worker
from tests.fixtures_embedding import tiny_encoder
from tests.serve.engine_process import random_adapter


def rows(worker: Worker, count: int, **more: Any) -> list[tuple[Row, "queue.SimpleQueue[Step]"]]:
    made = [queue.SimpleQueue[Step]() for _ in range(count)]
    return [(Row(None, [5, 9], Sampling(4, temperature=0), frozenset(), steps.put, **more), steps) for steps in made]


def ended(steps: "queue.SimpleQueue[Step]") -> Step:
    while not (step := steps.get(timeout=10)).finish:
        pass
    return step


@pytest.fixture(scope="module")
def worker(plain_llama: Path) -> Worker:
    return Worker(load_base(BaseSpec(str(plain_llama)), task="causal_lm"), None)


def test_rows_whose_prefill_fails_are_told_so(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    (row, steps), (other, others) = rows(worker, 2)
    with monkeypatch.context() as broken:
        broken.setattr(Batch, "_forward", forward)
        worker.generate([row, other])
        assert "out of memory" in str(ended(steps).error)
        assert "out of memory" in str(ended(others).error)
    again, told = rows(worker, 1)[0]
    worker.generate([again])
    assert ended(told).finish == "length"


def test_a_row_that_finds_no_token_ends_alone(worker: Worker) -> None:
    class Broken:
        def masked(self, logits: Any) -> Any:
            raise RuntimeError("no such grammar")

    (row, steps), (other, others) = rows(worker, 1)[0], rows(worker, 1, structure=Broken())[0]
    worker.generate([row, other])
    assert "no such grammar" in str(ended(others).error)
    assert ended(steps).finish == "length"


def test_all_rows_of_a_request_are_queued_or_none(worker: Worker) -> None:
    made = rows(worker, MAX_WAITING + 1)
    with pytest.raises(InputInvalid, match="at most"):
        worker.generate([row for row, _ in made])
    last, told = rows(worker, 1)[0]
    worker.generate([last])
    assert ended(told).finish == "length"
    assert all(steps.empty() for _, steps in made)


def test_who_finds_too_many_waiting_is_told_to_come_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engines.peft.worker.MAX_WAITING", 3)
    monkeypatch.setattr("serve.engines.peft.batch.MAX_ROWS", 1)
    opened, told = threading.Event(), queue.SimpleQueue[Step]()

    def emit(step: Step) -> None:  # from the model's thread, which waits here
        told.put(step)
        assert opened.wait(10)

    first = Row(None, [5, 9], Sampling(2, temperature=0), frozenset(), emit)
    worker.generate([first])
    told.get(timeout=10)
    waiting = rows(worker, 3)
    worker.generate([row for row, _ in waiting])
    with pytest.raises(EngineBusy, match="3 sequences are waiting"):
        worker.generate([rows(worker, 1)[0][0]])
    opened.set()
    assert [ended(steps).finish for _, steps in waiting] == ["length"] * 3
    again, steps = rows(worker, 1)[0]
    worker.generate([again])
    assert ended(steps).finish == "length"


def test_a_pass_holds_no_more_tokens_and_a_batch_no_more_rows_than_are_allowed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[str, int]] = []
    real = Threads.of
    monkeypatch.setattr(Threads, "of", lambda self, kind, tokens: passes.append((kind, tokens)) or real(self, kind, tokens))
    monkeypatch.setattr("serve.engines.peft.batch.PREFILL_TOKENS", 5)
    monkeypatch.setattr("serve.engines.peft.batch.MAX_ROWS", 3)
    batch, made = Batch(worker.bank), rows(worker, 7)
    batch.waiting.extend(row for row, _ in made)
    while batch:
        batch.step()
    assert all(ended(steps).finish == "length" for _, steps in made)
    assert max(tokens for kind, tokens in passes if kind == "prefill") == 4  # two prompts of two tokens
    assert max(tokens for kind, tokens in passes if kind == "decode") == 3
    long = Row(None, [5] * 40, Sampling(2, temperature=0), frozenset(), lambda _: None)
    batch.waiting.extend([long, rows(worker, 1)[0][0]])
    monkeypatch.setattr("serve.engines.peft.batch.PREFILL_TOKENS", 100)
    batch.step()
    batch.step()
    assert batch._mask is not None  # pyright: ignore[reportPrivateUsage]
    assert batch._mask.shape == (1, 3)  # pyright: ignore[reportPrivateUsage]  # nobody goes on padding to a prompt that has gone


def test_an_answer_that_its_stop_string_ended_is_generated_no_further(worker: Worker) -> None:
    async def texts(stop: str | None) -> list[str]:
        body = Completion(prompt=[[5, 9], [100, 33, 7]], temperature=0, ignore_eos=True, stop=stop)
        asked = Request(worker, body, prompts=[[5, 9], [100, 33, 7]], adapter=None, max_tokens=40, logprobs=None, eos=frozenset())
        said = ["", ""]
        async for piece in asked.pieces():
            said[piece.index] += piece.text
            if stop and piece.finish == "stop":
                assert asked.rows[piece.index].cancelled
                assert not asked.rows[1 - piece.index].cancelled
                asked.close()
                break
        return said

    first, second = asyncio.run(texts(None))
    stop = next(first[at : at + 3] for at in range(3, len(first) - 3) if first[at : at + 3] not in second)
    assert asyncio.run(texts(stop))[0] == first[: first.index(stop)]


def test_where_calls_go_one_by_one_an_answer_has_one(worker: Worker) -> None:
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "look"}}]

    async def calls(**more: Any) -> tuple[int, str | None]:
        body = Chat.model_validate({"messages": [{"role": "user"}], "tools": tools, **more})
        asked = Request(worker, body, prompts=[], adapter=None, max_tokens=1, logprobs=None, eos=frozenset())
        asked._tools = [ToolReader(body.tool_names)]  # pyright: ignore[reportPrivateUsage]
        piece = Piece(0, call * 2, finish="stop")
        asked._find_calls(piece)  # pyright: ignore[reportPrivateUsage]
        return len(piece.calls), piece.finish

    assert asyncio.run(calls()) == asyncio.run(calls(parallel_tool_calls=True)) == (2, "tool_calls")
    assert asyncio.run(calls(parallel_tool_calls=False)) == (1, "tool_calls")


def test_vectors_that_are_not_finite_are_nobodys_answer(tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    folder = random_adapter(tmp_path / "a", base.folder, "embedding", seed=0)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    encoder = Held(base.model, base.folder, EncodeSettings("mean", True, 16))
    worker = Worker(base, encoder)

    async def run() -> None:
        await worker.load("nan", folder)
        first = asyncio.create_task(worker.embed(None, [[1, 5, 9, 2]]))
        while not encoder.batches:
            await asyncio.sleep(0.01)
        mixed = [asyncio.create_task(worker.embed(name, [[1, 5, 9, 2]])) for name in ("nan", None)]
        await asyncio.sleep(0.05)
        encoder.gate.set()
        alone = await first
        broken, beside = await asyncio.gather(*mixed, return_exceptions=True)
        assert isinstance(broken, EngineFailed)
        assert isinstance(beside, np.ndarray)
        assert np.allclose(beside, alone, atol=1e-6)

    asyncio.run(run())
    assert encoder.batches == [1, 2]


class Held(Encoder):
    """An encoder that tells how many texts each of its batches had, and stands still while its gate is shut."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[int] = []
        self.gate = threading.Event()

    def encode_ids(self, ids: Any, **more: Any) -> Any:
        self.batches.append(len(ids))
        assert self.gate.wait(10)
        return super().encode_ids(ids, **more)


def test_texts_that_nobody_waits_for_any_more_are_not_embedded(tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    encoder = Held(base.model, base.folder, EncodeSettings("mean", True, 16))
    worker = Worker(base, encoder)

    async def run() -> None:
        first = asyncio.create_task(worker.embed(None, [[1, 5, 9, 2]]))
        while not encoder.batches:
            await asyncio.sleep(0.01)
        for _ in range(5):
            gone = asyncio.create_task(worker.embed(None, [[1, 5, 9, 2]] * 7))
            await asyncio.sleep(0.01)
            gone.cancel()
        last = asyncio.create_task(worker.embed(None, [[1, 5, 9, 2]] * 2))
        await asyncio.sleep(0.05)
        encoder.gate.set()
        assert [len(await task) for task in (first, last)] == [1, 2]

    asyncio.run(run())
    assert encoder.batches == [1, 2]


def test_a_short_request_waits_for_one_pass_of_a_long_one_and_no_more(tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    encoder = Held(base.model, base.folder, EncodeSettings("mean", True, 16))
    worker = Worker(base, encoder)
    texts = [[1, *[5 + row % 20] * (row % 9), 2] for row in range(300)]
    alone = Encoder(base.model, base.folder, EncodeSettings("mean", True, 16)).encode_ids(texts)

    async def run() -> None:
        long = asyncio.create_task(worker.embed(None, texts))
        while not encoder.batches:
            await asyncio.sleep(0.01)
        short = asyncio.create_task(worker.embed(None, texts[:2]))
        await asyncio.sleep(0.05)
        encoder.gate.set()
        np.testing.assert_allclose(await short, alone[:2], atol=1e-5)
        assert not long.done()
        np.testing.assert_allclose(await long, alone, atol=1e-5)

    asyncio.run(run())
    assert encoder.batches == [64, 64, 64, 64, 46]


def test_a_pass_over_texts_is_as_short_as_its_longest_text_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engines.peft.worker.PASS_TOKENS", 20)
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    encoder = Held(base.model, base.folder, EncodeSettings("mean", True, 64))
    encoder.gate.set()
    assert len(asyncio.run(Worker(base, encoder).embed(None, [[5] * 30, [5] * 8, [5] * 8, [5] * 25]))) == 4
    assert encoder.batches == [2, 1, 1]


def test_the_model_goes_on_while_an_adapter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    folder = random_adapter(tmp_path / "a", base.folder, "embedding", seed=0)
    worker = Worker(base, Encoder(base.model, base.folder, EncodeSettings("mean", True, 16)))
    read, opened = worker.bank.read, threading.Event()

    def slowly(name: str, path: Path) -> Any:
        assert opened.wait(10)
        return read(name, path)

    monkeypatch.setattr(worker.bank, "read", slowly)

    async def run() -> None:
        loading = asyncio.create_task(worker.load("a", folder))
        async with asyncio.timeout(5):
            assert len(await worker.embed(None, [[1, 5, 9, 2]])) == 1
        assert not loading.done()
        opened.set()
        await loading
        assert worker.names == ("a",)

    asyncio.run(run())


def test_embeddings_wait_for_as_many_as_there_were_but_not_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engines.peft.worker.GATHER_SHARE", 4.0)
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    encoder = Held(base.model, base.folder, EncodeSettings("mean", True, 16))
    worker = Worker(base, encoder)

    async def asked(rows: int = 1) -> float:
        began = time.perf_counter()
        await worker.embed(None, [[1, 5, 9, 2]] * rows)
        return time.perf_counter() - began

    async def two_while_one_runs() -> list[asyncio.Task[float]]:
        encoder.gate.clear()
        passes = len(encoder.batches)
        lone = asyncio.create_task(asked())
        while len(encoder.batches) == passes:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(asked()) for _ in range(2)]
        await asyncio.sleep(0.4)  # so long a pass takes, then
        encoder.gate.set()
        await lone
        return others

    async def run() -> None:
        others = await two_while_one_runs()
        assert max(await asyncio.gather(asked(), *others)) < 1.2  # the third came back: nobody waits for more
        others = await two_while_one_runs()
        assert min(await asyncio.gather(*others)) > 1.8  # it did not
        assert await asked(rows=64) < 1.0  # a full batch
        assert await asked() < 1.0

    asyncio.run(run())
    assert encoder.batches == [1, 3, 1, 2, 64, 1]


def test_a_pass_takes_as_many_threads_as_were_fastest_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, number, taken = [0.0], [0], list[int]()
    monkeypatch.setattr("serve.engines.peft.threads.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("torch.set_num_threads", lambda wanted: number.__setitem__(0, wanted))
    threads = Threads(4)

    def passes(kind: str, tokens: int, count: int, seconds: dict[int, float]) -> list[int]:
        taken.clear()
        for _ in range(count):
            with threads.of(kind, tokens):
                taken.append(number[0])
                clock[0] += seconds[number[0]]
        return taken

    assert passes("decode", 1, 6, {1: 1.7, 4: 3.0}).count(4) == TRIED
    assert passes("decode", 1, AGAIN, {1: 1.7, 4: 3.0}).count(4) == 1  # a look at what the others would take, now and then
    assert set(passes("embed", 1024, 40, {1: 66.0, 4: 41.0})[2 * TRIED :]) == {4}
    later = passes("decode", 1, 10 * AGAIN, {1: 9.0, 4: 3.0})  # another engine took the core of one
    assert later[-1] == later[-2] == 4
    with pytest.raises(RuntimeError, match="planted"), threads.of("prefill", 8):
        raise RuntimeError("planted")
    assert passes("prefill", 8, 6, {1: 1.0, 4: 1.0}).count(1) == TRIED  # a pass that failed tells nothing
    number[0] = 7
    with Threads(1).of("decode", 1):
        assert number[0] == 7


def test_every_pass_of_the_model_chooses_its_threads(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    used: list[tuple[str, int]] = []
    real = Threads.of
    monkeypatch.setattr(Threads, "of", lambda self, kind, tokens: used.append((kind, tokens)) or real(self, kind, tokens))
    embedder = Worker(base, Encoder(base.model, base.folder, EncodeSettings("mean", True, 16)))
    asyncio.run(embedder.embed(None, [[1, 5, 9, 2], [1, 2]]))
    assert used == [("embed", 6)]
    (row, steps), *_ = rows(worker, 1)  # a prompt of two tokens, four to be generated
    worker.generate([row])
    ended(steps)
    assert used[1:] == [("prefill", 2), *[("decode", 1)] * 3]
