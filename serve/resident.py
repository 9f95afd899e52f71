"""One generation of an adapter over one engine: what a request holds while it is answered."""

from dataclasses import dataclass
from pathlib import Path

from embedft.adapters.passport import Passport
from embedft.adapters.probes import ProbeReport
from serve.engine import Engine
from serve.slots import Seat

MIX = "mix-"  # how the name of every mix begins, and no other
MIXES = "mix-*"


@dataclass(eq=False)
class Resident(Seat):
    """One generation over one engine. `earlier`: not what its name serves, but asked for by its generation.

    `proven` is the state of its files when its probes passed: as long as that is the same, a later load needs no probing.
    """

    name: str
    generation: str
    folder: Path
    passport: Passport
    engine: Engine
    report: ProbeReport | None = None
    retired: bool = False
    earlier: bool = False
    proven: tuple[tuple[str, int, int, int], ...] | None = None

    @property
    def id(self) -> str:
        """What the engine calls it, and what `x-embedft-adapter` says."""
        return f"{self.name}@{self.generation[:12]}"

    @property
    def counted(self) -> str:
        """Under which name metrics count it: all mixes under one, since tenants make new ones without end."""
        return MIXES if self.name.startswith(MIX) else self.name
