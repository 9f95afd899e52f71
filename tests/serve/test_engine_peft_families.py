"""What the peft engine writes on bases of many families, mixed and padded in one batch, is what each adapter writes alone."""

import asyncio
import queue
from pathlib import Path

import pytest

from embedft.base import BaseSpec, load_base
from serve.engines.peft.batch import Row, Step
from serve.engines.peft.sampling import Sampling
from serve.engines.peft.worker import Worker
from tests.embedft.methods.cells import WHOLE
from tests.families import DECODERS, tiny_decoder
from tests.serve.engine_process import assert_tokens, greedy, random_adapter, solo

PROMPTS = [[5, 9, 100, 33], [7, 30] * 10, list(range(50, 90))]
TOKENS = 12
# windows, learned positions, slopes instead of positions, one product for q, k and v, experts, states beside keys and values
KINDS = ("gemma3_text", "opt", "bloom", "gpt_neox", "gpt_oss", "lfm2")


@pytest.mark.parametrize("family", list(DECODERS) if WHOLE else KINDS)
def test_a_family_writes_in_a_mixed_batch_what_it_writes_alone(family: str, tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", family)
    adapters = {name: random_adapter(tmp_path / name, base, "causal_lm", seed=seed) for seed, name in enumerate("ab")}
    models = {name: solo(base, "causal_lm", adapters.get(name or "")) for name in (None, *adapters)}
    alone = {(name, k): greedy(model, prompt, TOKENS) for name, model in models.items() for k, prompt in enumerate(PROMPTS)}
    assert len({str(tokens) for tokens, _ in alone.values()}) > 6, "answers that are alike tell nothing"
    worker = Worker(load_base(BaseSpec(str(base)), task="causal_lm"), None)
    for name, folder in adapters.items():
        asyncio.run(worker.load(name, folder))
    told = {job: queue.SimpleQueue[Step]() for job in alone}
    worker.generate([Row(name, PROMPTS[k], Sampling(TOKENS, temperature=0), frozenset(), told[name, k].put) for name, k in alone])
    for job, expected in alone.items():
        steps = [told[job].get(timeout=60)]
        while not steps[-1].finish:
            steps.append(told[job].get(timeout=60))
        assert steps[-1].finish == "length", steps[-1].error
        assert_tokens([step.token for step in steps if step.token is not None], expected)
