# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT (Ctrl-C) end a run with a checkpoint, and not in the middle of a step. For that the data loader's
workers have to outlive the signal."""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 10  # seconds in which a signal is the first one's echo: a launcher passes on what the terminal sent already


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which any process was told to. A second signal, `PATIENCE` later, ends the
    process at once. This holds until `restore`, so that what is written after training is safe, too.

    `stopped_at` is the step of that checkpoint, None for a run that came to its end.
    """

    def __init__(self):
        self.signal: int | None = None
        self.stopped_at: int | None = None
        self._before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        process, first = os.getpid(), None

        def note(number, frame):
            nonlocal first
            if os.getpid() != process:  # a worker of the data loader, forked just now, before `start_worker`
                return
            if first is None:
                first, self.signal = time.monotonic(), number
                logger.warning("%s: saving, then ending the run", signal.Signals(number).name)
            elif time.monotonic() - first > PATIENCE:
                self.restore()
                os.kill(process, number)

        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, note) for number in SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        told = self.signal is not None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A launcher's signal reaches the processes in different steps; saving takes all of them.
            flag = torch.tensor(int(told), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            told = bool(flag)
        if told and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
        return control

    def ignore(self) -> None:
        """Makes a process that leaves deaf to signals: Python's ending gives them back to the system, which would kill it."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Gives the signals back to those who had them before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def start_worker(init, worker_id: int) -> None:
    """The first thing that a worker runs: deaf to the signals, and then what the loader asked for (`init`)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker_id)


def end_workers() -> None:
    """Kills the workers that the loader has left behind, with the one signal that they cannot ignore."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def protect_workers(loader: DataLoader) -> None:
    """Lets the loader's workers outlive the signals that tell their process to save: what stops a process group stops
    the workers first, and without them the step does not end."""
    loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
    # A failed run may leave workers that were not told to end. Python then sends them SIGTERM and waits for ever.
    atexit.unregister(end_workers)
    atexit.register(end_workers)
