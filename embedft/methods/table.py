"""METHODS: one row per PEFT method, with what it can do. Knows no model; imports nothing heavy."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from types import MappingProxyType
from typing import Any, Literal

from embedft.errors import MethodUnsupported
from embedft.model_folder import BaseInfo, Task
from embedft.packed import READ
from embedft.recipe import AdapterSection

Form = Literal["lora", "vera", "adalora", "ia3", "loha", "lokr", "prompt", "attention", "weights"]
NONE, NF4, INT8 = "none", "nf4", "int8"
DECOMPRESSED = ("w4a16", "w8a8", *READ)  # packed in their files, plain floating-point layers once loaded


@dataclass(frozen=True)
class Method:
    """One PEFT method. Trainers, converters and engines ask for a capability and never for a name.

    form: how its config is built;  fixed: config fields that make it this method;  options: what `adapter.options` may set;  ranges: the
    least and the most of an option, outside of which it would not be this method;
    quantizations, tasks, kinds: the bases it trains on, `why` says why no others;  mixed_batch: several of its adapters in one forward
    pass;  vllm: vLLM's LoRA kernels serve what is published;  to_lora: how that becomes plain LoRA;  merges: into the base's
    weights;  neutral_start: attaching changes no output;  rank, dropout, targets, alpha: it heeds that setting;  checkpointing, packing:
    goes with either;  start, update, optimizer: what it does differently in training.
    """

    name: str
    config: str
    paper: str
    form: Form = "lora"
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    quantizations: tuple[str, ...] = (NONE, NF4, INT8, *DECOMPRESSED)
    tasks: tuple[Task, ...] = ("embedding", "causal_lm")
    kinds: tuple[str, ...] = ("encoder", "decoder")
    why: str = ""
    mixed_batch: bool = False
    vllm: bool = False
    to_lora: Literal["is", "exact", "approximate", "no"] = "no"
    merges: bool = True
    neutral_start: bool = True
    rank: bool = True
    dropout: bool = True
    targets: bool = True
    alpha: bool = True
    checkpointing: bool = True
    packing: bool = True
    start: Literal["pissa", "olora", "loftq", "eva", "words"] | None = None
    update: Literal["adalora", "relora", "delta_lora"] | None = None
    optimizer: Literal["lora_plus", "lora_fa", "paged"] | None = None


def _with(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


def _lora(name: str, paper: str, **values: Any) -> Method:
    """What is published is plain LoRA: mixed in one batch, served by vLLM as it is."""
    return replace(Method(name, "LoraConfig", paper, mixed_batch=True, vllm=True, to_lora="is"), **values)


def _prompt(name: str, config: str, paper: str, **values: Any) -> Method:
    """Virtual tokens in front. In a language model they are a key/value prefix, so rows with and without one share a pass."""
    row = Method(name, config, paper, "prompt", mixed_batch=True, merges=False, neutral_start=False, dropout=False, targets=False)
    return replace(row, alpha=False, packing=False, start="words", **values)


_EDITS = "its start is computed from full-precision weights: set base.quantization=none"
_SHAPE = "PEFT forms its update in the shape of the stored weight, which NF4 packs away: set base.quantization=int8 or none"
_ROWS = (
    _lora("lora", "arXiv 2106.09685"),
    _lora("qlora", "arXiv 2305.14314", quantizations=(NF4,), optimizer="paged", why="QLoRA is LoRA over NF4: set base.quantization=nf4"),
    _lora("llm_int8", "arXiv 2208.07339", quantizations=(INT8,), why="LLM.int8() is an int8 base: set base.quantization=int8"),
    _lora("rslora", "arXiv 2312.03732", fixed=_with(use_rslora=True)),
    Method("dora", "LoraConfig", "arXiv 2402.09353", fixed=_with(use_dora=True), to_lora="approximate"),
    _lora(
        "pissa",
        "arXiv 2404.02948",
        start="pissa",
        quantizations=(NONE,),
        why=_EDITS,
        options=_with(iterations=0),
        ranges=_with(iterations=(0, inf)),
    ),
    _lora("olora", "arXiv 2406.01775", start="olora", quantizations=(NONE,), why=_EDITS),
    _lora(
        "loftq",
        "arXiv 2310.08659",
        start="loftq",
        quantizations=(NF4, INT8, *DECOMPRESSED),
        why="it makes good what quantization lost: set base.quantization=nf4 or int8",
        neutral_start=False,
    ),
    _lora("eva", "arXiv 2410.07170", start="eva", options=_with(rho=1.0), ranges=_with(rho=(1, inf))),
    _lora("lora_plus", "arXiv 2402.12354", optimizer="lora_plus", options=_with(ratio=16.0), ranges=_with(ratio=(1, inf))),
    _lora("lora_fa", "arXiv 2308.03303", optimizer="lora_fa"),
    Method("vera", "VeraConfig", "arXiv 2310.11454", "vera", options=_with(d_initial=0.1, seed=0), to_lora="exact", alpha=False),
    Method(
        "adalora",
        "AdaLoraConfig",
        "arXiv 2303.10512",
        "adalora",
        options=_with(init_r=0, warm=0.15, settle=0.3, every=1, orthogonal=0.5),
        ranges=_with(init_r=(0, inf), warm=(0, 0.9), settle=(0, 0.9), every=(1, inf), orthogonal=(0, inf)),
        to_lora="exact",
        update="adalora",
    ),
    Method("ia3", "IA3Config", "arXiv 2205.05638", "ia3", rank=False, dropout=False, alpha=False),
    Method(
        "loha",
        "LoHaConfig",
        "arXiv 2108.06098",
        "loha",
        quantizations=(NONE, INT8, *DECOMPRESSED),
        why=_SHAPE,
        to_lora="exact",
    ),
    Method(
        "lokr",
        "LoKrConfig",
        "arXiv 2309.14859",
        "lokr",
        quantizations=(NONE, INT8, *DECOMPRESSED),
        why=_SHAPE,
        options=_with(decompose_both=False),
        to_lora="approximate",
    ),
    _prompt(
        "prefix_tuning",
        "PrefixTuningConfig",
        "arXiv 2101.00190",
        kinds=("decoder",),
        why="encoders take no key/value prefix (transformers drops it without a word): use prompt_tuning",
        options=_with(projection=False, hidden_size=0),
        ranges=_with(hidden_size=(0, inf)),
        checkpointing=False,
    ),
    _prompt("p_tuning", "PromptEncoderConfig", "arXiv 2103.10385", options=_with(hidden_size=0), ranges=_with(hidden_size=(0, inf))),
    _prompt("prompt_tuning", "PromptTuningConfig", "arXiv 2104.08691", options=_with(text="")),
    _prompt(
        "multitask_prompt_tuning", "MultitaskPromptTuningConfig", "arXiv 2303.02861", options=_with(ranks=1), ranges=_with(ranks=(1, inf))
    ),
    Method(
        "llama_adapter",
        "AdaptionPromptConfig",
        "arXiv 2303.16199",
        "attention",
        options=_with(layers=0),
        ranges=_with(layers=(0, inf)),
        tasks=("causal_lm",),
        kinds=("decoder",),
        why="its gated attention is made for Llama-like language models: use prefix_tuning or lora",
        merges=False,
        dropout=False,
        targets=False,
        alpha=False,
    ),
    _lora(
        "delta_lora",
        "arXiv 2309.02411",
        update="delta_lora",
        dropout=False,
        options=_with(ratio=2.0, begin=0.25),
        ranges=_with(ratio=(0, inf), begin=(0, 1)),
    ),
    _lora(
        "relora",
        "arXiv 2307.05695",
        update="relora",
        options=_with(restarts=2, prune=0.99, warm=4),
        ranges=_with(restarts=(0, inf), prune=(0, 1), warm=(0, inf)),
    ),
    Method(
        "full",
        "LNTuningConfig",
        "full fine-tuning",
        "weights",
        quantizations=(NONE,),
        why="quantized weights take no gradient: set base.quantization=none",
        rank=False,
        dropout=False,
        targets=False,
        alpha=False,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_named(name: str) -> Method:
    """The row called `name`; MethodUnsupported names the nearest, or lists what there is."""
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), METHODS, n=1)
        raise MethodUnsupported(name, where="here", why=f"did you mean {near[0]!r}?" if near else f"the methods are {', '.join(METHODS)}")
    return METHODS[name]


def supported(adapter: AdapterSection, *, task: Task, info: BaseInfo) -> Method:
    """The adapter's row, if it can be trained so on that base; else MethodUnsupported says why and what to do."""
    method = settled(adapter)
    if info.quantization not in method.quantizations:
        why = method.why or f"take its unquantized weights, or those in {', '.join(method.quantizations[1:])}"
        raise MethodUnsupported(method.name, where=f"on a base in {info.quantization}", why=why)
    if task not in method.tasks or info.kind not in method.kinds:
        where = f"on {info.architecture}" if task in method.tasks else "for embeddings"
        raise MethodUnsupported(method.name, where=where, why=method.why)
    return method


