# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: tables, memory of this process, and models of a chosen shape with random weights."""

import argparse
import gc
import json
import platform
import subprocess
import sys
import threading
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeProjectorConfig


def markdown(rows: list[dict]) -> str:
    """A table with the keys of the first row as its head."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *[[str(row[name]) for name in head] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """Those of a benchmark whose functions take turns on one thread: `--rounds`, with its default, and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", action="store_true", help="the numbers instead of the table")
    torch.set_num_threads(1)
    return parser.parse_args()


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def in_a_process(module: str, *arguments) -> dict:
    """The last line of JSON that `python -m module arguments` prints: memory is measured in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _status_mb(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024


class PeakMemory:
    """Most memory over that at the start, in MB, of what runs inside the `with`.

    Args:
        name: `VmRSS`, all that is resident; `RssAnon`, what the system could only swap and not drop: pages of a mapped
            file are not in it. Linux only.
    """

    def __init__(self, name: str = "VmRSS"):
        self.name = name

    def __enter__(self):
        gc.collect()
        self._start = self._peak = _status_mb(self.name)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.0005):
            self._peak = max(self._peak, _status_mb(self.name))

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.peak_mb = max(self._peak, _status_mb(self.name)) - self._start


def in_turn(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of CPU of each function, called one after the other `rounds` times after a warm-up. With one thread
    that is its time on a core, whatever else the machine does."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: sorted(of_one)[len(of_one) // 2] for name, of_one in times.items()}


def build(
    text: dict,
    vision: dict,
    projector: dict,
    image_token_id: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> HoneybeeForConditionalGeneration:
    """A model with random weights: N(0, 0.02), made on the device itself."""
    config = HoneybeeConfig(
        CLIPVisionConfig(**vision),
        LlamaConfig(**text, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        HoneybeeProjectorConfig(**projector),
        image_token_id=image_token_id,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return HoneybeeForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
