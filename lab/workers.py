# SPDX-License-Identifier: Apache-2.0
"""Processes of one thread each, which share out what the lab has to do."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm.auto import tqdm


def _set_up() -> None:
    """Of a process: one thread, and an end when the first process ends, however that happens."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Workers:
    """
    Args:
        number: of processes.
    """

    def __init__(self, number: int):
        # Not forked: torch may have threads by now.
        self.pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_set_up)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, error, *_) -> None:
        if error is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)

    def do(self, calls: list[tuple[Callable, tuple]], title: str) -> None:
        """Calls every function with its arguments, in this order as processes become free. An error ends the rest."""
        futures = [self.pool.submit(function, *arguments) for function, arguments in calls]
        for future in tqdm(as_completed(futures), total=len(futures), desc=title):
            future.result()
