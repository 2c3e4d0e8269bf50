# SPDX-License-Identifier: Apache-2.0
"""What a run of the lab would train, without training it."""

from lab.experiment import Experiment, Task
from lab.plan import RATES, Preset, Variant, experiments
from lab.projectors import number_of_parameters, projector_config


def describe(variants: list[Variant], preset: Preset, tasks: list[Task]) -> str:
    """The numbers of experiments and steps, and each projector's tokens and parameters.

    Raises:
        ValueError: the data do not fit.
        OSError: they cannot be had.
    """
    configs, num_patches = tasks[0].configs(), tasks[0].num_patches
    for task in tasks:
        task.check()
    lines = [f"{'projector':12} {'M':>5} {'hidden size':>12} {'parameters':>12}"]
    for variant in variants:
        config = projector_config(
            variant.projector, *configs, variant.num_tokens, variant.hidden_size, variant.trained_at
        )
        parameters, width = number_of_parameters(variant.projector, config), config.projector_config.hidden_size
        every_m = f"  for M of {', '.join(map(str, variant.trained_at))}" if variant.trained_at else ""
        lines.append(f"{variant.projector:12} {variant.num_tokens:5} {width:12} {parameters:12,}{every_m}")
    planned = experiments(dict.fromkeys(variants, RATES[0]), preset, tasks, num_patches)
    trials = len(variants) * len(RATES)
    steps = sum(experiment.points[-1] for experiment in planned) + trials * preset.search_steps
    features = sum(preset.images) * num_patches * configs[0].hidden_size * 2
    lines += [
        "",
        f"towers {', '.join(preset.towers)}; seeds {', '.join(str(s) for s in sorted({task.seed for task in tasks}))}",
        f"at least {trials} runs of {preset.search_steps} steps to choose learning rates, then {len(planned)} experiments: "
        f"{steps:,} steps of {Experiment.batch_size} images",
        f"features of a tower's images on disk: {features / 2**20:,.0f} MiB",
    ]
    return "\n".join(lines)
