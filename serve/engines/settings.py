"""What one engine process is given, as the gateway and the engines both read it."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from embedft.sentence_folder import Pooling

EngineKind = Literal["vllm", "peft", "fake", "cross"]
Work = Literal["embedding", "causal_lm", "cross_encoder"]
# Threads that wait for work give up their core to other engines, but not before the next product would usually begin. A step of 32
# sequences over 8 adapters, in milliseconds, alone and with another engine at work: 28 and 37 with no turn of waiting, 23 and 41
# with 300, 21 and 45 with 600, 20 and 80 with 3,000.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300"}
KEY = "EMBEDFT_ENGINE_KEY"  # the bearer key, in the engine's environment only: never in its arguments


@dataclass(frozen=True)
class EngineSettings:
    """What one engine is given. `cores` as in '0-1,4'; `max_length` in tokens; `kv_gib` is the KV cache, vLLM only.

    `max_cpu_loras`, `tool_parser`: vLLM only. `max_tokens`: of one answer, whatever is asked for or left open. None means: all cores,
    the base's own length and pooling, vLLM's own choice of cache (1 GiB on a CPU).
    """

    max_loras: int = 4
    max_lora_rank: int = 16
    cores: str | None = None
    max_length: int | None = None
    kv_gib: float | None = None
    pooling: "Pooling | None" = None
    max_cpu_loras: int | None = None
    tool_parser: str | None = None
    max_tokens: int | None = None


def parse_cores(text: str) -> set[int]:
    """'0-2,5' → {0, 1, 2, 5}. ValueError for what names none."""
    cores: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        named = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not named:
            raise ValueError(f"{text!r} names no cores: write them as 0-3 or 0,2,5")
        cores.update(named)
    return cores
