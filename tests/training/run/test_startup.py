# SPDX-License-Identifier: Apache-2.0
"""What a command loads before it answers: `--help` and a wrong argument wait for no library that they do not need."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from trl import ModelConfig, SFTConfig

from tests.tiny import REPOSITORY
from training.run.arguments import HoneybeeArguments, Parser

LIBRARIES = [
    "accelerate",
    "datasets",
    "matplotlib",
    "modeling_honeybee",
    "pandas",
    "peft",
    "processing",
    "pyarrow",
    "scipy",
    "sklearn",
    "torch",
]
# Runs a script as `python SCRIPT ARGUMENTS...` does, and says last which of `LIBRARIES` it loaded.
SCRIPT = f"""
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("\\nloaded:", *(name for name in {LIBRARIES} if sys.modules.get(name)), file=sys.stderr)
"""
# The same with Ctrl-C while a library is imported.
INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "datasets":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
sys.meta_path.insert(0, Interrupt())
""" + SCRIPT  # fmt: skip


def answer(script: str, *arguments: str, wrapper: str = SCRIPT, cwd=None) -> tuple[int, str, set[str]]:
    """Exit code and output of a script, and those of `LIBRARIES` that it loaded."""
    result = subprocess.run(
        [sys.executable, "-c", wrapper, str(REPOSITORY / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
    )
    loaded = re.search(r"\nloaded:(.*)\n", result.stderr)
    return result.returncode, result.stdout + result.stderr.replace(loaded[0], "\n"), set(loaded[1].split())


def test_help_of_training_lists_every_setting_and_loads_the_settings_alone():
    code, text, libraries = answer("training/sft.py", "--help")
    assert code == 0
    # TRL's settings are a class of transformers', which loads these two.
    assert libraries <= {"torch", "accelerate"}
    whole = Parser((HoneybeeArguments, SFTConfig, ModelConfig), prog="sft.py").format_help()
    assert "--use_peft" in whole and text.split() == whole.split()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--stage", "both"], "invalid choice: 'both'"),
        (["--projector", "{depth: 2"], "is not JSON"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--dataset", "x", "--config"], "--config needs the path"),
    ],
)
def test_a_wrong_setting_of_ours_loads_nothing(arguments, said):
    code, text, libraries = answer("training/sft.py", *arguments)
    assert code and said in text and not libraries


@pytest.mark.parametrize("setting", ["--learnig_rate", "--lr_scheduler_type"])
def test_a_wrong_setting_of_trl_loads_the_settings_alone(setting):
    code, text, libraries = answer("training/sft.py", setting, "often", "--use_cpu")
    assert code and setting in text and "often" in text
    assert not libraries & {"datasets", "matplotlib", "modeling_honeybee", "processing"}


@pytest.mark.parametrize("arguments", [["--dataset", "nowhere", "--use_cpu"], []], ids=["run", "quickstart"])
def test_ctrl_c_while_libraries_are_loaded_is_a_sentence(arguments, tmp_path):
    code, text, _ = answer("training/sft.py", *arguments, wrapper=INTERRUPTED, cwd=tmp_path)
    assert code and "Interrupted" in text and "Traceback" not in text


@pytest.mark.parametrize("script", ["evaluation/run.py", "serving/serve.py", "serving/chat_demo.py"])
def test_help_of_what_answers_loads_no_model_code(script):
    code, text, libraries = answer(script, "--help")
    assert code == 0 and "--model" in text
    assert not libraries & {"datasets", "matplotlib", "modeling_honeybee", "peft", "processing", "torch"}


def test_training_has_no_import_circle():
    """Imports inside functions count: they hide a circle, and do not break it."""
    files = {
        ".".join(p.relative_to(REPOSITORY).with_suffix("").parts): p for p in (REPOSITORY / "training").rglob("*.py")
    }
    imports = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                imports[name] |= found & files.keys()
    assert all("training.run.launch" in imports[name] for name in ("training.sft", "training.quickstart.run"))
    TopologicalSorter(imports).prepare()  # raises a CycleError that lists the circle


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(
    "command, chosen",
    [
        ("training/sft.py --model_name_or_path nowhere --use_cpu", None),
        ("training/sft.py --model_name_or_path nowhere --use_cpu", "active"),
        ("evaluation/run.py --model nowhere --tasks pope --data_root . --output out", None),
        ("serving/serve.py --model nowhere", None),
    ],
)
def test_threads_that_wait_leave_the_core_to_others(command, chosen, tmp_path, monkeypatch):
    """Where other work runs, threads that spin while they wait make a step many times slower."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    code, text, libraries = answer(*command.split(), cwd=tmp_path)
    assert code and "torch" in libraries
    assert set(re.findall(r"OMP_WAIT_POLICY = '(\w+)'", text)) == {(chosen or "passive").upper()}
