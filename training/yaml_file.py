# SPDX-License-Identifier: Apache-2.0
"""Reads a YAML file of settings, and tells whether a value is of the type of its setting."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml


class _Loader(yaml.SafeLoader):
    def __init__(self, stream):
        super().__init__(stream)
        self.twice: list[str] = []

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                self.twice.append(f"{name!r} is there twice (line {key.start_mark.line + 1}); keep one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> tuple[Any, list[str]]:
    """What a YAML file holds, and a sentence for each setting that is there twice: YAML itself silently takes the last.

    Raises:
        OSError, yaml.YAMLError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        loader = _Loader(file)
        return loader.get_single_data(), loader.twice


def parts_of(hint) -> tuple:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_of_type(value, hint) -> bool:
    """Whether a value is of this type; a whole number is a float, too."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(is_of_type(value, part) for part in inner)
    if kind is Any:
        return True
    if value is None:
        return kind is type(None)
    if kind is Literal:
        return value in inner
    if isinstance(value, bool):
        return kind is bool
    if kind is list:
        return isinstance(value, list) and all(is_of_type(item, part) for part in inner for item in value)
    return isinstance(value, (int, float) if kind is float else kind)
