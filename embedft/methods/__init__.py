"""PEFT methods: one table of what each can do; attaching, saving and loading an adapter. Knows no data and no training loop.

table.py      METHODS, one row a method           targets.py    which linear layers
attach.py     a new adapter on a frozen base      starts.py     PiSSA, OLoRA, LoftQ, EVA: where A and B begin
companion.py  a frozen low-rank pair beside       prompts.py    virtual tokens, right in any batch
files.py      saving and loading adapters         precision.py  float32 adapters on a bf16 base
"""

from embedft.methods.attach import attach
from embedft.methods.files import config_of, load_adapter, only_pairs, save_weights
from embedft.methods.table import METHODS, Method, method_named, settled, supported, text_positions
from embedft.methods.targets import linear_modules, targeted_modules, train_adapters_only

__all__ = [
    "METHODS",
    "Method",
    "attach",
    "config_of",
    "linear_modules",
    "load_adapter",
    "method_named",
    "only_pairs",
    "save_weights",
    "settled",
    "supported",
    "targeted_modules",
    "text_positions",
    "train_adapters_only",
]
