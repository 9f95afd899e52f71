"""A server's settings: from YAML, or from what the store's adapters need."""

import re
from pathlib import Path

import pytest

from embedft.errors import UsageError
from serve.config import BaseConfig, load_config, with_cores
from tests.serve.world import ROOT, World, put_adapter


def write(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_without_a_file_the_stores_adapters_say_which_bases_are_served(world: World) -> None:
    put_adapter(world.store, "wide", world.texts, seed=1, r=32)
    config = load_config(None, store=world.store, engine="fake")
    assert [(base.task, base.engine, base.max_lora_rank) for base in config.bases] == [
        ("embedding", "fake", 32),
        ("causal_lm", "fake", 2),
    ]
    assert len({base.name for base in config.bases}) == 2
    assert config.adapters == world.store.root


def test_all_faults_of_a_file_are_told_at_once(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a:b, model: m, task: embeding}]\nprot: 80\n")
    with pytest.raises(UsageError) as caught:
        load_config(path, store=world.store)
    assert all(part in str(caught.value) for part in ("bases.0.name", "bases.0.task", "prot"))


def test_a_typo_names_the_nearest_setting_of_its_section(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a, modle: m, task: embedding}]\nlimits: {max_token: 9}\nprot: 80\nwhatever: 1\n")
    with pytest.raises(UsageError) as caught:
        load_config(path, store=world.store)
    for line in (
        "bases.0.modle: there is no such field; did you mean 'model'?",
        "limits.max_token: there is no such field; did you mean 'max_tokens'?",
        "prot: there is no such field; did you mean 'port'?",
    ):
        assert f"- {line}\n" in str(caught.value)
    assert str(caught.value).endswith("- whatever: there is no such field")


def test_without_keys_only_loopback_is_bound(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a, model: m, task: embedding}]\nhost: 0.0.0.0\n")
    with pytest.raises(
        UsageError, match=r"- server: host 0\.0\.0\.0: without a keys file .* or name one \(--keys FILE; `embedft key TENANT`"
    ):
        load_config(path, store=world.store)


def test_the_readmes_settings_are_taken(world: World, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "serve" / "README.md").read_text(encoding="utf-8"), re.S)
    (settings,) = [block for block in blocks if "bases:" in block]
    config = load_config(write(tmp_path, settings), store=world.store)
    assert [(base.name, base.task) for base in config.bases] == [("minilm", "embedding"), ("seed-lm", "causal_lm")]
    assert (config.port, config.adapters) == (8000, tmp_path / "adapters")


def test_a_relative_store_is_relative_to_the_file(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a, model: m, task: embedding}]\nadapters: mine\n")
    assert load_config(path, store=world.store).adapters == tmp_path / "mine"


def test_a_bases_folder_is_relative_to_the_file_as_in_a_recipe(world: World, tmp_path: Path) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    models = ("bases/mine", "minilm", "org/of-the-hub")
    path = write(tmp_path, "bases:\n" + "".join(f"  - {{name: b{n}, model: {one}, task: embedding}}\n" for n, one in enumerate(models)))
    found = [base.model for base in load_config(path, store=world.store).bases]
    assert found == [str(tmp_path / "bases" / "mine"), "minilm", "org/of-the-hub"]


def test_a_limit_that_is_set_twice_is_refused(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a, model: m, task: embedding}]\nlimits: {n: 3, n: 5}\n")
    with pytest.raises(UsageError, match="'n' stands twice"):
        load_config(path, store=world.store)


def test_what_the_command_line_says_goes_before_the_files_word(world: World, tmp_path: Path) -> None:
    path = write(tmp_path, "bases: [{name: a, model: m, task: embedding}]\nadapters: mine\nhost: localhost\nport: 9000\n")
    config = load_config(path, store=world.store)
    assert (config.host, config.port) == ("localhost", 9000)
    config = load_config(path, store=world.store, adapters=world.store.root, host="::1", port=0)
    assert (config.adapters, config.host, config.port) == (world.store.root, "::1", 0)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("cores: abc", "names no cores"),
        ("cores: 3-1", "names no cores"),
        ("cores: ''", "names no cores"),
        ("cores: 0-99999999999", "names no cores"),
        ("engine: cross", "cannot serve task embedding"),
        ("task: cross_encoder, engine: vllm", "cannot serve task cross_encoder"),
    ],
)
def test_what_no_engine_could_do_is_told_before_any_starts(world: World, tmp_path: Path, setting: str, told: str) -> None:
    task = "" if "task" in setting else "task: embedding, "
    with pytest.raises(UsageError, match=told):
        load_config(write(tmp_path, f"bases: [{{name: a, model: m, {task}{setting}}}]\n"), store=world.store)


def test_no_two_vllm_engines_share_a_core_while_another_is_free() -> None:
    def base(name: str, cores: str | None = None) -> BaseConfig:
        return BaseConfig(name=name, model=name, task="embedding", engine="vllm", cores=cores)

    assert [made.cores for made in with_cores((base("a"), base("b")), [0, 1, 2, 3])] == ["0,2", "1,3"]
    assert [made.cores for made in with_cores((base("a", "0-1"), base("b")), [0, 1, 2, 3])] == ["0-1", "2,3"]
    assert [made.cores for made in with_cores((base("a"),), [0, 1])] == [None]
    assert [made.cores for made in with_cores((base("a"), base("b")), [0])] == [None, None]


@pytest.mark.parametrize("named_by", ["option", "file"])
def test_a_folder_of_indexes_that_is_not_there_is_said_so(world: World, tmp_path: Path, named_by: str) -> None:
    path = write(tmp_path, "bases: [{name: a, model: m, task: embedding}]\n" + ("indexes: gone\n" if named_by == "file" else ""))
    option = tmp_path / "gone" if named_by == "option" else None
    with pytest.raises(UsageError, match=r"there is no folder .*gone: make it; `embedft rag index"):
        load_config(path, store=world.store, indexes=option)
    (tmp_path / "gone").mkdir()
    assert load_config(path, store=world.store, indexes=option).indexes == tmp_path / "gone"
