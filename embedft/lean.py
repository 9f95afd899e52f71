"""Processes of our own start sooner and hold less: what nothing in them uses is not imported. Never called by `import embedft`."""

import sys

EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # nothing here is compiled; bitsandbytes' and vLLM's wish to takes two seconds, and a compiler


def without_sklearn() -> None:
    """Call it before transformers is imported, which wants it for assisted decoding alone: a second and a half, 75 MB."""
    sys.modules["sklearn"] = None  # pyright: ignore[reportArgumentType]
