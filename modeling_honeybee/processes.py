# SPDX-License-Identifier: Apache-2.0
"""How a script ends where it is one of several processes."""

import atexit
import os
import sys


def leave_processes(count: int) -> None:
    """Ends this process with code 0 where it is one of several. What `atexit` knows runs, as always.

    In the interpreter's own ending a thread of the process group may still free what belongs to Python, which aborts the
    process, and torch and DeepSpeed hold the group so that destroying it does not end its threads.

    Args:
        count: processes of the run; with 1 nothing happens.
    """
    if count > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
