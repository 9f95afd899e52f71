"""What the import contracts name is all that there is: a module that is added later is not outside of them."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_plugin_may_import_no_module_of_the_server_nor_of_embedft() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (alone,) = [each for each in settings["tool"]["importlinter"]["contracts"] if each.get("source_modules") == ["serve.vllm_cpu_lora"]]
    found = {path.parent for path in (ROOT / "serve").glob("*/__init__.py")} | {*(ROOT / "serve").glob("*.py")}
    modules = {f"serve.{path.stem}" for path in found} - {"serve.__init__", "serve.vllm_cpu_lora"}
    assert set(alone["forbidden_modules"]) == {*modules, "embedft"}
