"""Bases of other families than BERT: each says in its own words how wide it is and how long a text it can place."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from embedft.adapters.store import AdapterStore
from embedft.errors import BaseError
from embedft.model_folder import describe
from tests.embedft.embedding.runs import Make, trained
from tests.fixtures_embedding import tiny_encoder, write_beir, write_rows

POSITIONS = 66
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CALLED: dict[str, dict[str, Any]] = {
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Camembert": SIZES,
    "MPNet": SIZES,
    "DistilBert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 2},
}


def base_of(family: str, folder: Path) -> Path:
    """A tiny random base of a family, with the tiny tokenizer."""
    tiny_encoder(folder, pooling="mean")
    (folder / "model.safetensors").unlink()
    vocabulary = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    config = getattr(transformers, f"{family}Config")
    given = {"vocab_size": vocabulary, "max_position_embeddings": POSITIONS, "initializer_range": 0.2, "pad_token_id": 1}
    getattr(transformers, f"{family}Model")(config(**given, **CALLED[family])).save_pretrained(folder)
    (folder / "sentence_bert_config.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("family", CALLED)
def test_a_base_of_any_family_trains_on_texts_as_long_as_it_can_place(family: str, make: Make, store: AdapterStore, tmp_path: Path) -> None:
    folder = base_of(family, tmp_path / "base")
    assert describe(folder).positions == (POSITIONS if family == "DistilBert" else POSITIONS - 2)
    beir = Path(write_beir(tmp_path / "long", train=32, test=8))
    rows = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    write_rows(beir / "corpus.jsonl", [row | {"text": " ".join([row["text"]] * 60)} for row in rows])
    result = trained(make(str(folder), data={"train": str(beir)}, train={"batch": 8, "epochs": 1, "max_length": 512}), store)
    assert store.names() == {"tiny": result.generation}


def test_a_folder_that_says_nothing_of_its_width_is_refused_by_name(tmp_path: Path) -> None:
    folder = base_of("DistilBert", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    del config["dim"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match=r"odd/config\.json says no hidden_size"):
        describe(folder)
