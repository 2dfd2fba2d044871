"""YAML whose numbers and dates mean what YAML 1.2 and JSON say.

    text          YAML 1.1           here
    1e-6          the text "1e-6"    0.000001
    010           8                  an error
    1:30          90                 an error
    2024-07-26    a date             the text "2024-07-26"

PyYAML implements YAML 1.1.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
_OLD = re.compile(r"[-+]?(0[0-7_]*[1-9][0-7_]*|.*:.*)")
"""Octal and sexagesimal numbers."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key.value, str)]:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{key.value!r} is set twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> Any:
        number = (self.construct_yaml_float if node.tag == _FLOAT else self.construct_yaml_int)(node)
        if _OLD.fullmatch(node.value):
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} is the number {number} in YAML 1.1. Write "
                f"{number}, or put the text in quotes"
            )
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _tag in ("tag:yaml.org,2002:int", _FLOAT):
    _Loader.add_constructor(_tag, _Loader.construct_number)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: The text is not valid, sets a key twice, or has a number of YAML 1.1.
        ValueError: It has a number with more digits than Python reads.
        RecursionError: It is nested too deep.
    """
    return yaml.load(text, _Loader)


def as_yaml(value: Any) -> str:
    """The inverse of `parse_yaml`. Keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