def settled(adapter: AdapterSection) -> Method:
    """The adapter's row, if it heeds all that is set, whatever the base; else MethodUnsupported."""
    method = method_named(adapter.method)
    unknown = sorted(set(adapter.options) - set(method.options))
    if unknown:
        known = ", ".join(method.options) or "none"
        raise MethodUnsupported(method.name, where=f"with the option {unknown[0]!r}", why=f"its options are: {known}")
    for name, value in adapter.options.items():
        kind = type(method.options[name])
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise MethodUnsupported(method.name, where=f"with {name}={value!r}", why=f"expected {_KINDS[kind]}")
        least, most = method.ranges.get(name, (-inf, inf))
        if kind in (int, float) and not least <= float(value) <= most:
            span = f"from {least:g} to {most:g}" if most < inf else f"of at least {least:g}"
            raise MethodUnsupported(method.name, where=f"with {name}={value!r}", why=f"expected {_KINDS[kind]} {span}")
    if adapter.dropout and not method.dropout:
        raise MethodUnsupported(method.name, where="with dropout", why="it has nothing to drop: set adapter.dropout=0")
    if adapter.targets != "all-linear" and not method.targets:
        raise MethodUnsupported(method.name, where="with targets", why="it does not choose linear layers: leave adapter.targets out")
    if getattr(adapter, "layers", None) and not method.targets:
        raise MethodUnsupported(method.name, where="with layers", why="it does not choose layers: leave adapter.layers out")
    if adapter.alpha is not None and not method.alpha:
        raise MethodUnsupported(method.name, where="with alpha", why="its update has no such scale: leave adapter.alpha out")
    if adapter.r != AdapterSection().r and not method.rank:
        raise MethodUnsupported(method.name, where=f"with r={adapter.r}", why="it has no rank: leave adapter.r out")
    return method


_KINDS: Mapping[type, str] = MappingProxyType({int: "a whole number", float: "a number", bool: "true or false", str: "a text"})


def text_positions(adapter: AdapterSection, positions: int) -> int:
    """How many of a base's positions are left for a text: virtual tokens stand before it. MethodUnsupported where they leave none."""
    left = positions - (adapter.r if method_named(adapter.method).form == "prompt" else 0)
    if left < 2:  # a language model's text is a token and what comes after it
        why = f"the base has {positions} positions, for these and the text: lower adapter.r"
        raise MethodUnsupported(adapter.method, where=f"with {adapter.r} virtual tokens", why=why)
    return left


def option(adapter: AdapterSection, name: str) -> Any:
    """What the recipe sets, or the row's default."""
    return adapter.options.get(name, METHODS[adapter.method].options[name])
