# SPDX-License-Identifier: Apache-2.0
"""One of several processes ends with what `atexit` knows, and without the interpreter's own ending."""

import subprocess
import sys

import pytest

from tests.tiny import REPOSITORY

SCRIPT = """
import atexit, os, runpy

class Ending:
    def __del__(self, write=os.write):
        write(1, b" ending")

held = Ending()
leave_processes = runpy.run_path({path!r})["leave_processes"]
atexit.register(print, " atexit", end="")
print("printed", end="")
leave_processes({count})
print(" goes on", end="")
"""


@pytest.mark.parametrize("count, said", [(1, "printed goes on atexit ending"), (2, "printed atexit")])
def test_leaving(count, said):
    script = SCRIPT.format(path=str(REPOSITORY / "modeling_honeybee" / "processes.py"), count=count)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.split()) == sorted(said.split())
