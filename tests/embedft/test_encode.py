"""embedft.encode against plain sentence-transformers on the same folder, and its own promises."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.base import BaseSpec, load_model, source_folder
from embedft.encode import Encoder, EncodeSettings, TextPreparer, finish
from embedft.errors import BaseNotFound, InputInvalid, UsageError
from tests.fixtures_embedding import planted_rows, tiny_decoder, tiny_encoder

TEXTS = [
    "Return the number of items in a list.",
    "  two  spaces, and\na line's end ",
    "naïve Straße 東京 " * 30,
    "x",
    "def area(radius): return 3.14159 * radius ** 2",
]
MINILM = EncodeSettings("mean", True, 64, {"query": "find: "})


@pytest.fixture(scope="module")
def minilm() -> Path:
    return source_folder(BaseSpec("minilm"))


@pytest.fixture(scope="module")
def minilm_encoder(minilm: Path) -> Encoder:
    return Encoder(load_model(minilm, task="embedding"), minilm, MINILM)


def plain(folder: Path, texts: list[str], *, max_length: int, **options: Any) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = max_length
    return model.encode(texts, **options)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def test_a_mean_pooled_base_gives_the_vectors_of_plain_sentence_transformers(minilm: Path, minilm_encoder: Encoder) -> None:
    theirs = plain(minilm, TEXTS, max_length=64)
    assert np.abs(minilm_encoder.encode(TEXTS) - theirs).max() < 1e-5


def test_a_prompt_counts_as_text_as_in_plain_sentence_transformers(minilm: Path, minilm_encoder: Encoder) -> None:
    theirs = plain(minilm, TEXTS, max_length=64, prompt="find: ")
    ours = minilm_encoder.encode(TEXTS, input_type="query")
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - minilm_encoder.encode(TEXTS, input_type="document")).max() > 1e-2


def test_a_cls_pooled_copy_pools_its_first_token(minilm: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(minilm, tmp_path / "cls"))
    config = json.loads((copy / "1_Pooling" / "config.json").read_text())
    config |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
    ours = Encoder(load_model(copy, task="embedding"), copy, EncodeSettings("cls", True, 64)).encode(TEXTS)
    assert cosines(ours, plain(copy, TEXTS, max_length=64)).min() > 0.99999
    assert cosines(ours, plain(minilm, TEXTS, max_length=64)).min() < 0.95


def test_a_decoder_pools_the_last_token_that_its_tokenizer_gives(tmp_path: Path) -> None:
    folder = tiny_decoder(tmp_path / "decoder")
    texts = [row["query"] for row in planted_rows(5)] + ["one"]
    settings = EncodeSettings("lasttoken", True, 32)
    ours = Encoder(load_model(folder, task="embedding"), folder, settings).encode(texts, batch_size=2)
    assert cosines(ours, plain(folder, texts, max_length=32)).min() > 0.9999
    ids = TextPreparer(folder, settings).prepare(["one"]).ids[0]
    assert len(ids) == 2, "the tokenizer adds <s>, and nothing is appended after the text"


def test_vectors_do_not_depend_on_their_batch_and_keep_their_order(minilm_encoder: Encoder) -> None:
    together = minilm_encoder.encode(TEXTS, batch_size=5)
    alone = np.concatenate([minilm_encoder.encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    assert np.array_equal(minilm_encoder.encode(TEXTS, batch_size=1), alone)


def test_a_file_that_carries_its_own_padding_and_truncation_is_read_without_them(minilm: Path) -> None:
    prepared = TextPreparer(minilm, EncodeSettings("mean", True, 200)).prepare(["x", "word " * 300])
    assert [len(ids) for ids in prepared.ids] == [3, 200]
    assert prepared.truncated == 1


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_that_leaves_no_token_of_a_text_is_refused_and_never_cuts_nothing(minilm: Path, limit: int) -> None:
    with pytest.raises(UsageError, match=rf"max_length of {limit} .* 2 special tokens .* at least 3 \(train\.max_length"):
        TextPreparer(minilm, EncodeSettings("mean", True, limit))
    assert len(TextPreparer(minilm, EncodeSettings("mean", True, 3)).prepare(["word " * 9]).ids[0]) == 3


def test_a_text_that_is_too_long_is_refused_only_when_asked(minilm: Path) -> None:
    preparer = TextPreparer(minilm, EncodeSettings("mean", True, 16))
    with pytest.raises(InputInvalid) as caught:
        preparer.prepare(["short", "word " * 40], truncate=False)
    assert caught.value.code == "input_too_long"
    assert preparer.prepare(["short"], truncate=False).truncated == 0
    assert preparer.prepare(["word " * 14], truncate=False).truncated == 0, "14 words and two special tokens fit exactly"


def test_a_text_alone_has_the_ids_that_it_has_among_others(minilm: Path) -> None:
    preparer = TextPreparer(minilm, EncodeSettings("mean", True, 16, {"query": "find: "}))
    texts = ["short", "word " * 40, "naïve Straße 東京", "  two  spaces\n"]
    together = preparer.prepare(texts, "query")
    alone = [preparer.prepare([text], "query") for text in texts]
    assert [one.ids[0] for one in alone] == together.ids
    assert [one.truncated for one in alone] == [0, 1, 0, 0]
    for half in (["\ud800"], ["\ud800", "whole"]):
        with pytest.raises(InputInvalid, match="half a character"):
            preparer.prepare(half)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "bare", pooling="mean")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(InputInvalid) as caught:
        TextPreparer(folder, EncodeSettings("mean", True, 8)).prepare(["fine", ""])
    assert caught.value.code == "input_empty"


def test_truncated_dimensions_of_a_normalising_model_have_length_one() -> None:
    import torch

    vectors = torch.randn(3, 8)
    short = finish(vectors, EncodeSettings("mean", True, 8, dimensions=4))
    assert short.shape == (3, 4)
    assert torch.allclose(short.norm(dim=1), torch.ones(3))
    assert torch.equal(finish(vectors, EncodeSettings("mean", False, 8, dimensions=4)), vectors[:, :4])


def test_encoding_leaves_a_training_model_in_training_mode(minilm_encoder: Encoder) -> None:
    minilm_encoder.model.train()
    first = minilm_encoder.encode(TEXTS[:2])
    assert minilm_encoder.model.training
    minilm_encoder.model.eval()
    assert np.array_equal(first, minilm_encoder.encode(TEXTS[:2])), "dropout was off"


def test_a_folder_without_a_tokenizer_file_and_an_unknown_pooling_are_named(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"tokenizer\.json"):
        TextPreparer(tmp_path, EncodeSettings("mean", True, 8))
    with pytest.raises(InputInvalid, match="max"):
        EncodeSettings("max", True, 8)  # type: ignore[arg-type]


def test_preparing_token_ids_imports_no_torch(minilm: Path) -> None:
    code = (
        "import sys; from embedft.encode import *; "
        f"TextPreparer({str(minilm)!r}, EncodeSettings('mean', True, 8)).prepare(['x']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
