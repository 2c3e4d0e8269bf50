# SPDX-License-Identifier: Apache-2.0
"""The benchmarks. Each is a file here that ends with its `TASK`; a new one is such a file and its name in `NAMES`."""

from importlib import import_module

from evaluation.task import Task

# In the order of `--tasks all`.
NAMES = (
    "mme",
    "pope",
    "mmbench",
    "scienceqa",
    "seed",
    "mmmu",
    "llava_w",
    "mm_vet",
    "owl",
)
TASKS: dict[str, Task] = {name: import_module(f"evaluation.tasks.{name}").TASK for name in NAMES}
