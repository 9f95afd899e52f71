"""How far a text is read: by a base as it was published, by an adapter as it was trained, by an engine as it was started."""

from pathlib import Path

import pytest

from embedft.adapters.passport import BaseIdentity, Passport
from embedft.base import BaseSpec, load_base
from embedft.embedding.train import settings_for
from embedft.model_folder import describe
from embedft.recipe import EmbeddingRecipe, parse_recipe
from embedft.vectors import vector_kind
from tests.fixtures_embedding import tiny_encoder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It reads 32 tokens and can place 64."""
    return tiny_encoder(tmp_path_factory.mktemp("base") / "base", pooling="mean")


@pytest.mark.parametrize(("engine", "base_reads", "adapter_reads"), [(None, 32, 48), (40, 32, 40), (16, 16, 16), (999, 32, 48)])
def test_each_reads_what_it_was_made_to_within_what_the_engine_takes(
    base: Path, engine: int | None, base_reads: int, adapter_reads: int
) -> None:
    info = describe(base)
    identity = BaseIdentity(model="tiny", fingerprint=info.fingerprint)
    passport = Passport(
        name="a", task="embedding", base=identity, method="lora", r=2, alpha=4, pooling="mean", normalize=True, max_length=48
    )
    by_base = vector_kind(info, None, None, input_type="query", max_length=engine)
    by_adapter = vector_kind(info, passport, "g", input_type="query", max_length=engine)
    assert (by_base.settings.max_length, by_adapter.settings.max_length) == (base_reads, adapter_reads)
    documents = vector_kind(info, passport.model_copy(update={"side": "query"}), "g", input_type="document", max_length=engine)
    assert documents.settings.max_length == adapter_reads, (
        "a query-only adapter's documents: the base's vectors, read as it was trained on them"
    )


@pytest.mark.parametrize(("asked", "granted"), [(None, 32), (16, 16), (48, 48), (100, 64)])
def test_training_reads_what_the_recipe_says_as_far_as_the_base_has_positions(
    base: Path, asked: int | None, granted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe(
        {
            "task": "embedding",
            "name": "n",
            "base": {"model": str(base)},
            "data": {"train": "none"},
            "train": {"max_length": asked} if asked else {},
        }
    )
    assert isinstance(recipe, EmbeddingRecipe)
    assert settings_for(recipe, load_base(BaseSpec(str(base)), task="embedding")).max_length == granted
    assert ("train.max_length=100 is cut" in capsys.readouterr().err) == (asked == 100)
