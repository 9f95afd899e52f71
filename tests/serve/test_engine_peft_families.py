"""What the peft engine writes on bases of many families, mixed and padded in one batch, is what each adapter writes alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.families import DECODERS, tiny_decoder
from tests.serve.engine_process import assert_tokens, engine, greedy, random_adapter, solo

PROMPTS = [[5, 9, 100, 33], [7, 30] * 10, list(range(50, 90))]


@pytest.mark.parametrize("family", list(DECODERS))
def test_a_family_writes_in_a_mixed_batch_what_it_writes_alone(family: str, tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", family)
    adapters = {name: random_adapter(tmp_path / name, base, "causal_lm", seed=seed) for seed, name in enumerate("ab")}
    models = {name: solo(base, "causal_lm", adapters.get(name)) for name in ("base", *adapters)}
    alone = {(name, k): greedy(model, prompt, 12) for name, model in models.items() for k, prompt in enumerate(PROMPTS)}
    assert len({str(tokens) for tokens, _ in alone.values()}) > 6, "answers that are alike tell nothing"
    with engine("peft", base, "causal_lm") as server:
        for name, folder in adapters.items():
            server.load(name, folder)
        with ThreadPoolExecutor(len(alone)) as pool:
            answers = dict(zip(alone, pool.map(lambda job: server.complete(job[0], PROMPTS[job[1]])["token_ids"], alone), strict=True))
    for job, expected in alone.items():
        assert_tokens(answers[job], expected)
