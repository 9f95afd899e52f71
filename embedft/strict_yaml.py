"""YAML as a person writes it, read without guessing: a key that stands twice is an error, where PyYAML takes the last without a word."""

from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"):
            if (said := (key.tag, key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(said)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What the text says. Raises yaml.YAMLError, for a repeated key too."""
    loader = _Strict(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
