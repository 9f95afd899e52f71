"""Patterns of an adapter's config: those that trainers write are taken, those that would be matched for ever are not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.passport import CONFIG
from embedft.adapters.patterns import MAX_BYTES, MAX_WAYS, check_config, ways_of
from embedft.errors import AdapterInvalid

LAYERS = r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PARTS = r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
UNSLOTH = (
    rf"(?:.*?(?:vision|image|visual|patch|language|text).*?{PARTS}.*?{LAYERS}.*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.{PARTS}\.(?:{LAYERS}))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        UNSLOTH,
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*lm_head)(?:.*)$",
        r".*\.layers\.(1?[0-9]|2[0-3])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"(?:ab|cd)*",
        r"(.*)\.\1",
    ],
)
def test_patterns_that_trainers_write_are_taken(pattern: str) -> None:
    assert ways_of(pattern) <= MAX_WAYS


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*.*.*.*.*.*.*)*x",
        r"(a+)+$",
        r"(a|a)*b",
        r"(a|ab)*c",
        ".?" * 40 + "x",
        "(?:aa|aa)" * 40 + "b",
        r"(a?){30}",
        r"(?=(a*)*b)",
        r"(a)?(?(1)(a*)*b|c)",
        ".*" * 9 + "x",
    ],
)
def test_patterns_that_could_be_matched_for_ever_are_refused(tmp_path: Path, pattern: str) -> None:
    assert ways_of(pattern) > MAX_WAYS
    for config in ({"target_modules": pattern}, {"exclude_modules": pattern}, {"layers_pattern": [pattern]}):
        write(tmp_path, json.dumps(config))
        with pytest.raises(AdapterInvalid, match=f"{next(iter(config))}.*may take hours"):
            check_config(tmp_path, "a")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "cannot be read"),
        ("[1]", "is no object"),
        (json.dumps({"target_modules": "("}), "is no regular expression"),
        (json.dumps({"rank_pattern": {"(a+)+b": 8}}), "may take hours"),
        (json.dumps({"alpha_pattern": {f"layer{number}": 1 for number in range(5000)}}), "5000 patterns"),
        (json.dumps({"rank_pattern": {f"{number}.*.*.*b": 8 for number in range(100)}}), "may take hours"),
        (json.dumps({"x": "y" * MAX_BYTES}), "bytes: at most"),
    ],
    ids=["deep", "list", "open", "rank", "many", "many together", "large"],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    write(tmp_path, content)
    with pytest.raises(AdapterInvalid, match=re.escape(said)):
        check_config(tmp_path, "a")


def test_lists_of_layers_are_no_patterns(tmp_path: Path) -> None:
    names: dict[str, Any] = {"target_modules": ["(a+)+$", "q_proj"], "rank_pattern": {}, "layers_pattern": None}
    write(tmp_path, json.dumps(names))
    check_config(tmp_path, "a")


def write(folder: Path, content: str) -> None:
    (folder / CONFIG).write_text(content)
