"""The command line as a user meets it: exit statuses, messages, --json, and how fast it answers."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from embedft.adapters.store import AdapterStore
from embedft.cli import _parser, main, parse
from embedft.cli.show import Progress
from embedft.doctor import examine
from tests.embedft.adapter_fixtures import make_adapter


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_help_answers_in_under_half_a_second() -> None:
    times: list[float] = []
    while len(times) < 10 and not (times and min(times) < 0.5):  # other tests run beside this one
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "embedft", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert "train-embed" in done.stdout
    assert min(times) < 0.5


def test_every_option_says_what_it_is_and_what_it_is_by_default() -> None:
    def told(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, str]]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for group in groups:
            for inner, made in group.choices.items():
                yield from told(made, f"{name} {inner}")
        for action in parser._actions if not groups else ():
            said = parser._get_formatter()._get_help_string(action) if action.option_strings else "a place"
            bare = action.default in (None, "", [], argparse.SUPPRESS) or isinstance(action.default, bool)
            yield f"{name} {action.dest}", said if bare or "default" in (said or "") else ""

    assert [name for name, said in told(_parser(), "embedft") if not said] == []


def test_importing_embedft_imports_no_torch() -> None:
    modules = "embedft, embedft.cli, embedft.recipe, embedft.errors"
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_trains_and_measures_compiles_nothing_unless_told(monkeypatch: pytest.MonkeyPatch, in_folder: Path) -> None:
    """An engine decides for itself: tests/serve/test_vllm_command.py."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "given")
    main(["adapters", "list", "--adapters", str(in_folder)])
    assert os.environ["TORCHDYNAMO_DISABLE"] == "given"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    main(["adapters", "list", "--adapters", str(in_folder)])
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


def test_wrong_usage_exits_2_without_a_traceback(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "bad.yaml").write_text("task: embedding\nbase: {model: minilm}\ndata: {train: x}\ntrain: {lrr: 1}\n")
    assert main(["train-embed", "bad.yaml"]) == 2
    assert "did you mean 'train.lr'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train-embed"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(("encoding", "said"), [("utf-8", "caf\\udce9 grün"), ("ascii", "caf\\udce9 gr\\xfcn")])
