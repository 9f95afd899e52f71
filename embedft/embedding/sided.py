"""An adapted model as two encoders: the base's, and the adapter's, which knows its side. The one place here that switches it off."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.encode import Encoder, EncodeSettings, InputType


class SidedEncoder(Encoder):
    """Vectors of a PEFT model by `side`: "both"; "query" leaves documents to the base; "none" leaves all to it."""

    def __init__(self, model: Any, folder: Path, settings: EncodeSettings, *, side: str) -> None:
        super().__init__(model, folder, settings)
        self.side = side

    def encode(self, texts: Sequence[str], *, input_type: InputType | None = None, batch_size: int = 64) -> NDArray[np.float32]:
        off = self.side == "none" or (self.side == "query" and input_type == "document")
        with self.model.disable_adapter() if off else nullcontext():
            return super().encode(texts, input_type=input_type, batch_size=batch_size)
