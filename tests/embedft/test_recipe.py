from pathlib import Path

import pytest
import yaml

from embedft.errors import RecipeError
from embedft.recipe import CausalLMRecipe, EmbeddingRecipe, parse_recipe
from embedft.recipe_file import data_note, load_recipe, shipped_recipes
from embedft.strict_yaml import read_yaml

MINIMAL = {"task": "embedding", "base": {"model": "minilm"}, "data": {"train": "train.jsonl"}}


def written(folder: Path, content: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_recipe_needs_only_task_base_and_data(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert isinstance(recipe, EmbeddingRecipe)
    assert (recipe.name, recipe.adapter.method, recipe.adapter.scale_alpha) == ("mine", "lora", 32)


def test_all_faults_are_reported_at_once_with_the_nearest_key() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, "train": {"learning_rate": 1, "batch": -1}, "adaptor": {}})
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "did you mean 'adapter" in text
    assert "train.batch" in text


@pytest.mark.parametrize("key", ["learning_rate", "lerning_rate", "learning_rte"])
def test_another_librarys_word_for_a_key_is_known_even_with_a_typo(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.{key}: no such key; did you mean 'train\.lr'\?"):
        parse_recipe({**MINIMAL, "train": {key: 1}})


def test_a_key_that_stands_twice_is_refused_not_half_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: embedding\nbase: {model: minilm}\ndata: {train: t.jsonl}\ntrain: {lr: 1e-3}\ntrain: {batch: 4}\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError, match=r"(?s)'train' stands twice.*line 5"):
        load_recipe(path)


def test_one_mapping_may_build_on_another() -> None:
    content = "few: &few {rows: 1, seed: 2}\nmany: {<<: *few, rows: 9}\nmore: {<<: *few, rows: 99}\n"
    assert read_yaml(content) == yaml.safe_load(content)


def test_overrides_are_dotted_and_typed(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL), ["train.lr=1e-4", "adapter.r=8", "data.prompts.query=query: "])
    assert isinstance(recipe, EmbeddingRecipe)
    assert (recipe.train.lr, recipe.adapter.r, recipe.data.prompts.query) == (1e-4, 8, "query: ")


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("Query ", "Query "),
        ("part #1: ", "part #1: "),
        ("{query} ", "{query} "),
        ("[q] ", "[q] "),
        ("Find: what is asked: ", "Find: what is asked: "),
        ("Instruct: find\nQuery:", "Instruct: find\nQuery:"),
        ("سؤال: ", "سؤال: "),
        ("1e3", "1e3"),
        ('"in quotes: "', "in quotes: "),
        ("'1'", "1"),
        ('"', '"'),
        ("", ""),
        ("null", None),
    ],
)
def test_a_prompt_on_the_command_line_is_text_to_its_last_blank(tmp_path: Path, given: str, prompt: str | None) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL), [f"data.prompts.query={given}"])
    assert recipe.data.prompts.query == prompt  # type: ignore[union-attr]


def test_an_override_of_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.lr"):
        load_recipe(written(tmp_path, MINIMAL), ["train.lrr=1"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter": {"targets": "nosuch"}}, "adapter.targets: expected all-linear, or a list such as [query, value] (got 'nosuch')"),
        ({"adapter": {"targets": []}}, "adapter.targets: expected all-linear, or a list such as [query, value] (got [])"),
        ({"adapter": {"targets": [1, 2]}}, "adapter.targets: expected all-linear, or a list such as [query, value] (got [1, 2])"),
        ({"adapter": {"options": {"rate": [1]}}}, "adapter.options.rate: expected true, false, a finite number or a text (got [1])"),
        ({"base": "minilm"}, "base: expected a section such as {model: minilm} (got 'minilm')"),
        ({"base": {}}, "base.model: field required"),
        ({"data": {"train": "x", "also": ["y"]}}, "data.also.0: expected a section such as {train: more.jsonl} (got 'y')"),
        ({"data": {"train": "x", "also": [{"weight": 2}]}}, "data.also.0.train: field required"),
        ({"loss": {"dimensions": 64}}, "loss.dimensions: expected a list such as [256, 128] (got 64)"),
        ({"eval": {"guard": "pydocs"}}, "eval.guard: expected null, or a section such as {data: pydocs} (got 'pydocs')"),
    ],
)
def test_a_value_of_the_wrong_shape_is_one_fault_that_says_what_is_wanted(given: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, **given})
    assert caught.value.problems == [said]


SECTIONS = ("base", "adapter", "data", "train", "eval", "loss", "adapter.options", "data.prompts", "eval.guard")
LISTS = ("adapter.targets", "data.also", "loss.dimensions", "train.trackers")


@pytest.mark.parametrize("key", [*SECTIONS, *LISTS])
def test_every_section_and_list_says_what_it_is_where_it_is_given_a_number(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, MINIMAL), [f"{key}=4"])
    assert [problem.partition(": expected ")[0] for problem in caught.value.problems] == [key]