def test_what_a_terminal_cannot_show_is_written_out(tmp_path: Path, encoding: str, said: str) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 gr\xc3\xbcn")
    command = [sys.executable, "-m", "embedft", "adapters", "list", "--adapters", folder]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert f"{said}; train one" in done.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("rag ask --json", "the following arguments are required: QUESTION, --index"),
        ("data mine a b --negatives 0 --json", "argument --negatives: '0'; expected a whole number of at least 1"),
        ("adapters list --json --nosuch", "unrecognized arguments: --nosuch"),
    ],
)
def test_machines_are_told_of_wrong_usage_too(capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert json.loads(told.out) == {"error": {"code": "usage", "message": said}}
    assert told.err.startswith("usage: ")
    assert said in told.err


def test_machines_are_told_that_a_command_was_stopped(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: AdapterStore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterStore, "names", stop)
    assert main(["adapters", "list", "--adapters", str(in_folder), "--json"]) == 130
    told = capsys.readouterr()
    assert (json.loads(told.out)["error"], told.err) == ({"code": "interrupted", "message": "stopped"}, "embedft: stopped\n")


ROWS = '{"query": "what is red", "positive": "red is a colour"}\n{"query": "what is two", "positive": "two is a number"}\n'
RECIPE = "task: embedding\nname: r\nbase: {model: minilm}\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("data mine rows.jsonl out.jsonl --review out.jsonl", "cannot go to one file"),
        ("data mine rows.jsonl out.jsonl --absolute nan", "expected a finite number"),
        ("data check half.jsonl", "half.jsonl:1: holds half a character"),
        ("data check deep.jsonl", "deep.jsonl:1: nested too deep"),
        ("data check latin.jsonl", "latin.jsonl:2: not UTF-8 (byte 0xe9)"),
        ("data check wide.csv", "wide.csv: UTF-16; convert it to UTF-8"),
        ("data synth docs.jsonl out.jsonl --prompt latin.jsonl", "cannot be read as UTF-8"),
        ("data synth docs.jsonl out.jsonl --prompt rows.jsonl", "no {passage} in it"),
        ("data synth docs.jsonl out.jsonl --generator notaurl", "expected 'text', or a server's URL"),
        ("train-embed recipe.yaml train.seed=-1", "train.seed"),
        ("train-embed recipe.yaml train.learning_rate=1", "did you mean 'train.lr'"),
        ("train-embed recipe.yaml adapter.target_modules=x", "did you mean 'adapter.targets'"),
        ("train-embed folder", "it is a folder; expected a recipe file"),
        ("train-embed pydocs-code", "pydocs-code's data: embedft data pydocs data/pydocs"),
        ("train-lm method-lora", "method-lora's data: embedft data pydocs data/pydocs"),
        ("train-embed medquad", "medquad's data: MedQuAD (questions and answers of the NIH) as a BEIR folder"),
        ("plan recipe.yaml adapter.r=4000", "no layer there has more than 384"),
        ("plan recipe.yaml adapter.layers=99", "this base has 6"),
        ("adapters list --adapters rows.jsonl", "is a file; expected the folder"),
        ("adapters convert a --rank 0", "expected a whole number of at least 1"),
        ("adapters combine c a b --how svd --rank -1", "expected a whole number of at least 1"),
        ("quantize seed-lm out --scheme w4a16 --calibrate empty.txt", "no text in it"),
        ("quantize seed-lm out --scheme w4a16 --calibrate latin.jsonl", "not UTF-8"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback_and_nothing_is_written(
    in_folder: Path, capsys: pytest.CaptureFixture[str], command: str, told: str
) -> None:
    (in_folder / "rows.jsonl").write_text(ROWS)
    (in_folder / "docs.jsonl").write_text('{"text": "red is a colour"}\n')
    (in_folder / "recipe.yaml").write_text(RECIPE)
    (in_folder / "half.jsonl").write_text('{"query": "a \\ud83d", "positive": "b"}\n')
    (in_folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (in_folder / "latin.jsonl").write_bytes(ROWS.replace("two", "caf\xe9").encode("latin-1"))
    (in_folder / "wide.csv").write_text("query,positive\na,b\n", encoding="utf-16")
    (in_folder / "empty.txt").touch()
    (in_folder / "folder").mkdir()
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status in (1, 2)
    assert told in said.err + said.out
    assert not (in_folder / "out").exists()
    assert not (in_folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("action", "option"),
    [
        ("pydocs", "--limit"),
        ("check", "--max-length"),
        *[("mine", option) for option in ("--negatives", "--depth", "--max-length")],
        *[("synth", option) for option in ("--count", "--limit", "--top", "--max-length")],
    ],
)
def test_a_count_that_is_none_is_wrong_usage(action: str, option: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["x.jsonl", "out"][: 2 if action in {"mine", "synth"} else 1]
    for wrong in ("0", "-5", "1.5", "many"):
        with pytest.raises(SystemExit) as stopped:
            main(["data", action, *paths, f"{option}={wrong}"])
        assert stopped.value.code == 2
        assert f"argument {option}: {wrong!r}; expected a whole number of at least 1" in capsys.readouterr().err
    assert list(in_folder.iterdir()) == []


def test_settings_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse(["train-embed", "pydocs-code", "train.lr=1", "--dry-run", "train.seed=2", "--json", "data.limit=3"])
    assert (arguments.dry_run, arguments.json, arguments.overrides) == (True, True, ["train.lr=1", "train.seed=2", "data.limit=3"])
    for wrong in (["train-embed", "pydocs-code", "--dry-rum", "a=1"], ["doctor", "a=1"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "said"), [("data.limit=9", True), ("data.train=mine", False), ("data={train: mine}", False)])
def test_where_a_shipped_recipes_data_comes_from_is_said_only_while_it_is_asked_for(
    in_folder: Path, capsys: pytest.CaptureFixture[str], given: str, said: bool
) -> None:
    (in_folder / "mine").mkdir()
    assert main(["train-embed", "pydocs-code", given]) == 1
    assert ("pydocs-code's data: embedft data pydocs" in capsys.readouterr().err) is said


def test_a_recipe_of_the_other_task_names_the_right_command(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "lm.yaml").write_text("task: causal_lm\nbase: {model: seed-lm}\ndata: {train: x}\n")
    assert main(["train-embed", "lm.yaml"]) == 2
    assert "embedft train-lm" in capsys.readouterr().err


def test_a_missing_adapter_exits_1_and_json_says_so(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "show", "nobody", "--json"]) == 1
    assert output(capsys)["error"]["code"] == "adapter_not_found"  # type: ignore[index]


def test_an_adapters_life_on_the_command_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_adapter(in_folder / "made", name="legal")
    assert main(["adapters", "import", str(made), "--json"]) == 0
    generation = output(capsys)["generation"]
    assert main(["adapters", "list", "--json"]) == 0
    assert [row["name"] for row in output(capsys)["adapters"]] == ["legal"]  # type: ignore[attr-defined, index]
    for given in ("legal", str(made)):
        assert main(["adapters", "verify", given, "--json"]) == 0
        assert output(capsys)["passed"] is True
    assert main(["adapters", "export", "legal", "out"]) == 0
    assert main(["adapters", "push", "legal", "elsewhere"]) == 0
    assert main(["adapters", "remove", "legal"]) == 0
    capsys.readouterr()
    assert main(["adapters", "pull", "elsewhere", "--json"]) == 0
    assert output(capsys) == {"name": "legal", "generation": generation}


def test_what_vllm_needs_to_serve_a_great_rank_is_shown(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_adapter(in_folder / "made", name="legal")
    told: list[str] = []
    for rank in (64, 128):
        passport = json.loads((made / "passport.json").read_text()) | {"r": rank}
        (made / "passport.json").write_text(json.dumps(passport))
        assert main(["adapters", "import", str(made), "--name", f"of-{rank}"]) == 0
        capsys.readouterr()
        assert main(["adapters", "show", f"of-{rank}", "--json"]) == 0
        told.append(output(capsys)["served by"]["vllm"])  # type: ignore[index, call-overload]
    assert told == ["yes", "yes, with max_lora_rank of 128 or more in the server's config"]


def test_importing_an_object_of_the_store_rolls_its_name_back(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        assert main(["adapters", "import", str(make_adapter(in_folder / f"made{seed}", name="legal", seed=seed))]) == 0
    capsys.readouterr()
    assert main(["adapters", "show", "legal", "--json"]) == 0
    older, newer = output(capsys)["history"]  # type: ignore[misc]
    assert main(["adapters", "import", f"adapters/objects/{older}", "--name", "legal"]) == 0
    capsys.readouterr()
    assert main(["adapters", "show", "legal", "--json"]) == 0
    assert output(capsys)["history"] == [older, newer, older]


def test_what_is_held_back_from_a_name_is_listed_and_can_be_removed(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from embedft.adapters.store import AdapterStore

    store = AdapterStore(in_folder / "adapters")
    with store.stage() as stage:
        shutil.copytree(make_adapter(in_folder / "made", name="legal"), stage, dirs_exist_ok=True)
        held = store.hold(stage, "legal")
    assert main(["adapters", "list"]) == 0
    assert f"held back from legal: {held[:12]}" in capsys.readouterr().out
    assert main(["adapters", "list", "--json"]) == 0
    assert output(capsys) == {"adapters": [], "damaged": {}, "held": {"legal": held}}
    assert main(["adapters", "remove", "legal", "--json"]) == 0
    assert output(capsys)["deleted"] == [held]
    assert main(["adapters", "remove", "legal"]) == 1


def test_while_a_server_uses_the_store_files_stay_and_who_removes_is_told(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from embedft.adapters.store import AdapterStore

    store = AdapterStore(in_folder / "adapters")
    made = make_adapter(in_folder / "made", name="legal")
    assert main(["adapters", "import", str(made), "--json"]) == 0
    generation = output(capsys)["generation"]
    server = store.use()
    assert server is not None
    assert main(["adapters", "remove", "legal"]) == 0
    removed = capsys.readouterr().out
    assert "while a server uses this store" in removed
    assert "DELETE /v1/adapters/legal" in removed
    assert store.folder(str(generation)).is_dir()
    os.close(server)
    assert main(["adapters", "import", str(made), "--name", "other"]) == 0
    capsys.readouterr()
    assert main(["adapters", "remove", "other", "--json"]) == 0
    assert output(capsys) == {"removed": "other", "deleted": [generation]}


def test_who_puts_an_adapter_into_a_store_that_a_server_uses_is_told_that_it_does_not_look_by_itself(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedft.adapters.store import AdapterStore

    made = str(make_adapter(in_folder / "made", name="legal"))
    told = "a server uses this store, and goes on with what it has until PUT /v1/adapters/"
    assert main(["adapters", "import", made]) == 0
    assert told not in capsys.readouterr().out
    server = AdapterStore(in_folder / "adapters").use()
    assert server is not None
    for command, name in ((["import", made], "legal"), (["import", made, "--name", "other"], "other"), (["pull", made], "legal")):
        assert main(["adapters", *command]) == 0
        assert f"{told}{name}\n" in capsys.readouterr().out
    assert main(["adapters", "import", made, "--json"]) == 0
    assert set(output(capsys)) == {"generation"}
    os.close(server)


def test_files_that_are_not_there_or_in_the_way_are_named_without_a_traceback(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "rows.jsonl").write_text('{"text": "Bleed a boiler before the winter comes."}\n')
    (in_folder / "file").touch()
    (in_folder / "mine.yaml").write_text("task: embedding\nname: mine\nbase: {model: minilm}\ndata: {train: rows.jsonl}\n")
    for command, status, said in (
        ("data synth rows.jsonl out.jsonl --base bm25 --prompt missing.txt", 1, "missing.txt: No such file or directory"),
        ("recipes copy mine.yaml other.yaml", 2, "mine.yaml is a file of your own already"),
        ("recipes copy pydocs-code nowhere/other.yaml", 1, "nowhere/other.yaml: No such file or directory"),
        ("quantize minilm file --scheme int8", 1, "file is a file: name a new folder"),
    ):
        assert main(command.split()) == status, command
        assert said in capsys.readouterr().err
    assert main(["data", "synth", "rows.jsonl", "out.jsonl", "--prompt", "missing.txt", "--json"]) == 1
    assert output(capsys)["error"]["code"] == "file_failed"  # type: ignore[index]


def test_recipes_are_listed_shown_and_copied(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    names = [row["name"] for row in output(capsys)["recipes"]]  # type: ignore[attr-defined, index]
    assert main(["recipes", "copy", names[0], "mine.yaml"]) == 0
    assert main(["recipes", "copy", names[0], "mine.yaml"]) == 2
    capsys.readouterr()
    assert main(["recipes", "show", "mine.yaml", "train.seed=9", "--json"]) == 0
    assert output(capsys)["train"]["seed"] == 9  # type: ignore[index]


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ("pydocs-code", "loss.name=mnlr", "the losses are mnrl"),
        ("pydocs-code", "adapter.method=dorra", "did you mean 'dora'"),
        ("pydocs-code", "adapter.options={rate: 2}", "its options are"),
        ("pydocs-code", "train.patience=2", "train.evaluate_every"),
        ("method-ia3", "adapter.r=8", "leave adapter.r out"),
    ],
)
def test_a_recipe_is_shown_only_if_training_would_not_refuse_it_by_itself(
    in_folder: Path, capsys: pytest.CaptureFixture[str], recipe: str, given: str, expected: str
) -> None:
    assert main(["recipes", "show", recipe, given]) != 0
    assert expected in capsys.readouterr().err


def test_the_time_left_is_by_the_pace_of_the_run_and_not_by_what_came_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([1000.0, 1009.0, 1020.0, 1090.0, 5000.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress()
    for done, total in ((10, 100), (20, 100), (30, 100), (100, 100), (4, 4)):
        progress(done, total)
    told = ["embedding 30/100  1:10 left", "embedding 100/100  0:00 left", "embedding 4/4  0:00 left"]
    assert capsys.readouterr().err.splitlines() == told


def test_the_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    checks = {check["name"]: check for check in output(capsys)["checks"]}  # type: ignore[attr-defined, index]
    assert checks["torch"]["ok"] is True
    assert checks["bf16 matmul"]["ok"] is True
    assert checks["NF4"]["ok"] is True
    assert checks["C compiler"]["ok"] is True
    assert all(check["mend"] for check in checks.values() if check["ok"] is False)


def test_the_doctor_says_whether_llama_index_can_split_a_document() -> None:
    """uv installs hard links, which nltk refuses: a document of more than one node then ends in a PermissionError."""
    from llama_index import core

    words = Path(core.__file__).parent / "_static" / "nltk_cache" / "corpora" / "stopwords" / "english"
    (check,) = [check for check in examine() if check.name == "llama-index splitter"]
    if words.stat().st_nlink == 1:
        assert check.ok
    else:
        assert check.ok is None
        assert "refusing multiply-linked file" in check.found
        assert check.mend.endswith(f"--link-mode copy --reinstall llama-index-core=={version('llama-index-core')}")
