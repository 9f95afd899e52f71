"""Processes of our own start sooner and hold less: what nothing in them uses is not imported. Never called by `import embedft`."""

import sys

EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # nothing here is compiled; bitsandbytes' and vLLM's wish to takes two seconds, and a compiler
COMPILED = {"TORCHDYNAMO_DISABLE": "0"}  # for vLLM on a GPU, whatever its parents have
UNUSED = ("sklearn", "scipy", "pandas", "pyarrow", "cv2")


def without_unused() -> None:
    """Before transformers or vLLM is imported: they ask for these where they are there (assisted decoding, object detection, video).

    Two seconds and 150 MB a process. Not where sentence-transformers or datasets are used: those need them.
    """
    for name in UNUSED:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
