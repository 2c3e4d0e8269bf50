# SPDX-License-Identifier: Apache-2.0
"""The releases that the constraints files name are among those that pyproject.toml allows."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import REPOSITORY


@pytest.mark.parametrize("name", ["transformers-4.57.txt", "transformers-5.txt"])
def test_constraints_are_within_the_bounds(name):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints" / name).read_text().splitlines()
    pins = {}
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version, requirement
        pins[canonicalize_name(requirement.name)] = pin.version
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
