# SPDX-License-Identifier: Apache-2.0
"""Runs `training/sft.py` in a process of its own that need not load the libraries first: it is forked from one that has.

Loading takes longer than most trainings of the tests. The process starts as the interpreter does: its own arguments, output and
exit code, no state of the tests. (tests/training/run/test_startup.py starts scripts whole.)
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import contextmanager

LOADED = ["matplotlib.pyplot", "training.run.launch", "training.sft"]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
TIMEOUT = 600  # seconds

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LOADED)


@contextmanager
def environment(settings: dict[str, str]):
    """Changes variables for as long as it is open."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(arguments: list[str], folder: str, variables: dict[str, str], output: str, start_method: str) -> None:
    # Processes that it starts, such as workers, are to start as everywhere, and not as this one did.
    multiprocessing.set_start_method(start_method, force=True)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of `multiprocessing` leaves out


def run_forked(arguments: list[str], cwd=None) -> subprocess.CompletedProcess:
    """The exit code, and output and errors together in `.stdout`.

    Args:
        arguments: path of the script, and what it is given.

    Raises:
        TimeoutError: it runs for longer than `TIMEOUT`.
    """
    with tempfile.NamedTemporaryFile() as output, environment(ENVIRONMENT):
        folder = os.fspath(cwd or os.getcwd())
        given = arguments, folder, dict(os.environ), output.name, multiprocessing.get_start_method()
        process = _context.Process(target=_run, args=given)
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} runs for more than {TIMEOUT} s")
        with open(output.name, encoding="utf-8", errors="replace") as file:
            return subprocess.CompletedProcess(arguments, process.exitcode, file.read())
