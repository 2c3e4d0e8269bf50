# SPDX-License-Identifier: Apache-2.0
"""What a run of the lab would train, without training it."""

import math

from lab.experiment import Experiment, Task
from lab.plan import RATES, Preset, experiments, tokens_of
from lab.projectors import number_of_parameters, projector_config


def describe(names: list[str], preset: Preset, tasks: list[Task]) -> str:
    """The numbers of experiments and steps, and each projector's tokens and parameters.

    Raises:
        ValueError: parts, data or settings do not fit.
        OSError: parts or data cannot be had.
    """
    configs = tasks[0].configs()
    num_patches = tasks[0].num_patches
    check_tokens(preset, num_patches)
    for task in tasks:
        task.check()
    lines = [f"{'projector':12} {'M':>5} {'parameters':>12}"]
    for name in names:
        num_tokens = tokens_of(name, preset.num_tokens, num_patches)
        parameters = number_of_parameters(name, projector_config(name, *configs, num_tokens, None))
        lines.append(f"{name:12} {num_tokens:5} {parameters:12,}")
    planned = experiments(names, dict.fromkeys(names, RATES[0]), preset, tasks, num_patches)
    trials = len(names) * len(RATES)
    steps = sum(experiment.points[-1] for experiment in planned) + trials * preset.search_steps
    features = sum(preset.images) * num_patches * configs[0].hidden_size * 2
    lines += [
        "",
        f"towers {', '.join(preset.towers)}; seeds {', '.join(str(s) for s in sorted({task.seed for task in tasks}))}",
        f"at least {trials} runs of {preset.search_steps} steps to choose learning rates, then {len(planned)} experiments: "
        f"{steps:,} steps of {Experiment.batch_size} images",
        f"features of a task (a tower and a seed) on disk: {features / 2**20:,.0f} MiB; {len(tasks)} tasks",
    ]
    return "\n".join(lines)


def check_tokens(preset: Preset, num_patches: int) -> None:
    """
    Raises:
        ValueError: an M that is not a square.
    """
    for num_tokens in (preset.num_tokens, *preset.curve):
        if math.isqrt(num_tokens) ** 2 != num_tokens:
            root = math.isqrt(num_tokens)
            raise ValueError(f"M = {num_tokens} is not a square; use {root**2} or {(root + 1) ** 2}")
    if max(preset.num_tokens, *preset.curve, 0) > num_patches:
        raise ValueError(f"M above the number of patches, {num_patches}, adds nothing to compare; use fewer tokens")
