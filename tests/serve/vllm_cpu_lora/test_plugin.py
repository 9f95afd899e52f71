"""How vLLM finds the plugin, and when the plugin leaves vLLM alone. No model is loaded."""

import ast
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


def test_vllm_finds_the_plugin_by_its_entry_point_and_uses_its_operations(installed: Path) -> None:
    assert (installed / "serve" / "vllm_cpu_lora" / "kernel.c").is_file()
    code = (
        "import os, vllm.plugins as plugins; from vllm.platforms import current_platform as p\n"
        "from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper\n"
        "wrapper = lambda: type(get_punica_wrapper(64, max_batches=4, device='cpu', lora_config=None))\n"
        "plugins.load_general_plugins(); before = wrapper().__name__\n"
        "del os.environ['VLLM_PLUGINS']; plugins.plugins_loaded = False\n"
        "plugins.load_general_plugins(); plugins.load_general_plugins(); w = wrapper()\n"
        "import serve; print(before, w.__module__, w.__name__, serve.__file__, p.is_cpu())"
    )
    before, module, name, file, on_cpu = vllm_python(code, installed, VLLM_PLUGINS="bitsandbytes").stdout.split()[-5:]
    if on_cpu == "True":
        assert before == "PunicaWrapperCPU"  # a list of plugins that does not name it
        assert (module, name) == ("serve.vllm_cpu_lora.wrapper", "SegmentedPunicaWrapper")
        assert Path(file).is_relative_to(installed)


def test_a_gpu_and_an_untested_vllm_are_left_alone_the_second_with_one_warning(installed: Path) -> None:
    code = (
        "from vllm.platforms import current_platform as p; before, kind = p.get_punica_wrapper(), type(p)\n"
        "from serve.vllm_cpu_lora import register; on_cpu = kind.is_cpu; kind.is_cpu = lambda self: False; register()\n"
        "assert p.get_punica_wrapper() == before, p.get_punica_wrapper()\n"
        "kind.is_cpu = on_cpu; import vllm; vllm.__version__ = '0.99.1'; register(); register()\n"
        "assert p.get_punica_wrapper() == before, p.get_punica_wrapper()\n"
        "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import vllm; vllm.__version__ = '0.99.1'; "
        'from serve.vllm_cpu_lora import register; register()"], check=True)'
    )
    done = vllm_python(code, installed)
    assert (done.stdout + done.stderr).count("leaves vLLM 0.99.1 alone") == 1


def test_the_plugin_imports_nothing_else_of_ours() -> None:
    for file in (ROOT / "serve" / "vllm_cpu_lora").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("embedft"), file
                assert not name.startswith("serve") or name.startswith("serve.vllm_cpu_lora"), file
