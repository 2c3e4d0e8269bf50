# SPDX-License-Identifier: Apache-2.0
"""README.md, docs/ and the other pages say what is there: their Python blocks import, and their files, links, headings and
flags exist. Of the commands, .ci/run runs those that install, test, make the quickstart and evaluate it on made-up
benchmarks."""

import ast
import functools
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY, run_script

README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
GUIDES = [README, *DOCS, REPOSITORY / "training" / "configs" / "README.md"]
PAGES = [*GUIDES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "tests/data/README.md"))]
FOLDERS = "modeling_honeybee|processing|training|evaluation|hub_upload|serving|lab|tests|benchmarks|docs|constraints"


def each_of(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path, language: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def quoted(page: Path) -> list[str]:
    """What stands between backticks, in one line each."""
    return [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_blocks_import_what_exists(page, block):
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


@each_of(PAGES)
def test_files_that_it_names_exist(page):
    text = page.read_text()
    paths = set(re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)`", text))
    paths |= set(re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w/-]+\.(?:py|yaml|json|txt))\b", text))
    paths |= {name.replace(".", "/") + ".py" for name in re.findall(rf"python -m ((?:{FOLDERS})\.[\w.]+\w)", text)}
    assert len(paths) > 20 or page != README
    missing = sorted(path for path in paths if not (REPOSITORY / path).exists())
    assert not missing


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings get: in lower case, without punctuation, blanks as hyphens."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_of(PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(REPOSITORY.resolve()) and file.exists(), target
        assert not anchor or anchor in headings(file), target


@functools.cache
def flags(script: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", run_script(REPOSITORY / script, "--help").stdout))


COMMANDS = [
    "training/sft.py", "training/preview.py", "evaluation/run.py", "hub_upload/convert_official.py",
    "hub_upload/push.py", "serving/serve.py", "serving/chat_demo.py",
]  # fmt: skip


def commands(page: Path) -> list[list[str]]:
    """The words of each command that runs one of `COMMANDS`, in a block or between backticks, from its script on."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines() + quoted(page)
    words = [shlex.split(line, comments=True) for line in lines if any(script in line for script in COMMANDS)]
    return [line[i:] for line in words for i, word in enumerate(line) if word in COMMANDS]


@each_of(GUIDES)
def test_flags_exist(page):
    for script, *words in commands(page):
        unknown = {word for word in words if word.startswith("--")} - flags(script)
        assert not unknown, script
    for span in quoted(page):
        if span.startswith("--"):
            named = {word for word in span.split() if word.startswith("--")}
            assert any(named <= flags(script) for script in COMMANDS) or named == {"--num_processes"}, (
                span
            )  # accelerate's


def test_every_command_has_a_place_in_the_pages():
    shown = {words[0] for page in (README, *DOCS) for words in commands(page)}
    assert shown == set(COMMANDS)


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert all(f"](docs/{page.name})" in text for page in DOCS)


def test_the_tree_is_the_tree():
    tree = re.search(r"^## Where things are\n.*?```\n(.*?)```", README.read_text(), re.DOTALL | re.MULTILINE).group(1)
    above, missing = [], []
    for line in tree.splitlines():
        depth, names = (len(line) - len(line.lstrip())) // 2, re.split(r"\s{2,}", line.strip())[0].split(", ")
        above = [*above[:depth], names[-1].rstrip("/")]
        for name in names:
            path = REPOSITORY.joinpath(*above[:depth], name)
            if not (path.is_dir() if name.endswith("/") else path.is_file()):
                missing.append(str(path.relative_to(REPOSITORY)))
    assert not missing
    assert set(FOLDERS.split("|")) - {"constraints"} == set(re.findall(r"^(\w+)/", tree, re.MULTILINE))
