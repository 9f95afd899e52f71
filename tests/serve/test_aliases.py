"""Aliases without a server: their shares, and two servers that keep theirs in one store."""

from collections import Counter
from pathlib import Path

import pytest

from embedft.errors import InputInvalid
from serve.aliases import FILE, Aliases, pick
from tests.serve.world import World


def test_a_variant_gets_its_share_and_one_without_a_share_is_never_drawn() -> None:
    variants = {"never": 0, "one": 1, "three": 3}
    drawn = Counter(pick("x", variants, f"key {number}") for number in range(2000))
    assert drawn.keys() == {"one", "three"}
    assert 430 < drawn["one"] < 570
    assert {pick("x", variants, None) for _ in range(100)} == {"one", "three"}


def test_an_aliass_shares_must_add_up_to_something(world: World) -> None:
    with pytest.raises(InputInvalid):
        Aliases(world.folder).put("x", {"a": 0})


def test_two_servers_of_one_store_keep_each_others_aliases(tmp_path: Path) -> None:
    one, other = Aliases(tmp_path), Aliases(tmp_path)
    one.put("x", {"a": 1})
    other.put("y", {"b": 1})
    assert one.all == other.all == Aliases(tmp_path).all == {"x": {"a": 1}, "y": {"b": 1}}
    one.delete("x")
    assert one.all == other.all == Aliases(tmp_path).all == {"y": {"b": 1}}
    (tmp_path / FILE).write_text("[1]")
    one.put("z", {"c": 1})
    assert Aliases(tmp_path).all == {"y": {"b": 1}, "z": {"c": 1}}


def test_aliases_outlive_their_file_and_a_file_that_is_damaged_under_a_server(tmp_path: Path) -> None:
    aliases = Aliases(tmp_path)
    aliases.put("x", {"a": 1})
    (tmp_path / FILE).write_text("{")
    assert aliases.all == {"x": {"a": 1}}
    assert "is damaged" in (aliases.damaged or "")
    (tmp_path / FILE).write_text('{"y": {"b": 1}}')
    assert (aliases.all, aliases.damaged) == ({"y": {"b": 1}}, None)
    (tmp_path / FILE).unlink()
    assert aliases.all == {"y": {"b": 1}}
