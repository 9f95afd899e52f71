"""Fast multi-LoRA for vLLM on a CPU. Knows only vLLM, which it imports only when called, and embedft.native, which compiles.

vLLM finds `register` by the entry point `cpu_lora` of the group `vllm.general_plugins`, and calls it in each of its processes.
"""

import logging
import os

TESTED = frozenset({"0.32.0"})
_WRAPPER = "serve.vllm_cpu_lora.wrapper.SegmentedPunicaWrapper"
_WARNED = "VLLM_CPU_LORA_WARNED"  # in the environment, so that the processes vLLM starts do not warn again


def register() -> None:
    """Have vLLM's CPU platform use our LoRA operations. Does nothing on a GPU, nor with a vLLM that it was not tested with."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    version = str(vllm.__version__).partition("+")[0]
    if version not in TESTED:
        if not os.environ.get(_WARNED):
            os.environ[_WARNED] = "1"
            logging.getLogger("vllm.cpu_lora").warning(
                "vllm_cpu_lora leaves vLLM %s alone: it was tested with %s only. LoRA works, at vLLM's own speed.",
                version,
                ", ".join(sorted(TESTED)),
            )
        return
    type(current_platform).get_punica_wrapper = classmethod(_punica_wrapper)  # type: ignore[method-assign]


def _punica_wrapper(platform: type) -> str:
    del platform
    return _WRAPPER
