# SPDX-License-Identifier: Apache-2.0
"""What a run of the lab trains: its presets, the choice of learning rates, and the list of experiments."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lab.experiment import Experiment, Task
from lab.projectors import CANDIDATES, matched_width, number_of_parameters, projector_config

RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2)
RATE_STEP = 2.5  # by which the grid grows where the best value is at its edge
MAX_RATES = 9
MATCHED_TO = "c-abs"  # whose number of parameters the matched widths have
USED_ELSEWHERE = "c-abs"  # at other M than its own, since none of its weights has a shape that depends on M
WIDE_MLP = "pool-mlp"  # which is an MLP on each patch, of any width, where M = N


@dataclass(frozen=True)
class Preset:
    """
    Args:
        towers: by name. Learning rates are chosen on the first.
        seeds: how many.
        own_stand_ins: stand-ins and scenes of its own for each seed; otherwise all have those of the first.
        points: steps at which a run is evaluated. The last is the length of the comparison, the one before it "early".
        long: who goes on after that, on the first tower, to `long_points`.
        search_steps: length of a run that a learning rate is chosen by.
        num_tokens: M of the main comparison.
        curve: other M.
        every_patch: who is also run with M = N.
        matched: run everyone with as many parameters as the C-Abstractor, too.
        controls: run the controls.
        left_out: projectors that are run only where they are asked for, and controls that are not run.
        images: how many to train on, to choose learning rates on and to test on.
        tower_steps, language_model_steps: how long stand-ins are trained.
    """

    towers: tuple[str, ...] = ("clip", "siglip")
    seeds: int = 3
    own_stand_ins: bool = True
    points: tuple[int, ...] = (60, 120, 240, 360)
    long: tuple[str, ...] = ("c-abs", "resampler")
    long_points: tuple[int, ...] = (720, 1080)
    search_steps: int = 160
    num_tokens: int = 16
    curve: tuple[int, ...] = (4, 36)
    every_patch: tuple[str, ...] = ("c-abs",)
    matched: bool = True
    controls: bool = True
    left_out: tuple[str, ...] = ()
    images: tuple[int, ...] = (5000, 200, 300)
    tower_steps: int = 400
    language_model_steps: int = 1500


PRESETS = {
    "full": Preset(),
    "quick": Preset(
        towers=("clip",),
        own_stand_ins=False,
        points=(60, 120, 200),
        long=(),
        search_steps=80,
        curve=(),
        every_patch=(),
        matched=False,
        left_out=("mlp", "placeless"),
        images=(3000, 100, 150),
        tower_steps=300,
        language_model_steps=900,
    ),
    "smoke": Preset(
        towers=("clip",),
        seeds=2,
        own_stand_ins=False,
        points=(2, 4),
        long_points=(6,),
        search_steps=2,
        images=(64, 12, 12),
        tower_steps=4,
        language_model_steps=4,
    ),
}


def tokens_of(name: str, num_tokens: int, num_patches: int) -> int:
    return num_patches if CANDIDATES[name].per_patch else num_tokens


def rate_search(
    names: list[str], preset: Preset, task: Task, num_patches: int, run_all: Callable[[list[Experiment]], list[dict]]
) -> dict[str, dict[float, float]]:
    """By projector, validation accuracy (mean over kinds) by learning rate. The grid grows until the best value is inside,
    or it has `MAX_RATES` values: the report says so then."""
    found = {name: {} for name in names}
    wanted = {name: list(RATES) for name in names}
    while any(wanted.values()):
        trials = [
            Experiment(
                name,
                task,
                tokens_of(name, preset.num_tokens, num_patches),
                rate,
                (preset.search_steps,),
                split="validation",
            )
            for name in names
            for rate in wanted[name]
        ]
        for record in run_all(trials):
            right = record["points"][-1]["right"]
            found[record["projector"]][record["learning_rate"]] = float(
                np.mean([each.count("1") / len(each) for each in right.values()])
            )
        wanted = {name: _beyond_the_edge(found[name]) for name in names}
    return found


def best_rate(accuracies: dict[float, float]) -> float:
    """Of several that are equally good, the one nearest to the middle."""
    middle = math.sqrt(min(accuracies) * max(accuracies))
    return max(accuracies, key=lambda rate: (accuracies[rate], -abs(math.log(rate / middle))))


def is_at_the_edge(accuracies: dict[float, float]) -> bool:
    """Whether a value outside might be better than the best."""
    return best_rate(accuracies) in (min(accuracies), max(accuracies))


def _beyond_the_edge(accuracies: dict[float, float]) -> list[float]:
    if not is_at_the_edge(accuracies) or len(accuracies) >= MAX_RATES:
        return []
    low, high = min(accuracies), max(accuracies)
    return [float(f"{high * RATE_STEP if best_rate(accuracies) == high else low / RATE_STEP:.2g}")]


def experiments(
    names: list[str], rates: dict[str, float], preset: Preset, tasks: list[Task], num_patches: int
) -> list[Experiment]:
    """All that is planned on the tasks with the first tower; on the others, the comparison at the main M. What takes long
    comes first."""
    planned = []

    def add(name: str, task: Task, num_tokens: int, points: tuple[int, ...] = preset.points, **settings):
        rate = rates[CANDIDATES[name].control or name]
        planned.append(Experiment(name, task, num_tokens, rate, points, **settings))

    first, others = (
        [task for task in tasks if (task.tower == preset.towers[0]) == on_first] for on_first in (True, False)
    )
    for task in others:
        for name in names:
            if not CANDIDATES[name].per_patch:
                add(name, task, preset.num_tokens)
    for task in first:
        for name in names:
            points = preset.points + preset.long_points * (name in preset.long)
            used_at = preset.curve * (name == USED_ELSEWHERE)
            add(name, task, tokens_of(name, preset.num_tokens, num_patches), points, elsewhere=used_at)
            if not CANDIDATES[name].per_patch:
                for num_tokens in preset.curve + (num_patches,) * (name in preset.every_patch):
                    add(name, task, num_tokens)
        for name, num_tokens, width in matched(names, preset, task, num_patches):
            add(name, task, num_tokens, hidden_size=width)
        for name, candidate in CANDIDATES.items():
            if preset.controls and candidate.control in rates and name not in preset.left_out:
                add(name, task, tokens_of(name, preset.num_tokens, num_patches))
    return sorted(planned, key=lambda each: -each.points[-1] * (50 + each.num_tokens))


def matched(names: list[str], preset: Preset, task: Task, num_patches: int) -> list[tuple[str, int, int]]:
    """(projector, M, hidden size) with as many parameters as the C-Abstractor of default width."""
    if not preset.matched or MATCHED_TO not in names:
        return []
    configs, num_tokens = task.configs(), preset.num_tokens
    target = number_of_parameters(MATCHED_TO, projector_config(MATCHED_TO, *configs, num_tokens, None))
    at = [(name, num_tokens) for name in names if CANDIDATES[name].has_width and name != MATCHED_TO]
    if WIDE_MLP in names:
        at.append((WIDE_MLP, num_patches))
    return [(name, tokens, matched_width(name, *configs, tokens, target)) for name, tokens in at]
