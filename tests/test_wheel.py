"""The wheel as a user gets it: installed into an environment of its own, it runs a shipped recipe by name."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.fixtures_embedding import write_beir

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([_uv(), "build", "--quiet", "--offline", "--wheel", "--no-build-isolation", "--out-dir", str(out)], cwd=ROOT, check=True)
    (made,) = out.glob("*.whl")
    return made


def _uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "uv is not installed: make install"
    return found


def test_the_wheel_holds_recipes_and_weights_and_nothing_over_16_mb(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert {f"embedft/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")} <= set(names)
    assert "embedft/seed/model/model.safetensors" in names
    assert max(names.values()) <= 16 << 20
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_in_an_empty_environment_runs_a_recipe_by_name(wheel: Path, tmp_path: Path) -> None:
    """The environment is empty but for the wheel; its requirements are lent to it from this one, so that no network is needed."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([_uv(), "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), str(wheel)], check=True)
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    data = write_beir(tmp_path / "data")
    small = [f"data.train={data}", f"data.eval={data}", "train.max_steps=2", "train.batch=8", "base.quantization=none", "eval.guard=null"]
    command = [str(tmp_path / "env" / "bin" / "embedft"), "train-embed", "pydocs-code", *small, "--json"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["adapter"] == "pydocs-code"
    assert Path(result["path"]).is_relative_to(tmp_path / "adapters")
    where = subprocess.run(
        [str(python), "-c", "import embedft, serve; print(embedft.__file__, serve.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(found).is_relative_to(packages) for found in where.stdout.split())
