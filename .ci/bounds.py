"""What pyproject.toml allows, and what is installed where this runs.

python .ci/bounds.py names      what the project and its tests need, without bounds
python .ci/bounds.py versions   the installed releases of it
python .ci/bounds.py above      those of them that are outside its bounds
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path(__file__).with_name("..").joinpath("pyproject.toml").read_text())["project"]
requirements = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]
if sys.argv[1] == "names":
    print(*(requirement.name for requirement in requirements))
elif sys.argv[1] == "versions":
    print(*(f"{requirement.name} {version(requirement.name)}" for requirement in requirements), sep=", ")
else:
    outside = [r for r in requirements if not r.specifier.contains(version(r.name), prereleases=True)]
    print(*(f"{r.name} {version(r.name)} (bounds {r.specifier})" for r in outside), sep=", ")
