# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py` with its batches recorded, or killed at given steps.

    torchrun --nproc_per_node 2 run_sft.py record FOLDER ARGUMENTS...      # each process writes FOLDER/RANK.json at its end, and marks how it ends
    torchrun --nproc_per_node 2 run_sft.py stop STEP ARGUMENTS...          # the last process gets a SIGTERM
    python run_sft.py trouble KIND ARGUMENTS...                            # something breaks while it trains, see Trouble
    python run_sft.py kill PROCESSES STEP,STEP,... ARGUMENTS...            # dies at each step, resuming in between

The last starts its processes by forking, since loading the libraries takes longer than the training.
"""

import atexit
import json
import os
import signal
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

from transformers import TrainerCallback

import training.run.launch
from training import sft

run = training.run.launch.run


class Last:
    """Makes a file when the interpreter ends."""

    def __init__(self, path: Path):
        self.mark = partial(os.open, str(path), os.O_CREAT | os.O_WRONLY)

    def __del__(self):
        self.mark()


def record(folder: Path):
    def recorded(trainer, checkpoint):
        collate, batches = trainer.data_collator, []

        def recording(samples):
            batches.append([[s["dataset"], s["index"], str(s["messages"])] for s in samples])
            return collate(samples)

        trainer.data_collator = recording
        run(trainer, checkpoint)
        folder.mkdir(exist_ok=True)
        rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
        said = {"world_size": world_size, "batches": batches}
        (folder / f"{rank}.json").write_text(json.dumps(said))
        atexit.register((folder / f"{rank}.exit_functions").touch)
        global last
        last = Last(folder / f"{rank}.interpreter")

    training.run.launch.run = recorded
    sft.main()


class Signal(TrainerCallback):
    def __init__(self, step: int, number: int = signal.SIGKILL):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def stop(step: int):
    def stopped(trainer, checkpoint):
        if trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
            trainer.add_callback(Signal(step, signal.SIGTERM))
        run(trainer, checkpoint)

    training.run.launch.run = stopped
    sft.main()


class Trouble(TrainerCallback):
    """What a run does not expect. `folders`: somebody makes folders with the names of what is written about a run.
    `tracker`: one that cannot close. `base`: the weights that a merge needs are moved away."""

    def __init__(self, kind: str):
        self.kind = kind

    def on_train_begin(self, args, state, control, **kwargs):
        if self.kind == "folders":
            for name in ("loss.png", "run_summary.md", "README.md"):
                Path(args.output_dir, name).mkdir()
        if self.kind == "base":
            weights = Path(sys.argv[sys.argv.index("--model_name_or_path") + 1], "model.safetensors")
            weights.rename(weights.with_suffix(".away"))

    def on_train_end(self, args, state, control, **kwargs):
        if self.kind == "tracker":
            raise RuntimeError("the tracker's server is gone")


def trouble(kind: str):
    def troubled(trainer, checkpoint):
        trainer.add_callback(Trouble(kind))
        run(trainer, checkpoint)

    training.run.launch.run = troubled
    sft.main()


def fork(rank: int, processes: int, port: int, die_at: int | None) -> int:
    child = os.fork()
    if child:
        return child
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}

    def mortal(trainer, checkpoint):
        assert trainer.accelerator.num_processes == processes
        if die_at is not None and rank == processes - 1:
            trainer.add_callback(Signal(die_at))
        run(trainer, checkpoint)

    training.run.launch.run = mortal
    status = 1
    try:
        sft.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill(processes: int, steps: list[int]):
    for number, die_at in enumerate([*steps, None]):
        if number == 1:
            sys.argv += ["--resume_from_checkpoint", "true"]
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        children = {fork(rank, processes, port, die_at) for rank in range(processes)}
        killed = False
        while children:
            child, status = os.wait()
            children.remove(child)
            killed |= os.WIFSIGNALED(status)
            if status:  # as torchrun does: one gone, all gone; who hears of it first ends with an error of its own
                for other in children:
                    os.kill(other, signal.SIGKILL)
                if die_at is None:
                    sys.exit(f"a process failed with status {status}")
        assert killed == (die_at is not None)


if __name__ == "__main__":
    what = sys.argv.pop(1)
    first = sys.argv.pop(1)
    if what == "record":
        record(Path(first))
    elif what == "stop":
        stop(int(first))
    elif what == "trouble":
        trouble(first)
    else:
        kill(int(first), [int(step) for step in sys.argv.pop(1).split(",")])
