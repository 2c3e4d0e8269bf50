# SPDX-License-Identifier: Apache-2.0
"""The README's Python blocks compile, and what they and its commands name exists. Of the commands, .ci/run runs those
that install, test, make the quickstart and evaluate it on made-up benchmarks."""

import ast
import importlib
import re
import textwrap

import pytest

from tests.tiny import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_import_what_exists(block):
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_files_that_it_names_exist():
    folders = "modeling_honeybee|processing|training|evaluation|hub_upload|serving|tests|benchmarks|docs"
    paths = set(re.findall(rf"`((?:{folders})/[\w/.]+)`", README))
    paths |= set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.py\b", README))
    paths |= set(re.findall(r"\]\((\w[\w/.]*\.\w+)\)", README)) | set(re.findall(r"training/configs/\w+\.yaml", README))
    assert len(paths) > 20
    assert all((REPOSITORY / path).exists() for path in paths), paths
