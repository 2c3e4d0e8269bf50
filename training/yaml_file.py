# SPDX-License-Identifier: Apache-2.0
"""Reads a YAML file of settings."""

from typing import Any

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
