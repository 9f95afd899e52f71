"""The README is true: its commands run, its figures are the results', its tree is the tree."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from embedft.cli import main, parse
from tests.serve.world import TOKEN, wait_for

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(900)
FEW_PAIRS = "data.limit=64 train.max_length=64 eval.queries=20 eval.documents=40 eval.guard=null train.batch=16"
FEW_ROWS = "data.limit=64 eval.rows=10"


def commands(heading: str) -> list[str]:
    """The lines of the section's shell blocks; a line that ends in a backslash goes on in the next."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def run(command: str, folder: Path) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_quickstart_is_two_commands_and_the_first_does_what_it_says(tmp_path: Path) -> None:
    """The second is what runs this test. The demo is run on a fraction of its data and with the engine that starts soonest, in bf16 where
    the machine multiplies in it, as for who types this: there an adapter that hardly does anything is refused."""
    assert commands("Quickstart") == ["make demo", "make test"]
    run(f"env -u EMBEDFT_DTYPE make -o install demo ARGS='--quick --engine peft --out {tmp_path}'", ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"quality", "switch_ms", "memory_bytes", "parity"} <= set(report)
    quality = {row["adapter"]: row for row in report["quality"]}
    assert set(quality) == {"pydocs-code", "pydocs-readme", "pydocs-package", "pydocs-argument"}
    assert all({"adapter", "task", "metric", "base", "bm25", "score", "gain_ci95"} <= set(row) for row in quality.values())
    assert all(quality[name]["gain_ci95"][0] > 0 for name in ("pydocs-package", "pydocs-argument"))
    assert len(set(report["answers"]["answers"].values())) > 1
    assert all(row["error"] <= row["tolerance"] for row in report["parity"])
    for row in report["memory_bytes"]:
        assert row["adapters"] == 2
    assert (tmp_path / "report.md").stat().st_size > 1000
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_the_commands_by_hand_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = commands("By hand")
    server = None
    try:
        for line in lines:
            if line.startswith("embedft serve"):
                server, port = serve(line, tmp_path)
            elif line.startswith("curl"):
                assert server, "the README asks a server that it has not started"
                answer = json.loads(run(line.replace("localhost:8000", f"localhost:{port}").replace("curl -s", "curl -sf"), tmp_path))
                assert answer.get("data") or answer.get("choices")
            else:
                assert main(shlex.split(smaller(line))[1:]) == 0, line
    finally:
        if server:
            server.terminate()
            server.wait(60)
    assert [line.split()[0] for line in lines].count("curl") == 3


def test_the_rag_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tea.md").write_text("# Tea\n\nBlack tea wants boiling water.\n\n# Bread\n\nBread needs flour, salt and time.\n")
    question = {"question": "How hot must the water for black tea be?", "answer": "boiling", "document": "tea.md"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    lines = commands("Questions over your documents")
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert "tea.md" in capsys.readouterr().out
    assert "hit@5" in (tmp_path / "runs" / "rag-eval" / "report.md").read_text()
    assert len(lines) == 3


def test_the_rag_python_is_ten_lines_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.split("\n## Questions over your documents\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    names: dict[str, object] = {}
    exec(code, names)
    assert names["answer"].source_nodes[0].get_content() == "Black tea wants boiling water."  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "tea-index" / "current").is_file()


def smaller(line: str) -> str:
    """The same command on less data."""
    if line.startswith("embedft data pydocs"):
        return f"{line} --limit 100 --packages numpy networkx"
    if line.startswith("embedft train"):
        return f"{line} {FEW_PAIRS if 'embed ' in line else FEW_ROWS}"
    return line


def serve(line: str, folder: Path) -> "tuple[subprocess.Popen[bytes], int]":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", *shlex.split(line.replace("8000", str(port))), "--engine", "peft"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDFT_ADMIN_TOKEN": TOKEN}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:  # one: a client reads all of this machine's certificates
        wait_for(lambda: process.poll() is not None or client.get("/ready").status_code == 200, 120)
    assert process.poll() is None, (folder / "log").read_text()
    return process, port


@pytest.mark.parametrize(
    "heading",
    [
        "By hand",
        "Retrieval, from a bare corpus to a proven adapter",
        "Questions over your documents",
        "Methods",
        "On a GPU: a 7B base in NF4",
    ],
)
def test_every_embedft_command_parses(heading: str) -> None:
    lines = [line for line in commands(heading) if line.startswith("embedft")]
    assert lines
    for line in lines:
        assert parse(shlex.split(line)[1:]).run


def test_the_gpu_page_says_that_it_was_not_run() -> None:
    assert "**Not run here**" in README.split("## On a GPU")[1].split("\n## ")[0]


def test_the_figures_are_those_of_the_results() -> None:
    assert subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], check=False).returncode == 0


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    place = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        place = ROOT / name if not line.startswith(" ") else place
        assert (place if not line.startswith(" ") else place / name).exists(), line
    listed = {path.name for path in (ROOT / "embedft").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert listed <= {entry.rstrip("/") for entry in re.findall(r"^  (\w+/)", tree, re.M)}, (
        "a room of embedft/ that the README does not name"
    )


def test_curl_is_here_for_the_examples() -> None:
    assert shutil.which("curl"), "the README's examples need curl"
