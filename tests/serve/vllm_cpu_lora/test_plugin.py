"""How vLLM finds the plugin, and when the plugin leaves vLLM alone. No model is loaded."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def vllm_python(code: str, path: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter that has the distribution in `path` installed."""
    added = {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **env}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **added}, cwd=path, capture_output=True, text=True, check=True, timeout=200
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, installed as a user installs it but into a folder of its own."""
    pytest.importorskip("vllm")
    uv, site = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"), tmp_path_factory.mktemp("site")
    if uv is None:
        pytest.skip("needs uv to build the wheel")
    command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps", "--target", str(site), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("the build backend is neither cached nor to be had")
    assert done.returncode == 0, done.stderr
    return site


CODE = """
import importlib, json, os, sys
import vllm, vllm.plugins as plugins
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
from vllm.platforms import current_platform as platform
import serve
from serve.vllm_cpu_lora import register

def wrapper():
    made = type(get_punica_wrapper(64, max_batches=4, device="cpu", lora_config=None))
    return f"{made.__module__}.{made.__name__}"

found = {"on_cpu": platform.is_cpu(), "file": serve.__file__, "stock": platform.get_punica_wrapper()}
kind, tested = type(platform), vllm.__version__
on_cpu, kind.is_cpu = kind.is_cpu, lambda self: False
register()
found["on a GPU"] = platform.get_punica_wrapper()
kind.is_cpu, vllm.__version__ = on_cpu, "0.99.1"
register(), register()
found["untested"] = platform.get_punica_wrapper()
if os.fork() == 0:  # as vLLM's processes are made; the module as a new process would have it
    importlib.reload(sys.modules["serve.vllm_cpu_lora"]).register()
    os._exit(0)
assert os.wait()[1] == 0
vllm.__version__ = tested
plugins.load_general_plugins()
found["not listed"] = wrapper()
del os.environ["VLLM_PLUGINS"]
plugins.plugins_loaded = False
plugins.load_general_plugins(), plugins.load_general_plugins()
found["listed"] = wrapper()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(installed: Path) -> "subprocess.CompletedProcess[str]":
    """What one interpreter prints that goes through a GPU's case, an untested vLLM's and the entry point's."""
    return vllm_python(CODE, installed, VLLM_PLUGINS="bitsandbytes")


def test_vllm_finds_the_plugin_by_its_entry_point_and_uses_its_operations(
    installed: Path, said: "subprocess.CompletedProcess[str]"
) -> None:
    found = json.loads(said.stdout.splitlines()[-1])
    assert (installed / "serve" / "vllm_cpu_lora" / "kernel.c").is_file()
    assert Path(found["file"]).is_relative_to(installed)
    if found["on_cpu"]:
        assert found["not listed"].endswith(".PunicaWrapperCPU")  # a list of plugins that does not name it
        assert found["listed"] == "serve.vllm_cpu_lora.wrapper.SegmentedPunicaWrapper"


def test_a_gpu_and_an_untested_vllm_are_left_alone_the_second_with_one_warning(said: "subprocess.CompletedProcess[str]") -> None:
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["on a GPU"] == found["untested"] == found["stock"]
    assert (said.stdout + said.stderr).count("leaves vLLM 0.99.1 alone") == 1


def test_the_plugin_imports_nothing_else_of_ours() -> None:
    for file in (ROOT / "serve" / "vllm_cpu_lora").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("embedft"), file
                assert not name.startswith("serve") or name.startswith("serve.vllm_cpu_lora"), file
