"""What all tests share: no network, a cache of their own, and skips that say why."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedft.lean import EAGER

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ |= EAGER  # as the command line has it
os.environ.setdefault(
    "EMBEDFT_DTYPE", "float32"
)  # sums that are compared are exact to its rounding on every machine; `bf16` tests set their own
if "EMBEDFT_CACHE" not in os.environ:  # one for all workers: they inherit it
    os.environ["EMBEDFT_CACHE"] = tempfile.mkdtemp(prefix="embedft-test-cache-")
    atexit.register(shutil.rmtree, os.environ["EMBEDFT_CACHE"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["EMBEDFT_CACHE"] + "/hf"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # each worker, with all that it starts, keeps to its cores: threads that wait for others on a core that is taken take many times as long
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    own = cores[number::workers] or [cores[number % len(cores)]]
    os.sched_setaffinity(0, own)
    os.environ["OMP_NUM_THREADS"] = str(len(own))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

LONGEST = (
    *("test_readme.py", "test_line.py", "test_soak.py", "test_kinds_of_base.py", "test_engine_vllm.py", "test_clients.py", "test_vllm.py"),
    *("test_resume.py", "test_engine_peft_methods.py", "test_plan.py", "test_convert.py", "test_engine_peft.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    # the longest files first: at the end of a run no worker is left alone with one
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    has_vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("vllm") and not has_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="../shared/data is not here"))
        if item.get_closest_marker("bf16"):
            from embedft.base import native_bf16

            if not native_bf16():
                item.add_marker(pytest.mark.skip(reason="this processor has no bf16 instructions"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """Trainers and measurements of memory collect garbage, which takes longer than a step where all of torch is looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Exact resume is exact on one thread count, and two threads on small models mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
