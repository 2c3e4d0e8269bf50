# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py` through accelerate's own FSDP2 and DeepSpeed branches, on CPU processes.

    DS_ACCELERATOR=cpu python run_engines.py JOBS.json

Each job is a list of runs, one after the other: {"engine": a file for `accelerate launch --config_file`, or null for one
process, "arguments": of sft.py, "log": file, "die_at": step after which the last process is killed, or null}. All processes
are forked from this one, since loading the libraries takes longer than the training. Says in JOBS.json.done how each ended.

accelerate takes these branches for GPUs alone. Two of its methods are replaced, nothing else.
"""

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import accelerate.state
import matplotlib.pyplot  # noqa: F401
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.utils.logging import disable_progress_bar

import training.run.launch
from tests.tiny import tiny_model
from tests.training.run_sft import Signal
from training import sft

PROCESSES = 2
LIMIT = 150  # seconds of a run, which takes about 3

# What each process would import and prepare for itself. Without a progress bar, whose lock all processes would share, also
# with one that is killed while it holds it.
disable_progress_bar()
torch.compile(print)
with tempfile.TemporaryDirectory() as folder:
    tiny_model().save_pretrained(folder)
if is_deepspeed_available():
    import deepspeed

    # It would be compiled, for inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
gc.freeze()


def start_on_gloo(engine: str):
    """Replaces what asks for a GPU."""
    kind = DistributedType[engine] if engine in ("NO", "MULTI_CPU") else DistributedType.MULTI_GPU
    backend = None if engine == "NO" else "gloo"
    accelerate.state.PartialState._prepare_backend = lambda self, *args, **kwargs: (backend, kind)
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def launched(config_file: str) -> dict[str, str]:
    """The environment that `accelerate launch` gives its processes."""
    settings = ["--config_file", config_file, "--num_processes", str(PROCESSES), "--mixed_precision", "no"]
    arguments = launch_command_parser().parse_args([*settings, "training/sft.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        env = prepare_multi_gpu_env(arguments)
    else:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = prepare_deepspeed_cmd_env(arguments)[1]
    return {name: value for name, value in env.items() if name.startswith(("ACCELERATE", "FSDP"))}


def train(rank: int, run: dict):
    """What a process does: sft.py with its batches recorded, killed where that is asked for."""
    original = training.run.launch.run

    def mortal(trainer, checkpoint):
        assert trainer.accelerator.num_processes == (PROCESSES if run["engine"] else 1)
        assert run["distributed_type"] == trainer.accelerator.distributed_type.name
        collate, images = trainer.data_collator, []

        def recording(samples):
            images.append(sum(len(sample["images"]) for sample in samples))
            Path(f"{run['log']}.{rank}.images").write_text(json.dumps(images))
            return collate(samples)

        trainer.data_collator = recording
        if trainer.benchmarks is not None:
            ask = trainer.benchmarks._ask

            def noted(model, name, *args):
                records = ask(model, name, *args)
                answers = {key: record["pred"] for key, record in records.items()}
                with Path(f"{run['log']}.{rank}.answers").open("a") as file:
                    file.write(json.dumps([name, trainer.state.global_step, answers]) + "\n")
                return records

            trainer.benchmarks._ask = noted
        if run["die_at"] is not None and rank == PROCESSES - 1:
            trainer.add_callback(Signal(run["die_at"]))
        original(trainer, checkpoint)

    training.run.launch.run = mortal
    sys.argv = ["sft.py", *map(str, run["arguments"])]
    sft.main()


def fork(rank: int, port: int, env: dict, run: dict) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(LIMIT)
    status = 1
    try:
        log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if env:
            os.environ |= {**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        start_on_gloo(run["distributed_type"])
        train(rank, run)
        status = 0
    except SystemExit as end:
        print(end, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(run: dict) -> list[int]:
    """The exit statuses of the run's processes, a signal's number negative."""
    env = {} if run["engine"] is None else launched(run["engine"])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = {fork(rank, port, env, run): rank for rank in range(PROCESSES if run["engine"] else 1)}
    statuses = {}
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if status:  # one gone, all gone, as with any launcher
            for other in children.keys() - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    ended = {name: [start(run) for run in runs] for name, runs in json.loads(path.read_text()).items()}
    Path(f"{path}.done").write_text(json.dumps(ended))