@pytest.mark.parametrize("value", ["1e400", ".inf", "-.inf", ".nan", "nan"])
@pytest.mark.parametrize("key", ["train.lr", "train.weight_decay", "train.warmup", "loss.scale", "eval.guard.drop"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=key):
        load_recipe(written(tmp_path, MINIMAL), [f"{key}={value}"])


@pytest.mark.parametrize("value", ["0", "-1", "2e30", "1e38"])
def test_a_rate_that_float32_cannot_hold_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.lr"):
        load_recipe(written(tmp_path, MINIMAL), [f"train.lr={value}"])


@pytest.mark.parametrize("override", ["train.lr", "=3", "name.first=x"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(written(tmp_path, {**MINIMAL, "name": "mine"}), [override])


def test_paths_are_relative_to_the_recipe_and_those_of_overrides_to_the_working_directory(tmp_path: Path, in_folder: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = load_recipe(written(folder, MINIMAL), ["data.eval=here"])
    assert recipe.data.train == str(folder / "train.jsonl")
    assert recipe.data.eval == str(in_folder / "here")


def test_every_path_to_data_is_relative_to_the_recipe_but_a_hubs(tmp_path: Path, in_folder: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    data = {"train": "hf://owner/set#train", "dev": "dev.jsonl", "also": [{"train": "more.jsonl"}]}
    recipe = load_recipe(written(folder, {**MINIMAL, "data": data, "eval": {"guard": {"data": "general.jsonl"}}}))
    assert isinstance(recipe, EmbeddingRecipe)
    assert recipe.eval.guard is not None
    assert (recipe.data.train, recipe.data.eval) == ("hf://owner/set#train", None)
    assert [recipe.data.dev, recipe.data.also[0].train, recipe.eval.guard.data] == [
        str(folder / name) for name in ("dev.jsonl", "more.jsonl", "general.jsonl")
    ]
    pydocs = load_recipe(written(folder, {**MINIMAL, "eval": {"guard": {"data": "pydocs"}}}), ["eval.guard.queries=9"])
    assert isinstance(pydocs, EmbeddingRecipe)
    assert pydocs.eval.guard is not None
    assert pydocs.eval.guard.data == "pydocs"
    words = {"task": "causal_lm", "base": {"model": "seed-lm"}, "data": {"train": "t.jsonl", "validation": "v.jsonl"}}
    other = load_recipe(written(folder, words))
    assert isinstance(other, CausalLMRecipe)
    assert other.data.validation == str(folder / "v.jsonl")


@pytest.mark.parametrize("name", ["", "Upper", "../up", "a/b", ".hidden", "a b", "a" * 65, "ü"])
def test_a_name_that_could_leave_its_folder_is_a_fault(name: str) -> None:
    with pytest.raises(RecipeError, match="name: "):
        parse_recipe({**MINIMAL, "name": name})


@pytest.mark.parametrize("task", ["embeddings", 3, None])
def test_an_unknown_task_names_the_two_there_are(task: object) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, "task": task})
    assert caught.value.problems == ["task: expected 'embedding' or 'causal_lm'"]


def test_a_portable_recipe_holds_no_machine_path(tmp_path: Path) -> None:
    (tmp_path / "own-base").mkdir()
    data = {"train": "deep/train.jsonl", "eval": "deep/test", "dev": "dev.jsonl", "also": [{"train": "more.jsonl"}]}
    content = {**MINIMAL, "base": {"model": "own-base"}, "data": data, "eval": {"guard": {"data": "general.jsonl"}}}
    recipe = load_recipe(written(tmp_path, content))
    assert recipe.base.model == str(tmp_path / "own-base")
    said = yaml.safe_load(recipe.portable_yaml())
    assert str(tmp_path) not in recipe.portable_yaml()
    assert (said["base"]["model"], said["data"]["train"]) == ("own-base", "deep/train.jsonl")


def test_a_recipe_that_is_shown_is_the_same_recipe_once_it_is_saved_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    data = {"train": "deep/in/train.jsonl", "also": [{"train": "deep/in/more.jsonl"}]}
    recipe = load_recipe(written(tmp_path, {**MINIMAL, "base": {"model": "base"}, "data": data}))
    saved = tmp_path / "elsewhere" / "mine.yaml"
    saved.write_text(recipe.resolved_yaml(), encoding="utf-8")
    assert load_recipe(saved) == recipe


def test_the_digest_changes_with_any_setting(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    assert load_recipe(path).digest() == load_recipe(path).digest() != load_recipe(path, ["train.seed=8"]).digest()


def test_neither_a_file_nor_a_shipped_recipe_is_said_so() -> None:
    with pytest.raises(RecipeError, match="neither a file nor a shipped recipe"):
        load_recipe("no-such-recipe")


def test_every_shipped_recipe_parses_and_holds_no_default() -> None:
    shipped = shipped_recipes()
    assert len(shipped) >= 4
    for path in shipped.values():
        recipe = load_recipe(path)
        assert recipe.name == path.stem
        defaults = type(recipe).model_fields
        for section, given in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if section in {"adapter", "train", "eval", "loss"}:
                kind = defaults[section].annotation
                assert kind is not None
                standard = kind().model_dump(mode="json")
                assert not [key for key, value in given.items() if standard[key] == value], f"{path.name}: {section} repeats a default"


def test_a_typo_within_a_section_that_may_be_null_names_the_nearest_key() -> None:
    content = {"task": "embedding", "base": {"model": "minilm"}, "data": {"train": "x"}, "eval": {"guard": {"dropp": 0.1}}}
    with pytest.raises(RecipeError, match=r"did you mean 'eval\.guard\.drop'"):
        parse_recipe(content)


def test_every_recipe_that_runs_offline_says_where_its_data_comes_from() -> None:
    silent = [name for name in shipped_recipes() if not data_note(name) and load_recipe(name).base.model in {"minilm", "seed-lm"}]
    assert not silent


def test_both_tasks_are_shipped() -> None:
    kinds = {type(load_recipe(path)) for path in shipped_recipes().values()}
    assert kinds == {EmbeddingRecipe, CausalLMRecipe}
