"""Vectors of bases of many families: sentence-transformers' own, and with adapters the same in the peft engine's mixed batch as alone."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.base import BaseSpec, load_base
from embedft.encode import Encoder
from embedft.vectors import published_settings
from serve.engines.peft.worker import Worker
from tests.families import ENCODERS, tiny_embedder
from tests.serve.engine_process import assert_vectors, random_adapter, solo

TEXTS = ["red", "what does green mean?", "number 7: what does blue mean? " * 3, "stone snow " * 40]


@pytest.mark.parametrize("family", list(ENCODERS))
def test_a_familys_vectors_are_sentence_transformers_and_an_adapters_are_its_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("EMBEDFT_DTYPE", "float32")
    folder = tiny_embedder(tmp_path / "base", family)
    base = load_base(BaseSpec(str(folder)), task="embedding")
    settings = published_settings(base.info, base.info.max_length)
    encoder = Encoder(base.model, folder, settings)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs, atol=2e-5)
    assert (theirs[0] * theirs[1:]).sum(1).max() < 0.999, "vectors that are alike tell nothing"
    adapters = {name: random_adapter(tmp_path / name, folder, "embedding", seed=seed) for seed, name in enumerate("ab")}
    alone = {name: Encoder(solo(folder, "embedding", adapters.get(name)), folder, settings).encode(TEXTS) for name in ("base", *adapters)}
    worker, ids = Worker(base, encoder), encoder.preparer.prepare(TEXTS).ids

    async def made() -> list[Any]:
        for name, path in adapters.items():
            await worker.load(name, path)
        return await asyncio.gather(*(worker.embed(None if name == "base" else name, ids) for name in alone))

    assert_vectors(dict(zip(alone, asyncio.run(made()), strict=True)), alone)
